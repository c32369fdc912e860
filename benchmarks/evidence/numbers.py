"""The numbers that are taken of a record: metrics, paired differences, what tells harm ahead."""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import numpy as np
from scipy import stats

from python_trainer.files import updates, use_counts

from .record import Run, Runs

Metric = Callable[[Run, Run | None], float]  # of a run, and single use in the same seed


FORWARD = 1 / 3  # of an update's time: a backward takes about twice as long as its forward


def updates_paid(run: Run, batches: int) -> float:
    """Updates computed for the first so many batches; those refused before a backward cost less."""
    return sum(
        FORWARD if row["gate/shut"] and math.isnan(row["grad_norm"]) else 1.0
        for row in updates(run.rows)
        if row["rollouts"] <= batches
    )


def reached(run: Run, goal: float) -> int:
    """Rollout batches until it is as accurate; all of them if it never is."""
    batches = run.reaches(goal)
    return max(1, run.curve[-1][0] if batches is None else batches)


def speedup(run: Run, single: Run | None, sampling: float = 1.0) -> float:
    """How many times sooner than single use itself it reaches single use's late accuracy.

    Args:
        run: the arm.
        single: single use in the same seed.
        sampling: its share of the time of a single-use step; 1: batches are what is counted.
    """
    assert single is not None

    def time(of: Run) -> float:
        batches = reached(of, single.late)
        return sampling * batches + (1 - sampling) * updates_paid(of, batches)

    return time(single) / time(run)


def collapsed(run: Run, _: Run | None = None) -> float:
    """1 where the last quarter is more than ten points below the run's best."""
    return float(max(run.values) - run.late > 0.1)


GOAL, SOONER = "fewer batches to goal", "sooner at 80 % sampling"  # need single use beside them
METRICS: dict[str, Metric] = {
    "curve mean": lambda run, _: 100 * fmean(run.values),
    "last quarter": lambda run, _: 100 * run.late,
    "final": lambda run, _: 100 * run.values[-1],
    "best": lambda run, _: 100 * max(run.values),
    GOAL: speedup,
    SOONER: lambda run, single: speedup(run, single, 0.8),
    "collapses": collapsed,
    "uses": lambda run, _: fmean(use_counts(run.rows)),
}


def values(runs: Runs, arm: str, metric: str) -> dict[int, float]:
    """By seed; of those in which single use ran too, where the metric needs it."""
    single = runs.get("single_use", {})
    return {
        seed: METRICS[metric](run, single.get(seed))
        for seed, run in sorted(runs[arm].items())
        if metric not in (GOAL, SOONER) or seed in single
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
    "exploratory": [
        *((arm, f"local_{arm}", "curve mean", False) for arm in ("dgg", "gain")),
        *((arm, other, "curve mean", False) for arm in ("gain_kl", "log_ratio")
          for other in ("gain", "kl", "dgg")),
        ("log_ratio", "shuffled_log_ratio", "curve mean", False),
        *((f"{arm}_w32", other, "curve mean", False) for arm in ("gain", "gain_kl")
          for other in (arm, "dgg")),
        *(("falling", other, "curve mean", False)
          for other in ("gain", "fixed_k8", "fixed_k4", "dgg", "rising")),
        *((arm, "k8_t05", "curve mean", False)  # of variants.toml
          for arm in ("k8_t01", "k8_t10", "k8_t20", "k4_t05", "level", "either", "ema", "shut_in",
                      "squared_shut_in")),
        *((arm, other, "curve mean", False) for arm in ("k8_t10", "squared_shut_in")
          for other in ("dgg", "gain", "fixed_k8", "fixed_k4")),
    ],
}  # fmt: skip


Found = dict[tuple[str, str, str, str, bool], Difference]  # hypothesis and what it compares


