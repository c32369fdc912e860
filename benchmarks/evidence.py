"""What the runs of docs/evidence.md came to: raw record, tables, verdicts, figures.

    python -m python_trainer compare --config benchmarks/evidence/main.toml --out runs/main
    python -m benchmarks.evidence record runs/main --save main     # raw logs, compressed
    python -m benchmarks.evidence report main                      # tables and figures from them

Several run directories (some seeds each, say, on several machines) become one record.
"""

from __future__ import annotations

import argparse
import itertools
import json
import lzma
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import numpy as np
from scipy import stats

from python_trainer.files import decoded, per_batch, read_metrics, updates, use_counts
from python_trainer.plots import draw_curves, panels, smooth, style
from python_trainer.results import last_quarter

from . import common

FOLDER = common.RESULTS / "evidence"
# Of an update, what the tables and figures need; the rest is in the run directory's own log.
KEPT = (
    "type", "step", "rollouts", "updates_applied", "reward", "loss", "kl", "entropy", "clip_ratio",
    "grad_norm", "gate/energy", "gate/z", "gate/chi2", "gate/shut", "gate/reuse", "dwd/lm_head",
    "dwd/middle", "accuracy", "accuracies",
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
        return last_quarter(self.values)

    @cached_property
    def effects(self) -> dict[int, list[tuple[float, dict[str, float]]]]:
        """Use index (from 2) -> change of accuracy by each update, and what was known before it."""
        after = {r["rollouts"]: r["accuracies"] for r in self.rows if r["type"] == "effect"}
        found: dict[int, list[tuple[float, dict[str, float]]]] = {}
        for last, row in itertools.pairwise(updates(self.rows)):
            if (use := row["gate/reuse"]) > 1:
                seen = after[row["rollouts"]]
                told = {name: signal(row, last) for name, signal in AHEAD.items()}
                found.setdefault(use, []).append((seen[use] - seen[use - 1], told))
        return found

    def reaches(self, goal: float) -> int | None:
        """Rollout batches at the first evaluation at or above it."""
        return next((n for n, accuracy in self.curve if accuracy >= goal), None)


Runs = dict[str, dict[int, Run]]  # arm -> seed -> run


# -- record ---------------------------------------------------------------------------------------


def record(folders: Sequence[Path], name: str) -> Path:
    """Write the finished runs of these directories as one compressed file of rows."""
    path = FOLDER / f"{name}.jsonl.xz"
    path.parent.mkdir(parents=True, exist_ok=True)
    with lzma.open(path, "wt", preset=6) as file:
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
    """The runs of a record, and what each of its directories says of itself."""
    about, logs, rows = [], [], []
    with lzma.open(FOLDER / f"{name}.jsonl.xz", "rt") as file:
        for row in map(decoded, file):
            if row["type"] == "about":
                about.append(row)
            elif row["type"] == "run":
                rows = []
                logs.append((row["arm"], row["seed"], rows))
            else:
                rows.append(row)
    runs: Runs = {}
    for arm, seed, of in logs:
        runs.setdefault(arm, {})[seed] = Run(arm, seed, of)
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


GOAL = "fewer batches to goal"  # which needs single use beside it
METRICS: dict[str, Metric] = {
    "curve mean": lambda run, _: 100 * fmean(run.values),
    "last quarter": lambda run, _: 100 * run.late,
    "final": lambda run, _: 100 * run.values[-1],
    "best": lambda run, _: 100 * max(run.values),
    GOAL: speedup,
    "collapses": collapsed,
    "uses": lambda run, _: fmean(use_counts(run.rows)),
}


def values(runs: Runs, arm: str, metric: str) -> dict[int, float]:
    """By seed; of those in which single use ran too, where the metric needs it."""
    single = runs.get("single_use", {})
    return {
        seed: METRICS[metric](run, single.get(seed))
        for seed, run in sorted(runs[arm].items())
        if metric != GOAL or seed in single
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
        if math.isnan(self.p):
            return f"{self.mean:+.2f} | - | - | {self.wins} of {self.n} | -"
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
    "H1": [("dgg", "single_use", GOAL, True)],
    "H2": [("dgg", "single_use", "last quarter", False)],
    "H3": [("dgg", f"fixed_k{k}", "curve mean", False) for k in (2, 3, 4, 8)],
    "H4": [("dgg", "shuffled", "curve mean", False),
           ("dgg_squared", "shuffled_squared", "curve mean", False)],
    "H5": [("dgg", other, "curve mean", False) for other in ("global_norm", "middle_norm")],
    "H6": [("dgg", other, "curve mean", False) for other in ("kl", "chi2")],
    "H7": [("gain", other, "curve mean", False) for other in ("shuffled_gain", "dgg")],
    "H8": [("dgg", "single_use", "curve mean", False)],
    "H9": [("tempered", "dgg", "curve mean", False)],
}  # fmt: skip


# A signal of an update, from its row and that of the use before it; high is taken to be bad.
AHEAD: dict[str, Callable[[dict[str, Any], dict[str, Any]], float]] = {
    "loss, increment": lambda row, last: row["loss"] - last["loss"],
    "lm_head norm, increment": lambda row, last: row["gate/energy"] - last["gate/energy"],
    "lm_head norm squared, increment":
        lambda row, last: row["gate/energy"] ** 2 - last["gate/energy"] ** 2,
    "lm_head norm": lambda row, last: row["gate/energy"],
    "global norm, increment": lambda row, last: row["grad_norm"] - last["grad_norm"],
    "global norm": lambda row, last: row["grad_norm"],
    "KL": lambda row, last: row["kl"],
    "χ²": lambda row, last: row["gate/chi2"],
    "clip share": lambda row, last: row["clip_ratio"],
    "entropy, low": lambda row, last: -row["entropy"],
}  # fmt: skip


def auc(runs: Iterable[Run], name: str) -> float:
    """How often a harmful update has the higher signal, in pairs of one run and use index."""
    won, pairs = 0.0, 0
    for run in runs:
        for of in run.effects.values():
            harmful = [told[name] for effect, told in of if effect < 0]
            others = [told[name] for effect, told in of if effect >= 0]
            if harmful and others:
                won += float(stats.mannwhitneyu(harmful, others).statistic)
                pairs += len(harmful) * len(others)
    return won / pairs if pairs else math.nan


def effects_tables(runs: Runs) -> Iterator[str]:
    """Share of harmful updates by use; AUC of every signal; of the arms that tried all uses."""
    arms = [arm for arm in runs if any(r["type"] == "effect" for r in _any(runs[arm]).rows)]
    if not arms:
        return
    uses = sorted(_any(runs[arms[0]]).effects)
    yield "| harmful updates at use | " + " | ".join(map(str, uses)) + " |"
    yield "|---" * (len(uses) + 1) + "|"
    for arm in arms:
        shares = [
            fmean(effect < 0 for run in runs[arm].values() for effect, _ in run.effects[use])
            for use in uses
        ]
        yield f"| {label(arm)} | " + " | ".join(f"{share:.0%}" for share in shares) + " |"
    yield ""
    yield "| AUC within a use index | " + " | ".join(label(arm) for arm in arms) + " |"
    yield "|---" * (len(arms) + 1) + "|"
    for name in AHEAD:
        found = [auc(runs[arm].values(), name) for arm in arms]
        yield f"| {name} | " + " | ".join(f"{value:.3f}" for value in found) + " |"


def _any(of: dict[int, Run]) -> Run:
    return next(iter(of.values()))


# -- tables ---------------------------------------------------------------------------------------


def arms_table(runs: Runs) -> Iterator[str]:
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


CLOSE = ("uses", GOAL)  # shown to two digits


Found = dict[tuple[str, str, str, str, bool], Difference]  # hypothesis and what it compares


def verdicts(runs: Runs) -> Found:
    """Every comparison of the hypotheses that the record has both arms for."""
    return {
        (name, arm, other, metric, log): difference(runs, arm, other, metric, log)
        for name, comparisons in HYPOTHESES.items()
        for arm, other, metric, log in comparisons
        if arm in runs and other in runs
    }


def verdicts_table(found: Found) -> Iterator[str]:
    """One line a comparison, p-values adjusted over all of them."""
    named = {
        f"{name}: {label(arm)} − {label(other)}, {'log ' * log}{metric}": of
        for (name, arm, other, metric, log), of in found.items()
    }
    adjusted = holm({name: d.p for name, d in named.items() if not math.isnan(d.p)})
    yield "| comparison | mean | 95 % (t) | 95 % (BCa) | seeds above 0 | p | Holm |"
    yield "|---|---|---|---|---|---|---|"
    for name, of in named.items():
        level = f"{adjusted[name]:.3f}" if name in adjusted else "-"
        yield f"| {name} | {of} | {level} |"


def label(arm: str) -> str:
    return style(arm)[0]


def best_rates(runs: Runs) -> dict[str, str]:
    """Arm -> the value of the grid with the highest mean curve; of two alike the smaller."""
    found: dict[str, dict[str, float]] = {}
    for arm in runs:
        name, _, value = arm.partition("@")
        found.setdefault(name, {})[value] = fmean(values(runs, arm, "curve mean").values())
    return {name: max(sorted(of, key=float), key=of.__getitem__) for name, of in found.items()}


# -- figures --------------------------------------------------------------------------------------


def curves(runs: Runs, found: Found) -> Any:
    """Held-out accuracy against rollout batches, and uses of a batch over time."""
    figure, axes = panels(1, 2, 5, 13)
    left, right = axes[0]
    for arm in ("single_use", "fixed_k2", "fixed_k4", "fixed_k8", "dgg", "shuffled", "gain", "kl"):
        of = list(runs.get(arm, {}).values())
        if not of:
            continue
        draw_curves(left, arm, [{n: 100 * a for n, a in run.curve} for run in of])
        if arm in ("dgg", "gain", "kl"):
            counts = [dict(enumerate(use_counts(run.rows), 1)) for run in of]
            draw_curves(right, arm, [smooth(counted, 15) for counted in counts])
    left.set(xlabel="rollout batches", ylabel="held-out accuracy (%)")
    right.set(xlabel="rollout batches", ylabel="uses of a batch (moving mean of 15)")
    left.legend(frameon=False, loc="lower right")
    return figure


def intervals(runs: Runs, found: Found) -> Any:
    """Every comparison in points of the curve mean, with both intervals."""
    rows = [
        (f"{name}: {label(arm)} − {label(other)}", of)
        for (name, arm, other, metric, _), of in found.items()
        if metric == "curve mean"
    ]
    figure, axes = panels(1, 1, 0.9 + 0.36 * len(rows), 9)
    ax = axes[0, 0]
    for y, (_, d) in enumerate(rows):
        ax.plot(d.t_interval, (y, y), color="#0072B2", linewidth=1.2)
        ax.plot(d.bootstrap, (y, y), color="#0072B2", linewidth=4, alpha=0.35)
        ax.plot(d.mean, y, "o", color="#0072B2")
    ax.axvline(0, color="#777777", linewidth=0.8)
    ax.set_yticks(range(len(rows)), [name for name, _ in rows])
    ax.invert_yaxis()
    ax.set_xlabel("difference of the curve mean, points (thin: 95 % by t, thick: by BCa bootstrap)")
    return figure


# What the paper holds side by side before a collapse; the lm_head's norm and increment are its own.
SIGNALS = {
    "gate/energy": "lm_head gradient norm", "grad_norm": "global gradient norm",
    "kl": "KL(old ‖ new), nats a token", "clip_ratio": "share of tokens clipped",
    "entropy": "entropy, nats a token", "dwd/lm_head": "step of the lm_head, relative",
    "dwd/middle": "step of a middle layer, relative",
}  # fmt: skip
AROUND = 24  # rollout batches before and after


def collapse(run: Run) -> int | None:
    """Rollout batches at the largest fall between two evaluations, if it is five points or more."""
    falls = [(a - b, n) for (_, a), (n, b) in itertools.pairwise(run.curve)]
    worst, at = max(falls)
    return at if worst >= 0.05 and AROUND <= at <= run.curve[-1][0] - AROUND else None


def signals(runs: Runs, found: Found) -> Any:
    """Signals of fixed re-use around its falls, over the runs' own medians; None if it has none."""
    fixed = runs.get("fixed_k8", {})
    falls = {seed: at for seed, run in fixed.items() if (at := collapse(run))}
    if not falls:
        return None
    figure, axes = panels(2, 4, 6.4, 14)
    place = np.arange(-AROUND, AROUND + 1)
    first, *others = axes.flat
    for ax, (name, title) in zip(others, SIGNALS.items(), strict=True):
        for which, colour in (("first use", "#777777"), ("last use", "#D55E00")):
            lines = [_around(fixed[seed], name, which, at) for seed, at in falls.items()]
            ax.plot(place, np.nanmedian(lines, axis=0), color=colour, label=which)
            low, high = np.nanpercentile(lines, (20, 80), axis=0)
            ax.fill_between(place, low, high, color=colour, alpha=0.15, linewidth=0)
        ax.axvline(0, color="#000000", linewidth=0.8, linestyle=":")
        ax.set_title(title, fontsize=10)
    for seed, at in falls.items():
        near = [(n - at, 100 * a) for n, a in fixed[seed].curve if abs(n - at) <= AROUND]
        first.plot(*zip(*near, strict=True), color="#999999", linewidth=0.8)
    first.axvline(0, color="#000000", linewidth=0.8, linestyle=":")
    first.set_title(f"held-out accuracy (%), {len(falls)} falls", fontsize=10)
    others[0].legend(frameon=False)
    figure.supxlabel("rollout batches from the evaluation that shows the fall", fontsize=10)
    return figure


def _around(run: Run, name: str, which: str, at: int) -> list[float]:
    """A signal's first or last use in every batch around `at`, over its median in the whole run."""
    by_batch = per_batch(updates(run.rows), name)
    use = 0 if which == "first use" else -1
    middle = np.nanmedian([of[use] for of in by_batch.values()])
    scale = 1.0 if name in ("kl", "clip_ratio", "entropy") else middle
    return [
        by_batch[n][use] / scale if n in by_batch else math.nan
        for n in range(at - AROUND, at + AROUND + 1)
    ]


FIGURES: dict[str, Callable[[Runs, Found], Any]] = {
    "curves": curves,
    "intervals": intervals,
    "signals": signals,
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
        found = verdicts(runs)
        lines += ["", *verdicts_table(found), "", *effects_tables(runs)]
        for title, draw in FIGURES.items():
            path = common.ROOT.parent / "docs" / "images" / f"evidence_{name}_{title}.png"
            if (figure := draw(runs, found)) is not None:
                figure.savefig(path, metadata={"Software": None})
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
