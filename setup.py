"""Builds csrc/ with ninja: one library of torch ops, on torch's stable ABI and without Python's.

So one wheel (cp311-abi3) serves every Python from 3.11 on and every torch from 2.11 on.
The CPU ops are always built. CUDA ops are added when torch has CUDA and nvcc is found;
FORCE_CUDA=1 compiles them beside a CPU build of torch too, as a compile check; FORCE_CUDA=0 leaves
them out. DGG_CUDA_ARCHS chooses the architectures (default "80;90a;100a", or those of it that this
nvcc knows).
`python -m dgg_kernels.info` tells what was built.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import torch
from setuptools import setup
from torch.utils import cpp_extension

ROOT = Path(__file__).parent
# Stable ABI of torch 2.10: one binary runs on that and every later torch.
DEFINES = ["-DTORCH_TARGET_VERSION=0x020a000000000000"]
STD = "c++20" if tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 12) else "c++17"


def find_nvcc() -> Path | None:
    """nvcc of CUDA_HOME, of the default place, or of the PATH (there it may be a wrapper)."""
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    for home in filter(None, homes):
        if (nvcc := Path(home) / "bin" / "nvcc").exists():
            return nvcc
    found = shutil.which("nvcc")
    return Path(found).resolve() if found else None


def architectures(nvcc: Path) -> list[str]:
    """Those asked for, or what is known of 80, 90a and 100a: the last since CUDA 12.8."""
    if asked := os.environ.get("DGG_CUDA_ARCHS"):
        return asked.split(";")
    listed = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True, check=True)
    known = listed.stdout.split()
    return [a for a in ("80", "90a", "100a") if f"compute_{a.rstrip('a')}" in known]


def sources(folder: str, suffix: str) -> list[str]:
    return sorted(str(p.relative_to(ROOT)) for p in (ROOT / "csrc" / folder).glob(f"*{suffix}"))


NVCC = find_nvcc()
FORCE_CUDA = os.environ.get("FORCE_CUDA")
if FORCE_CUDA == "1" and NVCC is None:
    sys.exit("FORCE_CUDA=1, but nvcc was not found: set CUDA_HOME to the CUDA toolkit")
WITH_CUDA = FORCE_CUDA == "1" or (FORCE_CUDA != "0" and torch.version.cuda is not None)
ARCHS = architectures(NVCC) if WITH_CUDA and NVCC is not None else []


class Build(cpp_extension.BuildExtension):
    """torch's ninja build, plus nvcc run by hand: CUDAExtension refuses a CPU build of torch."""

    def build_extension(self, ext):
        for source in getattr(ext, "cuda_sources", []):
            ext.extra_objects.append(self.compile_cuda(source))
        super().build_extension(ext)

    def compile_cuda(self, source: str) -> str:
        output = Path(self.build_temp) / (Path(source).stem + ".cu.o")
        output.parent.mkdir(parents=True, exist_ok=True)
        archs = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in ARCHS]
        includes = [f"-I{path}" for path in cpp_extension.include_paths()]
        command = [str(NVCC), "-O3", f"-std={STD}", "--threads=2", "--expt-relaxed-constexpr"]
        # Without fused multiply-adds the gate decides bit for bit as on a CPU.
        command += ["--fmad=false", "-Xcompiler=-fPIC", "-DUSE_CUDA", "-lineinfo"]
        command += [*DEFINES, *archs, *includes]
        if torch.version.cuda is None:
            command.append("-DDGG_TORCH_WITHOUT_CUDA")
        subprocess.check_call([*command, "-c", source, "-o", str(output)])
        return str(output)


# -fno-math-errno lets the compiler vectorise; no other fast-math: NaN and Inf must stay themselves.
# -Wno-psabi: vectors of 64 bytes are passed between inlined functions alone.
FLAGS = ["-O3", "-fopenmp", "-fno-math-errno", "-Wno-psabi", f"-std={STD}", *DEFINES]
ops = cpp_extension.CppExtension(
    "dgg_kernels._ops",
    ["csrc/ops.cpp", *sources("cpu", ".cpp")],
    extra_compile_args=FLAGS,
    extra_link_args=["-fopenmp"],
    py_limited_api=True,
    depends=[str(p) for p in (ROOT / "csrc").rglob("*.h")],
)
built_for = "none"
if ARCHS:
    assert NVCC is not None
    ops.cuda_sources = sources("cuda", ".cu")
    ops.library_dirs.append(str(NVCC.parent.parent / "lib64"))
    ops.libraries += ["cudart_static", "dl", "rt", "pthread"]
    if torch.version.cuda:
        ops.libraries.append("torch_cuda")
    built_for = " ".join(f"sm_{a}" for a in ARCHS)
for name, value in {"TORCH": torch.__version__, "CUDA_ARCHS": built_for}.items():
    ops.define_macros.append((f"DGG_{name}", f'"{value}"'))

setup(
    ext_modules=[ops],
    cmdclass={"build_ext": Build},
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)
