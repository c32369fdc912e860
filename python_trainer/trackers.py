"""TensorBoard and Weights & Biases, for those who have them: they get what metrics.jsonl gets.

TensorBoard forgets what it has and no checkpoint; for W&B a resumed run is one of its own.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

from . import checkpoint
from .config import ConfigError
from .distributed import Ranks
from .files import Row


class Tracker(Protocol):
    """Takes the rows of one run, and is closed when it ends."""

    def __call__(self, row: Row) -> None: ...

    def close(self) -> None: ...


def check(names: Sequence[str]) -> None:
    """Raise ConfigError unless all of them are installed."""
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise ConfigError(f"track: expected {name} to be installed, got no such package")


def make(names: Sequence[str], folder: Path) -> list[Tracker]:
    """Those of the run in `folder`: on the first rank, which writes its files, too."""
    check(names)
    return [_TRACKERS[name](folder) for name in names] if Ranks().first else []


def numbers(row: Row) -> dict[str, float]:
    """What of a row can be drawn."""
    return {key: float(value) for key, value in row.items() if isinstance(value, int | float)}


class _TensorBoard:
    def __init__(self, folder: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        done = checkpoint.progress_in(folder / "checkpoints")
        known = 0 if done is None else done["updates_attempted"] + 1
        self.writer = SummaryWriter(folder, purge_step=known)

    def __call__(self, row: Row) -> None:
        for key, value in numbers(row).items():
            # Evaluations and updates are drawn over the same axis.
            self.writer.add_scalar(f"{row['type']}/{key}", value, row["updates_attempted"])
        self.writer.flush()

    def close(self) -> None:
        self.writer.close()


class _WandB:
    def __init__(self, folder: Path) -> None:
        import wandb  # pyright: ignore[reportMissingImports]

        self.run = wandb.init(
            project="gated-lm-head", name=str(folder), dir=folder, reinit="create_new"
        )

    def __call__(self, row: Row) -> None:
        self.run.log({f"{row['type']}/{key}": value for key, value in numbers(row).items()})

    def close(self) -> None:
        self.run.finish()


_TRACKERS: dict[str, Callable[[Path], Tracker]] = {"tensorboard": _TensorBoard, "wandb": _WandB}