def verdicts(runs: Runs) -> Found:
    """Every comparison of the hypotheses that the record has both arms for."""
    return {
        (name, arm, other, metric, log): difference(runs, arm, other, metric, log)
        for name, comparisons in HYPOTHESES.items()
        for arm, other, metric, log in comparisons
        if arm in runs and other in runs
    }


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
    "log-ratio of negative advantages, low": lambda row, last: -row["log_ratio/negative"],
    "log-ratio of negative advantages, low increment":
        lambda row, last: last["log_ratio/negative"] - row["log_ratio/negative"],
    "log-ratio of positive advantages, low": lambda row, last: -row["log_ratio/positive"],
    "log-ratio of positive advantages, low increment":
        lambda row, last: last["log_ratio/positive"] - row["log_ratio/positive"],
}  # fmt: skip
# Those that `oracle` takes of gradients of its own; older records have none.
OF_GRADIENTS: dict[str, Callable[[dict[str, Any], dict[str, Any]], float]] = {
    "lm_head norm without the clip": lambda row, last: row["unclipped"],
    "lm_head norm without the clip, increment":
        lambda row, last: row["unclipped"] - last["unclipped"],
    "cosine with the first use's gradient, low": lambda row, last: -row["with_first"],
    "cosine of two halves of the batch, low": lambda row, last: -row["of_halves"],
}  # fmt: skip


# Use index (from 2) -> change of accuracy by each update, and what was known before it.
Effects = dict[int, list[tuple[float, dict[str, float]]]]


def effects(run: Run) -> Effects:
    """Of a run that recorded them (`oracle`). Of several mini-batches, the last tells of a pass."""
    tried = {row["rollouts"]: row for row in run.rows if row["type"] == "effect"}
    passes = {}
    for row in updates(run.rows):
        batch, use = row["rollouts"], row["gate/reuse"]
        signals = tried[batch].get("signals")
        passes[batch, use] = row | (signals[use - 1] if signals else {})
    found: Effects = {}
    for last, row in itertools.pairwise(passes.values()):
        if (use := row["gate/reuse"]) > 1:
            seen = tried[row["rollouts"]]["accuracies"]
            known = AHEAD | OF_GRADIENTS if "of_halves" in row else AHEAD
            told = {name: signal(row, last) for name, signal in known.items()}
            found.setdefault(use, []).append((seen[use] - seen[use - 1], told))
    return found


def auc(seen: Iterable[Effects], name: str) -> float:
    """How often a harmful update has the higher signal, in pairs of one run and use index."""
    return _auc(
        (np.array([told[name] for _, told in of]), _harmful(of))
        for run in seen
        for of in run.values()
    )


def combined_auc(seen: list[Effects]) -> float:
    """The same of the linear combination of all signals that the *other* runs are best told by.

    Signals are standardised within a run and use index.
    """
    runs = [[(_standardised(of), _harmful(of)) for of in run.values()] for run in seen]
    cases = []
    for left_out in runs if len(runs) > 1 else ():
        of_others = [case for run in runs if run is not left_out for case in run]
        signals, harmful = (np.concatenate(column) for column in zip(*of_others, strict=True))
        weights, *_ = np.linalg.lstsq(signals, harmful - harmful.mean())
        cases += [(values @ weights, told) for values, told in left_out]
    return _auc(cases)


def _harmful(of: list[tuple[float, dict[str, float]]]) -> np.ndarray:
    return np.array([effect < 0 for effect, _ in of])


def _standardised(of: list[tuple[float, dict[str, float]]]) -> np.ndarray:
    x = np.array([list(told.values()) for _, told in of])
    return (x - x.mean(0)) / np.where(x.std(0) > 0, x.std(0), 1.0)


def _auc(cases: Iterable[tuple[np.ndarray, np.ndarray]]) -> float:
    """Of (scores, which are harmful), each compared within itself alone."""
    won, pairs = 0.0, 0
    for scores, harmful in cases:
        if harmful.any() and not harmful.all():
            won += float(stats.mannwhitneyu(scores[harmful], scores[~harmful]).statistic)
            pairs += int(harmful.sum() * (~harmful).sum())
    return won / pairs if pairs else math.nan
