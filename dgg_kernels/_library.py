"""Loads the compiled ops (csrc/) into torch.ops.dgg."""

from pathlib import Path

import torch


def _load() -> Path:
    found = sorted(Path(__file__).parent.glob("_ops*.so")) + sorted(
        Path(__file__).parent.glob("_ops*.pyd")
    )
    if not found:
        raise ImportError(
            "dgg_kernels: the compiled ops (_ops) are missing beside "
            f"{Path(__file__).parent}: install the package with `pip install .` (or `-e .`), "
            "do not import it from the source tree"
        )
    torch.ops.load_library(str(found[0]))
    return found[0]


OPS_FILE = _load()
