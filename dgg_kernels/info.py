"""`python -m dgg_kernels.info`: what was built, and what each op will use here."""

from __future__ import annotations

import importlib.util
import platform

import torch

import dgg_kernels
from dgg_kernels import _library
from dgg_kernels.gate import gate_devices


def implementations() -> dict[str, str]:
    """Device type -> implementation of the lm_head ops and of the gate."""
    triton = importlib.util.find_spec("triton")
    vectors = torch.backends.cpu.get_cpu_capability()
    return {
        "cpu": f"lm_head: C++ ({vectors}); gate: C++",
        "cuda": f"lm_head: {'Triton' if triton else 'none (install triton)'}; gate: "
        + ("CUDA" if "cuda" in gate_devices() else "none (built without CUDA)"),
        "mps, xpu": "lm_head: plain PyTorch by vocabulary chunks; gate: none",
    }


def main() -> None:
    """Print it."""
    built_with, archs = torch.ops.dgg.build()
    print(f"dgg_kernels {dgg_kernels.__version__}: {_library.OPS_FILE}")
    print(f"built with    torch {built_with} (stable ABI of 2.10), CPU ops: yes, "
          f"CUDA ops: {'no' if archs == 'none' else archs}")  # fmt: skip
    cuda = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    print(f"running on    Python {platform.python_version()}, torch {torch.__version__}, "
          f"{torch.backends.cpu.get_cpu_capability()}, {cuda}")  # fmt: skip
    for device, used in implementations().items():
        print(f"{device:<13} {used}")


if __name__ == "__main__":
    main()
