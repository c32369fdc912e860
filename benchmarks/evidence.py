"""What the runs of docs/evidence.md came to: raw record, tables, verdicts, figures.

    python -m python_trainer compare --config benchmarks/evidence/main.toml --out runs/main
    python -m benchmarks.evidence record runs/main --save main     # raw logs, compressed
    python -m benchmarks.evidence report main                      # tables and figures from them

Several run directories (some seeds each, say, on several machines) become one record.
"""

from __future__ import annotations

import argparse
import json
import lzma
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import numpy as np
from scipy import stats

from python_trainer.files import read_metrics, use_counts
from python_trainer.plots import style

from . import common

FOLDER = common.RESULTS / "evidence"
# Of an update, what the tables and figures need; the rest is in the run directory's own log.
KEPT = (
    "type", "step", "rollouts", "updates_applied", "reward", "loss", "kl", "entropy", "clip_ratio",
    "grad_norm", "gate/energy", "gate/z", "gate/chi2", "gate/shut", "gate/reuse", "dwd/lm_head",
    "dwd/middle", "accuracy",
)  # fmt: skip


@dataclass
class Run:
    """One arm in one seed."""

    arm: str
    seed: int
    rows: list[dict[str, Any]]
    curve: list[tuple[int, float]] = field(init=False)  # (rollout batches, held-out accuracy)

    def __post_init__(self) -> None:
        self.curve = [(r["rollouts"], r["accuracy"]) for r in self.rows if r["type"] == "eval"]

    @property
    def values(self) -> list[float]:
        return [accuracy for _, accuracy in self.curve]

    @property
    def late(self) -> float:
        """Mean of the last quarter of the evaluations."""
        return fmean(self.values[-max(1, len(self.values) // 4) :])

    def reaches(self, goal: float) -> int | None:
        """Rollout batches at the first evaluation at or above it."""
        return next((n for n, accuracy in self.curve if accuracy >= goal), None)


Runs = dict[str, dict[int, Run]]  # arm -> seed -> run


# -- record ---------------------------------------------------------------------------------------


def record(folders: Sequence[Path], name: str) -> Path:
    """Write the finished runs of these directories as one compressed file of rows."""
    path = FOLDER / f"{name}.jsonl.xz"
    path.parent.mkdir(parents=True, exist_ok=True)
    with lzma.open(path, "wt", preset=9) as file:
        for folder in folders:
            summary = json.loads((folder / "summary.json").read_text())
            about = {key: summary[key] for key in ("versions", "commit", "warmups")}
            plan = json.loads((folder / "run.json").read_text())
            file.write(json.dumps({"type": "about", **about, **plan}) + "\n")
            for run in summary["runs"]:
                if not run["finished"]:
                    continue
                place = {"arm": run["arm"], "seed": run["seed"]}
                file.write(json.dumps({"type": "run", **place, "wall_s": run["wall_s"]}) + "\n")
                log = folder / run["arm"] / f"seed-{run['seed']}" / "metrics.jsonl"
                for row in read_metrics(log):
                    if row["type"] in ("update", "eval"):
                        kept = {k: _short(row[k]) for k in KEPT if k in row}
                        file.write(json.dumps(kept) + "\n")
    return path


def _short(value: Any) -> Any:
    """Six digits are more than any table shows; NaN, which JSON has not, becomes null."""
    if not isinstance(value, float):
        return value
    return float(f"{value:.6g}") if math.isfinite(value) else None


def read(name: str) -> tuple[Runs, list[dict[str, Any]]]:
    """The runs of a record, and what each of its directories says of itself."""
    runs: Runs = {}
    about, rows, place = [], [], ("", 0)

    def close() -> None:
        if rows:
            runs.setdefault(place[0], {})[place[1]] = Run(*place, list(rows))
            rows.clear()

    with lzma.open(FOLDER / f"{name}.jsonl.xz", "rt") as file:
        for line in file:
            row = json.loads(line)
            if row["type"] == "about":
                close()
                about.append(row)
            elif row["type"] == "run":
                close()
                place = (row["arm"], row["seed"])
            else:
                rows.append(row)
    close()
    return runs, about


# -- numbers --------------------------------------------------------------------------------------

Metric = Callable[[Run, Run | None], float]  # of a run, and single use in the same seed


def speedup(run: Run, single: Run | None) -> float:
    """How many times fewer batches to single use's late accuracy than single use itself needs."""
    assert single is not None
    first, mine = single.reaches(single.late), run.reaches(single.late)
    last = run.curve[-1][0]
    return max(first or last, 1) / max(mine or last, 1)


def collapsed(run: Run, _: Run | None = None) -> float:
    """1 where the last quarter is more than ten points below the run's best."""
    return float(max(run.values) - run.late > 0.1)


METRICS: dict[str, Metric] = {
    "curve mean": lambda run, _: 100 * fmean(run.values),
    "last quarter": lambda run, _: 100 * run.late,
    "final": lambda run, _: 100 * run.values[-1],
    "best": lambda run, _: 100 * max(run.values),
    "fewer batches to goal": speedup,
    "collapses": collapsed,
    "uses": lambda run, _: fmean(use_counts(run.rows)),
}


def values(runs: Runs, arm: str, metric: str) -> dict[int, float]:
    """By seed; of those in which single use ran too, where the metric needs it."""
    single = runs.get("single_use", {})
    needs = metric == "fewer batches to goal"
    return {
        seed: METRICS[metric](run, single.get(seed))
        for seed, run in sorted(runs[arm].items())
        if not needs or seed in single
    }


@dataclass(frozen=True)
class Difference:
    """Of two arms, paired by seed."""

    mean: float
    t_interval: tuple[float, float]  # 95 %, Student's t
    bootstrap: tuple[float, float]  # 95 %, BCa
    p: float  # paired t-test, two-sided
    wins: int
    n: int

    def __str__(self) -> str:
        (a, b), (c, d) = self.t_interval, self.bootstrap
        return (
            f"{self.mean:+.2f} | {a:+.2f} to {b:+.2f} | {c:+.2f} to {d:+.2f} | "
            f"{self.wins} of {self.n} | {self.p:.3f}"
        )


def difference(runs: Runs, arm: str, other: str, metric: str, log: bool = False) -> Difference:
    """`arm` minus `other` over the seeds that both have; of logarithms if asked."""
    mine, theirs = (values(runs, name, metric) for name in (arm, other))
    f = math.log if log else float
    d = np.array([f(mine[s]) - f(theirs[s]) for s in sorted(set(mine) & set(theirs))])
    if len(d) < 2 or not d.std():
        nothing = (math.nan, math.nan)
        return Difference(float(d.mean()), nothing, nothing, math.nan, int((d > 0).sum()), len(d))
    tested = stats.ttest_1samp(d, 0.0)
    interval = tested.confidence_interval(0.95)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # BCa of few values may have nothing to correct by
        drawn = stats.bootstrap(
            (d,), np.mean, n_resamples=10_000, method="BCa", rng=np.random.default_rng(0)
        ).confidence_interval
    return Difference(
        float(d.mean()), (float(interval.low), float(interval.high)),
        (float(drawn.low), float(drawn.high)), float(tested.pvalue), int((d > 0).sum()), len(d),
    )  # fmt: skip


def holm(p: dict[str, float]) -> dict[str, float]:
    """Adjusted p-values (Holm, 1979): name -> the level at which it would be rejected."""
    adjusted, most = {}, 0.0
    for rank, name in enumerate(sorted(p, key=lambda name: p[name])):
        most = max(most, min(1.0, (len(p) - rank) * p[name]))
        adjusted[name] = most
    return adjusted


# Hypothesis -> (arm, other, metric, whether logarithms are compared).
HYPOTHESES: dict[str, list[tuple[str, str, str, bool]]] = {
    "H1": [("dgg", "single_use", "fewer batches to goal", True)],
    "H2": [("dgg", "single_use", "last quarter", False)],
    "H3": [("dgg", f"fixed_k{k}", "curve mean", False) for k in (2, 3, 4, 8)],
    "H4": [("dgg", "shuffled", "curve mean", False),
           ("dgg_squared", "shuffled_squared", "curve mean", False)],
    "H5": [("dgg", other, "curve mean", False) for other in ("global_norm", "middle_norm")],
    "H6": [("dgg", other, "curve mean", False) for other in ("kl", "chi2")],
    "H7": [("gain", other, "curve mean", False) for other in ("shuffled_gain", "dgg")],
    "H8": [("dgg", "single_use", "curve mean", False)],
}  # fmt: skip


# -- tables ---------------------------------------------------------------------------------------


def arms_table(runs: Runs, seeds: Iterable[int] | None = None) -> Iterator[str]:
    """One line an arm: mean ± standard deviation over the seeds."""
    yield "| arm | seeds | " + " | ".join(METRICS) + " |"
    yield "|---" * (len(METRICS) + 2) + "|"
    for arm in sorted(runs, key=lambda arm: -fmean(values(runs, arm, "curve mean").values())):
        cells = []
        for metric in METRICS:
            found = list(values(runs, arm, metric).values())
            if metric == "collapses":
                cells.append(f"{sum(found):.0f}")
            elif not found:
                cells.append("-")
            else:
                spread = f" ± {stdev(found):.1f}" if len(found) > 1 and metric != "uses" else ""
                cells.append(f"{fmean(found):.{2 if metric in CLOSE else 1}f}{spread}")
        yield f"| {label(arm)} | {len(runs[arm])} | " + " | ".join(cells) + " |"


CLOSE = ("uses", "fewer batches to goal")


def verdicts_table(runs: Runs) -> Iterator[str]:
    """Every comparison of the hypotheses that the record has both arms for."""
    found = {
        f"{name}: {label(arm)} − {label(other)}, {'log ' * log}{metric}":
            difference(runs, arm, other, metric, log)
        for name, comparisons in HYPOTHESES.items()
        for arm, other, metric, log in comparisons
        if arm in runs and other in runs
    }  # fmt: skip
    adjusted = holm({name: d.p for name, d in found.items() if not math.isnan(d.p)})
    yield "| comparison | mean | 95 % (t) | 95 % (BCa) | seeds above 0 | p | Holm |"
    yield "|---|---|---|---|---|---|---|"
    for name, of in found.items():
        yield f"| {name} | {of} | {adjusted.get(name, math.nan):.3f} |"


def label(arm: str) -> str:
    """As in the plots of a run; the learning rate of a grid's arm after it."""
    name, *rest = arm.split("@")
    return " @ ".join([LABELS.get(name) or style(name)[0], *rest])


LABELS = {
    "fixed_k2": "Fixed K=2", "fixed_k3": "Fixed K=3", "shuffled": "DGG's counts, shuffled",
    "dgg_squared": "DGG, squared norm", "shuffled_squared": "its counts, shuffled",
    "gain": "Gain gate", "shuffled_gain": "Gain gate's counts, shuffled", "chi2": "χ² stop",
    "shuffled_kl": "KL stop's counts, shuffled", "middle_norm": "Middle-layer gate",
    "skip_step": "SkipStep, K=8", "zclip": "ZClip, K=8", "random": "Random stop (DGG's mean)",
}  # fmt: skip


def best_rates(runs: Runs) -> dict[str, str]:
    """Arm -> the value of the grid with the highest mean curve; of two alike the smaller."""
    found: dict[str, dict[str, float]] = {}
    for arm in runs:
        name, _, value = arm.partition("@")
        found.setdefault(name, {})[value] = fmean(values(runs, arm, "curve mean").values())
    return {name: max(sorted(of, key=float), key=of.__getitem__) for name, of in found.items()}


# -- figures --------------------------------------------------------------------------------------


def curves(runs: Runs, arms: Sequence[str]) -> Any:
    """Held-out accuracy against rollout batches: mean over the seeds, ± one standard error."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5), dpi=110, layout="constrained")
    ax = figure.subplots()
    for i, arm in enumerate(a for a in arms if a in runs):
        batches = [n for n, _ in next(iter(runs[arm].values())).curve]
        grid = 100 * np.array([run.values for run in runs[arm].values()])
        mean, error = grid.mean(0), grid.std(0, ddof=1) / len(grid) ** 0.5
        _, colour, dash = style(arm)
        colour = colour if arm in STYLED else f"C{i}"
        ax.plot(batches, mean, dash, color=colour, label=label(arm))
        ax.fill_between(batches, mean - error, mean + error, color=colour, alpha=0.15, linewidth=0)
    ax.set(xlabel="rollout batches", ylabel="held-out accuracy (%)")
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(frameon=False, loc="lower right")
    return figure


STYLED = ("single_use", "fixed_k4", "fixed_k8", "dgg", "random", "kl", "global_norm")


def intervals(runs: Runs) -> Any:
    """Every comparison in points of the curve mean, with both intervals."""
    from matplotlib.figure import Figure

    rows = [
        (f"{name}: {label(arm)} − {label(other)}", difference(runs, arm, other, "curve mean"))
        for name, comparisons in HYPOTHESES.items()
        for arm, other, metric, _ in comparisons
        if metric == "curve mean" and arm in runs and other in runs
    ]
    figure = Figure(figsize=(9, 0.9 + 0.36 * len(rows)), dpi=110, layout="constrained")
    ax = figure.subplots()
    for y, (_, d) in enumerate(rows):
        ax.plot(d.t_interval, (y, y), color="#0072B2", linewidth=1.2)
        ax.plot(d.bootstrap, (y, y), color="#0072B2", linewidth=4, alpha=0.35)
        ax.plot(d.mean, y, "o", color="#0072B2")
    ax.axvline(0, color="#777777", linewidth=0.8)
    ax.set_yticks(range(len(rows)), [name for name, _ in rows])
    ax.invert_yaxis()
    ax.set_xlabel("difference of the curve mean, points (thin: 95 % by t, thick: by BCa bootstrap)")
    ax.spines[["top", "right"]].set_visible(False)
    return figure


FIGURES: dict[str, Callable[[Runs], Any]] = {
    "curves": lambda runs: curves(
        runs, ("single_use", "fixed_k2", "fixed_k4", "fixed_k8", "dgg", "shuffled", "gain", "kl")
    ),
    "intervals": intervals,
}


def report(name: str) -> None:
    """Print the tables, write them beside the record, and draw the figures."""
    runs, about = read(name)
    tuned = any("@" in arm for arm in runs)
    lines = [f"Record {name}: commits {', '.join(str(a['commit'])[:12] for a in about)}.", ""]
    lines += arms_table(runs)
    if tuned:
        lines += [
            "",
            "Best by curve mean: "
            + ", ".join(f"{label(arm)} {rate}" for arm, rate in best_rates(runs).items()),
        ]
    else:
        lines += ["", *verdicts_table(runs)]
        for figure, draw in FIGURES.items():
            path = common.ROOT.parent / "docs" / "images" / f"evidence_{name}_{figure}.png"
            draw(runs).savefig(path, metadata={"Software": None})
            print(path)
    (FOLDER / f"{name}.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


def main() -> None:
    """Record or report."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    recorded = commands.add_parser("record", help="raw logs of run directories into one file")
    recorded.add_argument("folders", nargs="+", type=Path)
    recorded.add_argument("--save", required=True, metavar="NAME")
    commands.add_parser("report", help="tables and figures of a record").add_argument("name")
    args = parser.parse_args()
    if args.command == "record":
        print(record(args.folders, args.save))
    else:
        report(args.name)


if __name__ == "__main__":
    main()
