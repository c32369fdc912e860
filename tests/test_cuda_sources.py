"""The CUDA sources compile for every shipped architecture (no GPU needed), or why not."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
NVCC = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "bin" / "nvcc"
# triton's wheel carries the tool that lists the machine code of a library.
TOOLS = Path(importlib.util.find_spec("triton").origin).parent / "backends" / "nvidia" / "bin"


def test_architectures_are_those_that_the_compiler_knows(tmp_path):
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text("#!/bin/sh\necho compute_75; echo compute_80; echo compute_90\n")
    nvcc.chmod(0o755)
    code = "import runpy, sys; sys.argv = ['setup.py', '-q', '--name']; "
    code += "print(*runpy.run_path('setup.py')['ARCHS'])"
    own = {name: v for name, v in os.environ.items() if name != "DGG_CUDA_ARCHS"}
    for more, expected in (
        ({"FORCE_CUDA": "1"}, "80 90a"),
        ({"FORCE_CUDA": "1", "DGG_CUDA_ARCHS": "90a;120"}, "90a 120"),
        ({"FORCE_CUDA": "0"}, ""),
    ):
        said = subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, env={**own, "CUDA_HOME": str(tmp_path), **more},
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        assert said.stdout.splitlines()[-1] == expected


@pytest.mark.skipif(not NVCC.exists(), reason=f"no CUDA compiler at {NVCC}")
def test_cuda_sources_compile_and_the_library_loads_beside_a_cpu_torch(tmp_path):
    built = subprocess.run(
        [sys.executable, "setup.py", "-q", "build_ext", "--build-lib", str(tmp_path / "lib"),
         "--build-temp", str(tmp_path / "temp")],
        cwd=ROOT, env={**os.environ, "FORCE_CUDA": "1"}, capture_output=True, text=True,
    )  # fmt: skip
    assert built.returncode == 0, built.stderr[-3000:]
    (library,) = (tmp_path / "lib" / "dgg_kernels").glob("_ops*.so")
    code = (
        f"import torch; torch.ops.load_library({str(library)!r}); print(torch.ops.dgg.gate_decide)"
    )
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert loaded.returncode == 0, loaded.stderr
    listed = subprocess.run(
        [str(TOOLS / "cuobjdump"), "-lelf", str(library)],
        capture_output=True,
        text=True,
        check=True,
    )
    # The tool of triton 3.6 leaves the last letter out.
    assert set(re.findall(r"sm_\d+", listed.stdout)) == {"sm_80", "sm_90", "sm_100"}
    # Where a thread of decide_kernel's 1024 has more, it cannot be launched.
    used = subprocess.run(
        [str(TOOLS / "cuobjdump"), "-res-usage", str(library)],
        capture_output=True,
        text=True,
        check=True,
    )
    registers = [int(n) for n in re.findall(r"decide_kernel[^:]*:\s+REG:(\d+)", used.stdout)]
    assert len(registers) >= 6 and max(registers) <= 64, used.stdout[-3000:]
