"""The plots of a run. Colours and dashes tell the arms apart for every reader."""

from __future__ import annotations

import io
import math
from statistics import fmean, stdev
from typing import Any

from .files import Row, per_batch, updates

Logs = dict[str, dict[int, list[Row]]]  # arm -> seed -> rows; nothing in it is empty
Curve = dict[int, float]  # rollout batches -> value

# File name -> title of what a report draws.
PLOTS = {
    "learning": "Accuracy and reward against rollout batches",
    "gate": "What the gates saw",
    "divergence": "Weight divergence per layer",
    "uses": "Updates applied per rollout batch",
}
# The trainer's arms, and those of docs/evidence.md. Okabe and Ito's palette, told apart by
# colour-blind readers; dashes for those who print in grey.
STYLES = {
    "single_use": ("Single use", "#000000", "-"),
    "fixed_k2": ("Fixed K=2", "#E69F00", ":"),
    "fixed_k3": ("Fixed K=3", "#E69F00", "-."),
    "fixed_k4": ("Fixed K=4", "#E69F00", "--"),
    "fixed_k8": ("Fixed K=8", "#D55E00", "-"),
    "dgg": ("DGG", "#0072B2", "-"),
    "dgg_squared": ("DGG, squared norm", "#0072B2", "--"),
    "random": ("Random stop", "#CC79A7", "--"),
    "shuffled": ("DGG's counts, shuffled", "#CC79A7", "-"),
    "local_dgg": ("DGG's counts, shuffled among 16", "#CC79A7", "-"),
    "local_gain": ("Gain gate's counts, shuffled among 16", "#CC79A7", ":"),
    "shuffled_squared": ("DGG's counts, squared norm, shuffled", "#CC79A7", "-."),
    "shuffled_gain": ("Gain gate's counts, shuffled", "#CC79A7", ":"),
    "shuffled_log_ratio": ("Log-ratio gate's counts, shuffled", "#CC79A7", "--"),
    "shuffled_kl": ("KL stop's counts, shuffled", "#CC79A7", ":"),
    "falling": ("Uses 8, 4, 2, 1", "#000000", "-."),
    "rising": ("Uses 1, 2, 4, 8", "#000000", ":"),
    "gain": ("Gain gate", "#009E73", "-"),
    "gain_kl": ("Gain gate and KL stop", "#009E73", "--"),
    "log_ratio": ("Log-ratio gate", "#E69F00", "-"),
    "kl": ("KL stop", "#009E73", "-."),
    "chi2": ("χ² stop", "#009E73", ":"),
    "global_norm": ("Global-norm gate", "#56B4E9", "-."),
    "middle_norm": ("Middle-layer gate", "#56B4E9", ":"),
    "tempered": ("Tempered re-use", "#777777", "-."),
    "skip_step": ("SkipStep", "#777777", "--"),
    "zclip": ("ZClip", "#777777", ":"),
    "oracle": ("Hindsight oracle", "#000000", ":"),
    "all_uses": ("Fixed K=8, effects recorded", "#D55E00", ":"),
}
SIGNALS = {
    "gate/energy": "gradient norm",
    "loss": "loss",
    "log_ratio/negative": "mean log-ratio where\nthe advantage is negative",
}
# Where z goes far, its axis is linear up to 4 and logarithmic beyond.
Z_TICKS = (-1000, -100, -10, -4, -2, 0, 2, 4, 10, 100, 1000)
INK, GRID = "#333333", "#DDDDDD"


def style(arm: str) -> tuple[str, str, str]:
    """(label, colour, dash) of an arm, a grey line for one that has none of its own.

    `arm@value` is the arm of a grid (`compare.plan`).
    """
    name, *values = arm.split("@")
    label, colour, dash = STYLES.get(name, (name, "#777777", "-"))
    return " @ ".join([label, *values]), colour, "--" if values else dash


