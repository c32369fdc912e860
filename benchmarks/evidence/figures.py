"""The figures of a record of the evidence; each is None where the record has not what it shows."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np

from python_trainer.config import TrainConfig
from python_trainer.files import per_batch, updates, use_counts
from python_trainer.plots import draw_curves, panels, smooth

from .numbers import Found, speedup, values
from .record import Run, Runs, label


def curves(runs: Runs) -> Any:
    """Held-out accuracy against rollout batches, and uses of a batch over time."""
    if "single_use" not in runs:
        return None
    figure, axes = panels(1, 2, 5, 13)
    left, right = axes[0]
    drawn = ("single_use", "fixed_k2", "fixed_k4", "fixed_k8", "dgg", "shuffled", "gain", "kl",
             "falling", "rising")  # fmt: skip
    for arm in drawn:
        of = list(runs.get(arm, {}).values())
        if not of:
            continue
        draw_curves(left, arm, [{n: 100 * a for n, a in run.curve} for run in of])
        if arm in ("dgg", "gain", "kl", "falling", "rising"):
            counts = [dict(enumerate(use_counts(run.rows), 1)) for run in of]
            draw_curves(right, arm, [smooth(counted, 15) for counted in counts])
    left.set(xlabel="rollout batches", ylabel="held-out accuracy (%)")
    right.set(xlabel="rollout batches", ylabel="uses of a batch (moving mean of 15)")
    left.legend(frameon=False, loc="lower right")
    return figure


def intervals(found: Found) -> Any:
    """Every comparison in points of the curve mean, with both intervals."""
    rows = [
        (f"{name}: {label(arm)} − {label(other)}", of)
        for (name, arm, other, metric, _), of in found.items()
        if metric == "curve mean"
    ]
    if not rows:
        return None
    figure, axes = panels(1, 1, 0.9 + 0.36 * len(rows), 9)
    ax = axes[0, 0]
    for y, (_, d) in enumerate(rows):
        ax.plot(d.t_interval, (y, y), color="#0072B2", linewidth=1.2)
        ax.plot(d.bootstrap, (y, y), color="#0072B2", linewidth=4, alpha=0.35)
        ax.plot(d.mean, y, "o", color="#0072B2")
    ax.axvline(0, color="#777777", linewidth=0.8)
    ax.set_yticks(range(len(rows)), [name for name, _ in rows])
    ax.invert_yaxis()
    ax.set_xlabel("difference of the curve mean, points\n(95 %: thin by t, thick by BCa bootstrap)")
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


def signals(runs: Runs) -> Any:
    """Signals of fixed re-use around its falls, over the runs' own medians; None if it has none."""
    fixed = runs.get("fixed_k8", {}) if "single_use" in runs else {}
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


def growth(runs: Runs) -> Any:
    """The head's gradient from use to use, and accuracy, with and without the clip of the ratio."""
    chosen = {"fixed_k8": ("with the clip", "#0072B2"), "k8_no_ratio_clip": ("without", "#D55E00")}
    if not set(chosen) <= set(runs):
        return None
    figure, axes = panels(1, 2, 4.2, 11)
    left, right = axes[0]
    for arm, (title, colour) in chosen.items():
        every = [
            norms
            for run in runs[arm].values()
            for norms in per_batch(updates(run.rows), "gate/energy").values()
            if norms[0] > 0
        ]
        ratios = np.array(every)
        ratios /= ratios[:, :1]
        place = range(1, ratios.shape[1] + 1)
        left.plot(place, np.median(ratios, axis=0), color=colour, label=f"{title}: median")
        for level, dash in ((95, "--"), (99, ":")):
            tail = np.percentile(ratios, level, axis=0)
            left.plot(place, tail, dash, color=colour, label=f"{level} %")
        run = next(iter(runs[arm].values()))
        right.plot(*zip(*((n, 100 * a) for n, a in run.curve), strict=True), color=colour)
    left.set_yscale("log")
    left.set(xlabel="use of the batch", ylabel="lm_head gradient norm, first use = 1")
    left.legend(frameon=False, ncols=2, fontsize=9)
    right.set(xlabel="rollout batches", ylabel="held-out accuracy (%)")
    return figure


def time(runs: Runs) -> Any:
    """Times sooner to the goal, against what share of a single-use step sampling takes."""
    if "single_use" not in runs:
        return None
    figure, axes = panels(1, 1, 5, 8)
    ax, shares = axes[0, 0], [i / 40 for i in range(41)]
    for arm in ("single_use", "fixed_k2", "fixed_k4", "fixed_k8", "dgg", "gain", "kl", "chi2"):
        pairs = [(run, runs["single_use"].get(seed)) for seed, run in runs.get(arm, {}).items()]
        found = [
            {100 * share: math.log(speedup(run, single, share)) for share in shares}
            for run, single in pairs
            if single is not None
        ]
        if found:
            draw_curves(ax, arm, found)
    ax.set(xlabel="sampling's share of the time of a single-use step (%)",
           ylabel="times sooner to single use's late accuracy, in time")  # fmt: skip
    ticks = (0.25, 0.5, 1, 1.5, 2, 3, 4)
    ax.set_yticks([math.log(tick) for tick in ticks], [f"{tick:g}x" for tick in ticks])
    ax.axvline(80, color="#777777", linewidth=0.8, linestyle=":")
    ax.legend(frameon=False, ncols=2)
    return figure


def sensitivity(runs: Runs, configs: dict[str, Any]) -> Any:
    """Curve mean and uses over the thresholds of the paper's gate, a line for every K."""
    lines: dict[int, list[tuple[float, str]]] = {}
    for arm in runs:
        config = TrainConfig(**configs[arm])
        score = config.score
        form = (config.gate, config.gate_statistic, config.gate_average, config.gate_squared)
        if form == ("dgg", "increment", "window", False) and not score.include_shut:
            lines.setdefault(config.num_iterations, []).append((score.threshold, arm))
    if not any(len(of) > 1 for of in lines.values()):
        return None
    figure, axes = panels(1, 2, 4.2, 11)
    for ax, metric in zip(axes[0], ("curve mean", "uses"), strict=True):
        for i, (k, of) in enumerate(sorted(lines.items())):
            found = [list(values(runs, arm, metric).values()) for _, arm in sorted(of)]
            means = [np.mean(v) for v in found]
            errors = [np.std(v, ddof=1) / len(v) ** 0.5 if len(v) > 1 else 0.0 for v in found]
            x = [threshold for threshold, _ in sorted(of)]
            ax.errorbar(x, means, errors, marker="o", capsize=3, color=f"C{i}", label=f"K = {k}")
        ax.set(xlabel="threshold τ, standard deviations", ylabel=metric)
    axes[0, 0].legend(frameon=False)
    return figure
