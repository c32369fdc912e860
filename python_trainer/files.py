"""What a run leaves on disk: always readable, whenever it ends."""

from __future__ import annotations

import datetime
import itertools
import json
import math
import os
import platform
import subprocess
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from .config import CheckpointError

Row = dict[str, Any]
_INFINITIES = {"Infinity": math.inf, "-Infinity": -math.inf}


def as_json(value: Any, **options: Any) -> str:
    """JSON text, floats by `repr`; what is read from it gives the same text again."""
    return json.dumps(_encode(value), allow_nan=False, **options)


def _encode(value: Any) -> Any:
    """JSON has no NaN and no infinity: NaN becomes null, the infinities strings."""
    if isinstance(value, dict):
        return {key: _encode(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_encode(item) for item in value]
    if isinstance(value, float) and math.isnan(value):
        return None
    if isinstance(value, float) and math.isinf(value):
        return "Infinity" if value > 0 else "-Infinity"
    return value


class MetricsLog:
    """`metrics.jsonl`: one object per line, one write per line, nothing buffered.

    Floats are written by `repr`, so they come back bit for bit. null stands for NaN and for "no
    value here". Wall times are not in it: two runs of one seed write the same bytes.

    Args:
        path: the file.
        size: bytes of it to keep, when a run goes on from a checkpoint that knew no more.
        write: False on all ranks but the first.
        mirrors: called with every row too (`trackers`).

    Raises:
        CheckpointError: the file is shorter than `size`: rows that the checkpoint knows are gone.
    """

    def __init__(
        self,
        path: Path,
        size: int = 0,
        write: bool = True,
        mirrors: Sequence[Callable[[Row], None]] = (),
    ) -> None:
        self.size, self._file, self._mirrors = size, None, mirrors
        if write:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = open(path, "ab", buffering=0)  # noqa: SIM115
            if (found := self._file.seek(0, os.SEEK_END)) < size:
                raise CheckpointError(f"{path}: expected at least {size} bytes, got {found}")
            self._file.truncate(size)

    def write(self, row: Row) -> None:
        line = as_json(row).encode() + b"\n"
        if self._file is not None:
            rest = memoryview(line)
            while rest:  # a disk that gets full takes a part, and says so at the next write
                rest = rest[self._file.write(rest) :]
            for mirror in self._mirrors:
                mirror(row)
        self.size += len(line)

    def sync(self) -> None:
        """Return when all rows are on the disk: before a checkpoint that counts on them."""
        if self._file is not None:
            os.fsync(self._file.fileno())

    def close(self) -> None:
        if self._file is not None:
            self._file.close()


def decoded(line: str) -> Row:
    """A row as `MetricsLog` wrote it, with null as NaN again."""
    row = json.loads(line)
    for key, value in row.items():
        if value is None:
            row[key] = math.nan
        elif isinstance(value, str) and value in _INFINITIES:
            row[key] = _INFINITIES[value]
    return row


def read_metrics(path: Path) -> list[Row]:
    """The rows of a `metrics.jsonl`; a last one that a crash has cut is written again on resume."""
    lines = path.read_text().splitlines(keepends=True)
    return [decoded(line) for line in itertools.takewhile(lambda x: x.endswith("\n"), lines)]


def updates(rows: list[Row]) -> list[Row]:
    return [row for row in rows if row["type"] == "update"]


def per_batch(rows: list[Row], key: str) -> dict[int, list[float]]:
    """Values of `key` by rollout batch."""
    batches: dict[int, list[float]] = {}
    for row in rows:
        batches.setdefault(row["rollouts"], []).append(float(row[key]))
    return batches


def use_counts(rows: list[Row]) -> list[int]:
    """Applied updates of each rollout batch; 0 of one from which none was tried."""
    shut = per_batch(updates(rows), "gate/shut")
    tried = [shut.get(batch, []) for batch in range(1, max(shut, default=0) + 1)]
    return [len(of) - int(sum(of)) for of in tried]


def write_atomically(path: Path, data: str | bytes) -> None:
    """Write a whole file or nothing: temporary neighbour, then rename."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(data.encode() if isinstance(data, str) else data)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    write_atomically(path, as_json(value, indent=2) + "\n")


def commit() -> str | None:
    """The git commit that this code runs from, with "-dirty" if edited; None outside a checkout."""
    here = Path(__file__).resolve()

    def git(*command: str) -> str:
        return subprocess.run(
            ["git", "-C", str(here.parent), *command],
            capture_output=True, text=True, timeout=10, check=True,
        ).stdout.strip()  # fmt: skip

    try:
        git("ls-files", "--error-unmatch", here.name)  # or it is installed in another's repository
        return git("describe", "--always", "--dirty", "--abbrev=40") or None
    except (OSError, subprocess.SubprocessError):
        return None


def now() -> str:
    """UTC, ISO 8601, to the second."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def device_name(device: str) -> str:
    """The GPU's name, or model and cores of the CPU, also where that GPU is not here."""
    import torch

    if torch.device(device).type == "cuda" and torch.cuda.is_available():
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not Linux
        lines = []
    models = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    cores = len(models) or os.cpu_count()
    return f"{models[0] if models else platform.processor()}, {cores} cores"


USED = ("dgg-kernels", "torch", "triton", "transformers", "reasoning-gym", "numpy")


def versions(names: Sequence[str] = USED) -> dict[str, str | None]:
    """Versions of what a result depends on; None where a package is not installed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in names:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found