def panels(rows: int, columns: int, height: float, width: float = 11) -> tuple[Any, Any]:
    """A figure of this size in inches, and its axes [rows, columns]."""
    from matplotlib.figure import Figure  # not pyplot: no display, no global state

    figure = Figure(figsize=(width, height), dpi=110, layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    for ax in axes.flat:
        ax.grid(color=GRID, linewidth=0.6)
        ax.set_axisbelow(True)
        ax.spines[["top", "right"]].set_visible(False)
        ax.tick_params(colors=INK)
    return figure, axes


def png(figure: Any) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def _legend(figure: Any, ax: Any) -> None:
    """One legend below the panels, where it covers no data."""
    handles, labels = ax.get_legend_handles_labels()
    if handles:
        figure.legend(handles, labels, loc="outside lower center", ncols=7, frameon=False)


def _say_seeds(figure: Any, logs: Logs) -> None:
    """Above the panels: what a line and its band are, where there are several seeds."""
    counts = sorted({len(seeds) for seeds in logs.values()})
    if counts[-1] > 1:
        number = " to ".join(str(n) for n in {counts[0]: 0, counts[-1]: 0})
        text = f"lines: mean of {number} seeds; bands: ± one standard error of that mean"
        figure.suptitle(text, fontsize=10, color=INK)


def smooth(curve: Curve, width: int = 9) -> Curve:
    """Centred moving mean over up to `width` finite values."""
    values, means = list(curve.values()), []
    for i in range(len(values)):
        near = [v for v in values[max(0, i - width // 2) : i + width // 2 + 1] if math.isfinite(v)]
        means.append(fmean(near) if near else math.nan)
    return dict(zip(curve, means, strict=True))


def mean_and_error(curves: list[Curve]) -> tuple[Curve, Curve]:
    """Mean of the seeds where all of them have a value, and its standard error (0 for one seed)."""
    shared = [x for x in curves[0] if all(x in curve for curve in curves)]
    means = {x: fmean(curve[x] for curve in curves) for x in shared}
    n = len(curves)
    if n == 1:
        return means, dict.fromkeys(shared, 0.0)
    return means, {x: stdev(curve[x] for curve in curves) / n**0.5 for x in shared}


def draw_curves(ax: Any, arm: str, curves: list[Curve]) -> None:
    """One line of an arm: the mean of its seeds, with a band of ± one standard error."""
    label, colour, dash = style(arm)
    means, errors = mean_and_error(curves)
    ax.plot(list(means), list(means.values()), dash, color=colour, label=label, linewidth=1.8)
    if len(curves) > 1:
        low = [means[x] - errors[x] for x in means]
        high = [means[x] + errors[x] for x in means]
        ax.fill_between(list(means), low, high, color=colour, alpha=0.15, linewidth=0)


def applied(rows: list[Row]) -> list[Row]:
    return [row for row in updates(rows) if not row["gate/shut"]]


def batch_curve(rows: list[Row], key: str, of: Any) -> Curve:
    """`of` (a function of a list) of the values of `key`, by rollout batch."""
    return {batch: of(values) for batch, values in per_batch(rows, key).items()}


def draw_learning(logs: Logs) -> Any:
    """Accuracy and reward; rows of type eval and, of the updates, `rollouts` and `reward`."""
    figure, axes = panels(1, 2, 4.6)
    left, right = axes[0]
    for arm, seeds in logs.items():
        evals = [[row for row in rows if row["type"] == "eval"] for rows in seeds.values()]
        draw_curves(left, arm, [{r["rollouts"]: 100 * r["accuracy"] for r in e} for e in evals])
        first = [batch_curve(updates(rows), "reward", lambda v: v[0]) for rows in seeds.values()]
        draw_curves(right, arm, [smooth(curve) for curve in first])
    left.set(xlabel="rollout batches", ylabel="accuracy on held-out prompts (%)")
    right.set(xlabel="rollout batches", ylabel="mean reward (moving mean of 9 batches)")
    _say_seeds(figure, logs)
    _legend(figure, left)
    return figure


def draw_gates(logs: Logs, gates: dict[str, tuple[float, str]]) -> Any:
    """Every decision of the gated arms, of the first seed of each; None where there is none.

    `gates`: of these arms, the threshold, and what of a row is scored.
    """
    from matplotlib.ticker import FixedLocator, NullLocator

    firsts = {(arm, min(logs[arm])): updates(logs[arm][min(logs[arm])]) for arm in gates}
    firsts = {which: rows for which, rows in firsts.items() if rows}
    if not firsts:
        return None
    figure, axes = panels(2 * len(firsts), 1, 5.2 * len(firsts))
    for i, ((arm, seed), rows) in enumerate(firsts.items()):
        label, colour, _ = style(arm)
        shut, kept = [row for row in rows if row["gate/shut"]], applied(rows)
        threshold, scored = gates[arm]
        upper, lower = axes[2 * i, 0], axes[2 * i + 1, 0]
        lower.sharex(upper)
        upper.set_title(f"{label}, seed {seed}")
        if any(abs(row["gate/z"]) > 10 for row in rows):
            lower.set_yscale("symlog", linthresh=4)
            lower.yaxis.set_major_locator(FixedLocator(Z_TICKS))
            lower.yaxis.set_major_formatter("{x:g}")
            lower.yaxis.set_minor_locator(NullLocator())
        # In the upper panel a line through all attempts, in the lower one points of the applied.
        upper.plot(
            [row["step"] for row in rows], [row[scored] for row in rows],
            color=colour, linewidth=0.9,
        )  # fmt: skip
        lower.plot(
            [row["step"] for row in kept], [row["gate/z"] for row in kept], ".",
            color=colour, markersize=4, label="update applied",
        )  # fmt: skip
        for ax, key, name in (
            (upper, scored, SIGNALS[scored]),
            (lower, "gate/z", "z-score"),
        ):
            ax.plot(
                [row["step"] for row in shut], [row[key] for row in shut], "x",
                color="#D55E00", markersize=5, label="gate shut: update discarded",
            )  # fmt: skip
            ax.set_ylabel(name)
        lower.set_xlabel("update attempts")
        lower.axhline(threshold, color=INK, linestyle=":", label=f"threshold {threshold:g}")
    _legend(figure, axes[1, 0])
    return figure


def draw_divergence(logs: Logs) -> Any:
    figure, axes = panels(2, 2, 7.2)
    for column, (layer, title) in enumerate((("lm_head", "lm_head"), ("middle", "middle layer"))):
        per_update, total = axes[0, column], axes[1, column]
        for arm, seeds in logs.items():
            kept = [applied(rows) for rows in seeds.values()]
            means = [batch_curve(rows, f"dwd/{layer}", fmean) for rows in kept]
            draw_curves(per_update, arm, [smooth(curve) for curve in means])
            ends = [batch_curve(rows, f"dwd_total/{layer}", lambda v: v[-1]) for rows in kept]
            draw_curves(total, arm, ends)
        per_update.set(title=title, xlabel="rollout batches")
        total.set(xlabel="rollout batches")
    axes[0, 0].set_ylabel("change per update, ‖ΔW‖ / ‖W‖\n(moving mean of 9 batches)")
    axes[1, 0].set_ylabel("change since the start, ‖W - W₀‖ / ‖W₀‖")
    for pair in axes:  # one scale per row: the point is to compare layers
        top = max(ax.get_ylim()[1] for ax in pair)
        for ax in pair:
            ax.set_ylim(0, top)
    _say_seeds(figure, logs)
    _legend(figure, axes[0, 0])
    return figure


def draw_uses(logs: Logs) -> Any:
    figure, axes = panels(1, 2, 4.2)
    left, right = axes[0]
    uses = {
        arm: [
            batch_curve(updates(rows), "gate/shut", lambda v: len(v) - sum(v))
            for rows in seeds.values()
        ]
        for arm, seeds in logs.items()
    }
    pooled = {arm: [n for curve in curves for n in curve.values()] for arm, curves in uses.items()}
    most = int(max((n for counts in pooled.values() for n in counts), default=1))
    width = 0.8 / len(uses)
    for i, (arm, curves) in enumerate(uses.items()):
        draw_curves(right, arm, [smooth(curve, 21) for curve in curves])
        counts = pooled[arm]
        shares = [100 * counts.count(n) / max(len(counts), 1) for n in range(most + 1)]
        shifted = [n + (i - (len(uses) - 1) / 2) * width for n in range(most + 1)]
        left.bar(shifted, shares, width, color=style(arm)[1])
    left.set(xlabel="updates applied from one rollout batch", ylabel="share of batches (%)")
    left.set_xticks(range(0, most + 1, 1 + most // 16))
    right.set(xlabel="rollout batches", ylabel="updates applied per batch\n(moving mean of 21)")
    right.set_ylim(bottom=0)
    _say_seeds(figure, logs)
    _legend(figure, right)
    return figure
