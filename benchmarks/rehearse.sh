#!/bin/sh
# The tests' core on the versions of the GPU machines, without a GPU: `make rehearse`.
#
#     benchmarks/rehearse.sh python3.12 build/rehearsal
#
# Builds a copy of the working tree in an environment of its own; then the CPU tests, every Triton
# kernel compiled for GPUs that are not there, and the Triton kernels, the GPU's benchmarks, its
# tests and the trainer in the interpreter.
set -eu
[ $# -eq 2 ] || { echo "usage: $0 PYTHON DIR" >&2; exit 2; }
mkdir -p "$2"
python=$1 dir=$(cd "$2" && pwd) root=$(cd "$(dirname "$0")/.." && pwd)
"$python" -c 'import sys; assert sys.version_info[:2] == (3, 12), f"Python 3.12 is wanted, this is {sys.version.split()[0]}"'
run=$dir/venv/bin/python

if ! cmp -s "$root/benchmarks/rehearsal.txt" "$dir/installed.txt"; then
    [ -x "$run" ] || "$python" -m venv "$dir/venv"
    # The CPU build takes 0.2 GB. Where its index is out of reach, PyPI's brings CUDA: 3 GB.
    "$run" -m pip install -q --retries 1 --index-url https://download.pytorch.org/whl/cpu torch==2.11.0 ||
        "$run" -m pip install -q torch==2.11.0
    "$run" -m pip install -q -r "$root/benchmarks/rehearsal.txt"
    cp "$root/benchmarks/rehearsal.txt" "$dir/installed.txt"
fi

rm -rf "$dir/src"  # with what has been deleted since
mkdir "$dir/src"
cd "$root"
git ls-files -z --cached --others --exclude-standard | xargs -0 sh -c '
    for file; do [ -e "$file" ] && printf "%s\0" "$file"; done' sh |
    xargs -0 cp -p --parents -t "$dir/src"
cd "$dir/src"
"$run" -m pip install -q --no-build-isolation --no-deps -e .
"$run" -m dgg_kernels.info
export OMP_NUM_THREADS=1 DGG_REHEARSAL=1  # what takes minutes, too
red=0
"$run" -m pytest -n 2 tests/test_lm_head.py tests/test_active_set.py tests/test_screen.py \
    tests/test_cross_entropy.py tests/test_gate.py tests/test_replay.py tests/test_cuda_sources.py \
    tests/test_benchmarks.py tests/test_triton_compile.py tests/test_triton_launch.py || red=1
for tests in tests/test_triton_kernels.py tests/test_pretend_gpu.py tests/test_pretend_trainers.py; do
    TRITON_INTERPRET=1 "$run" -m pytest -n 2 "$tests" -W ignore::RuntimeWarning || red=1
done
exit $red
