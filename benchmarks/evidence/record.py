"""Run directories as one compressed file of rows, and the way back."""

from __future__ import annotations

import json
import lzma
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from python_trainer.config import TrainConfig
from python_trainer.files import decoded, read_metrics
from python_trainer.plots import style
from python_trainer.results import last_quarter

from .. import common

FOLDER = common.RESULTS / "evidence"
# Of an update, what the tables and figures need; the rest is in the run directory's own log.
KEPT = (
    "type", "step", "rollouts", "updates_applied", "reward", "loss", "kl", "entropy", "clip_ratio",
    "grad_norm", "gate/energy", "gate/z", "gate/chi2", "gate/shut", "gate/reuse", "dwd/lm_head",
    "dwd/middle", "accuracy", "accuracies", "signals", "log_ratio/negative", "log_ratio/positive",
)  # fmt: skip


@dataclass
class Run:
    """One arm in one seed."""

    arm: str
    seed: int
    rows: list[dict[str, Any]]
    seconds: dict[str, float] = field(default_factory=dict)  # spent on rollouts, updates, ...
    curve: list[tuple[int, float]] = field(init=False)  # (rollout batches, held-out accuracy)

    def __post_init__(self) -> None:
        self.curve = [(r["rollouts"], r["accuracy"]) for r in self.rows if r["type"] == "eval"]

    @property
    def values(self) -> list[float]:
        return [accuracy for _, accuracy in self.curve]

    @property
    def late(self) -> float:
        return last_quarter(self.values)

    def reaches(self, goal: float) -> int | None:
        """Rollout batches at the first evaluation at or above it."""
        return next((n for n, accuracy in self.curve if accuracy >= goal), None)


Runs = dict[str, dict[int, Run]]  # arm -> seed -> run


def write(
    folders: Sequence[Path],
    name: str,
    arms: Sequence[str] = (),
    beside: Sequence[tuple[str, list[str]]] = (),
) -> Path:
    """Write the finished runs of these directories as one compressed file.

    Args:
        folders: run directories.
        name: of the record.
        arms: these alone (default: all).
        beside: other records, and arms of theirs to compare with; `read` finds them there.
    """
    path = FOLDER / f"{name}.jsonl.xz"
    path.parent.mkdir(parents=True, exist_ok=True)
    with lzma.open(path, "wt", preset=6) as file:
        for other, theirs in beside:
            file.write(json.dumps({"type": "beside", "record": other, "arms": theirs}) + "\n")
        for folder in folders:
            summary = json.loads((folder / "summary.json").read_text())
            known = ("versions", "commit", "warmups", "device", "date")
            about = {key: summary[key] for key in known if key in summary}
            plan = json.loads((folder / "run.json").read_text())
            file.write(json.dumps({"type": "about", **about, **plan}) + "\n")
            for run in summary["runs"]:
                if not run["finished"] or (arms and run["arm"] not in arms):
                    continue
                head = {key: run[key] for key in ("arm", "seed", "seconds")}
                file.write(json.dumps({"type": "run", **head}) + "\n")
                log = folder / run["arm"] / f"seed-{run['seed']}" / "metrics.jsonl"
                for row in read_metrics(log):
                    if row["type"] != "episode":
                        kept = {k: _short(row[k]) for k in KEPT if k in row}
                        file.write(json.dumps(kept) + "\n")
    return path


def _short(value: Any) -> Any:
    """Six digits are more than any table shows; NaN, which JSON has not, becomes null."""
    if not isinstance(value, float):
        return value
    return float(f"{value:.6g}") if math.isfinite(value) else None


def read(name: str) -> tuple[Runs, list[dict[str, Any]]]:
    """The runs of a record, and what each of its directories says of itself.

    With the arms of other records that it names, in the seeds that its own runs have, if any.
    """
    about, logs, beside, rows = [], [], [], []
    with lzma.open(FOLDER / f"{name}.jsonl.xz", "rt") as file:
        for row in map(decoded, file):
            if row["type"] == "about":
                about.append(row)
            elif row["type"] == "beside":
                beside.append(row)
            elif row["type"] == "run":
                rows = []
                logs.append((row["arm"], row["seed"], rows, row.get("seconds", {})))
            else:
                rows.append(row)
    seeds = {seed for _, seed, *_ in logs}
    runs: Runs = {}
    for other in beside:
        theirs, said = read(other["record"])
        about += said
        for arm in other["arms"]:
            found = {seed: run for seed, run in theirs[arm].items() if not seeds or seed in seeds}
            runs[arm] = runs.get(arm, {}) | found
    for arm, seed, *of in logs:
        runs.setdefault(arm, {})[seed] = Run(arm, seed, *of)
    return runs, about


def settings(name: str) -> str:
    """The TOML file with which `compare --config` makes a record's own runs again.

    Every arm in every seed, which is more than was run where its directories differ.
    """
    with lzma.open(FOLDER / f"{name}.jsonl.xz", "rt") as file:
        about = [row for row in map(decoded, file) if row["type"] == "about"]
    default = asdict(TrainConfig())
    arms = {arm: default | values for row in about for arm, values in row["arms"].items()}
    match = {arm: other for row in about for arm, other in row.get("match", {}).items()}
    first = next(iter(arms.values()), default)
    shared = {k for k, value in first.items() if all(of[k] == value for of in arms.values())}
    lines = [f"seeds = {sorted({seed for row in about for seed in row['seeds']})}"]
    lines += [_toml(k, first[k]) for k in default if k in shared and first[k] != default[k]]
    for arm, of in arms.items():
        lines += ["", f"[arms.{json.dumps(arm)}]"]
        for k in default:  # the first two may be another's where `compare` has an arm of this name
            if k in ("gate", "num_iterations") or (k not in shared and of[k] != default[k]):
                lines.append(_toml(k, of[k]))
        lines += [_toml("match", match[arm])] if arm in match else []
    return "\n".join(lines) + "\n"


def _toml(key: str, value: Any) -> str:
    if isinstance(value, dict):
        return f"{key} = {{ {', '.join(_toml(k, v) for k, v in value.items())} }}"
    return f"{key} = {json.dumps(value)}"  # what a setting may be reads alike in both


def names() -> list[str]:
    """Of all records."""
    return sorted(path.name.removesuffix(".jsonl.xz") for path in FOLDER.glob("*.jsonl.xz"))


def label(arm: str) -> str:
    return style(arm)[0]
