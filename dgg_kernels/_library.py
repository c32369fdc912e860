"""Loads the compiled ops (csrc/) into torch.ops.dgg."""

from pathlib import Path

import torch

OPS_FILE = Path(__file__).with_name("_ops.abi3.so")
if not OPS_FILE.exists():
    raise ImportError(
        f"dgg_kernels: the compiled ops ({OPS_FILE.name}) are missing in {OPS_FILE.parent}: "
        "install the package with `pip install .` (or `-e .`), do not import it from the source "
        "tree"
    )
torch.ops.load_library(str(OPS_FILE))
