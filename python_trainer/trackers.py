"""TensorBoard and Weights & Biases, for those who have them: they mirror metrics.jsonl."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path

from .config import ConfigError
from .files import Row


def check(names: Sequence[str]) -> None:
    """Raise ConfigError unless all of them are installed."""
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise ConfigError(f"track: expected {name} to be installed, got no such package")


def make(names: Sequence[str], folder: Path) -> list[Callable[[Row], None]]:
    """What takes the rows of the run in `folder`, one callable a tracker."""
    check(names)
    return [_TRACKERS[name](folder) for name in names]


def numbers(row: Row) -> dict[str, float]:
    """What of a row can be drawn."""
    return {key: float(value) for key, value in row.items() if isinstance(value, int | float)}


def _tensorboard(folder: Path) -> Callable[[Row], None]:
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(folder)

    def add(row: Row) -> None:
        for key, value in numbers(row).items():
            # Evaluations and updates are drawn over the same axis.
            writer.add_scalar(f"{row['type']}/{key}", value, row["updates_attempted"])
        writer.flush()

    return add


def _wandb(folder: Path) -> Callable[[Row], None]:
    import wandb  # pyright: ignore[reportMissingImports]

    run = wandb.init(project="gated-lm-head", name=str(folder), dir=folder, reinit="create_new")
    return lambda row: run.log({f"{row['type']}/{k}": v for k, v in numbers(row).items()})


_TRACKERS = {"tensorboard": _tensorboard, "wandb": _wandb}
