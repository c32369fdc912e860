"""Loads the compiled ops (csrc/) into torch.ops.dgg."""

from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import torch


def _load() -> Path:
    folder = Path(__file__).parent
    # This Python's own: a source tree may hold what another one built.
    for file in (folder / f"_ops{suffix}" for suffix in EXTENSION_SUFFIXES):
        if file.exists():
            torch.ops.load_library(str(file))
            return file
    raise ImportError(
        f"dgg_kernels: the compiled ops (_ops{EXTENSION_SUFFIXES[0]}) are missing in {folder}: "
        "install the package with `pip install .` (or `-e .`), do not import it from the source "
        "tree"
    )


OPS_FILE = _load()
