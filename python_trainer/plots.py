"""The plots of a run. Colours and dashes tell the arms apart for every reader."""

from __future__ import annotations

import io
import math
from typing import Any

from .files import Row

# Okabe and Ito's palette, told apart by colour-blind readers; dashes for those who print in grey.
STYLES = {
    "single_use": ("Single use", "#000000", "-"),
    "fixed_k4": ("Fixed K=4", "#E69F00", "--"),
    "fixed_k8": ("Fixed K=8", "#D55E00", "-"),
    "dgg": ("DGG", "#0072B2", "-"),
    "random": ("Random stop", "#CC79A7", "--"),
    "kl": ("KL stop", "#009E73", "-."),
    "global_norm": ("Global-norm gate", "#56B4E9", "-."),
}
INK, GRID = "#333333", "#DDDDDD"


def style(arm: str) -> tuple[str, str, str]:
    """(label, colour, dash) of an arm, a grey line for one that `train` was given other values."""
    return STYLES.get(arm, (arm, "#777777", "-"))


def _axes(rows: int, columns: int, height: float) -> tuple[Any, Any]:
    from matplotlib.figure import Figure  # not pyplot: no display, no global state

    figure = Figure(figsize=(11, height), dpi=110, layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    for ax in axes.flat:
        ax.grid(color=GRID, linewidth=0.6)
        ax.set_axisbelow(True)
        ax.spines[["top", "right"]].set_visible(False)
        ax.tick_params(colors=INK)
    return figure, axes


def _png(figure: Any) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def _legend(figure: Any, ax: Any) -> None:
    """One legend below the panels, where it covers no data."""
    handles, labels = ax.get_legend_handles_labels()
    if handles:
        figure.legend(handles, labels, loc="outside lower center", ncols=7, frameon=False)


def smooth(values: list[float], width: int = 9) -> list[float]:
    """Centred moving mean over up to `width` finite values."""
    means = []
    for i in range(len(values)):
        near = [v for v in values[max(0, i - width // 2) : i + width // 2 + 1] if math.isfinite(v)]
        means.append(sum(near) / len(near) if near else math.nan)
    return means


def updates(rows: list[Row]) -> list[Row]:
    return [row for row in rows if row["type"] == "update"]


def per_batch(rows: list[Row], key: str) -> dict[int, list[float]]:
    """Values of `key` by rollout batch, over the attempted updates."""
    batches: dict[int, list[float]] = {}
    for row in updates(rows):
        batches.setdefault(row["rollouts"], []).append(float(row[key]))
    return batches


def draw_learning(rows: dict[str, list[Row]]) -> bytes:
    figure, axes = _axes(1, 2, 4.6)
    left, right = axes[0]
    for arm, log in rows.items():
        label, colour, dash = style(arm)
        evals = [row for row in log if row["type"] == "eval"]
        left.plot(
            [row["rollouts"] for row in evals], [100 * row["accuracy"] for row in evals],
            dash, color=colour, label=label, linewidth=1.8,
        )  # fmt: skip
        rewards = {batch: values[0] for batch, values in per_batch(log, "reward").items()}
        right.plot(list(rewards), smooth(list(rewards.values())), dash, color=colour, linewidth=1.8)
    left.set(xlabel="rollout batches", ylabel="expected accuracy on held-out prompts (%)")
    right.set(xlabel="rollout batches", ylabel="mean reward (moving mean of 9 batches)")
    _legend(figure, left)
    return _png(figure)


def draw_gates(rows: dict[str, list[Row]], summary: dict[str, Any]) -> bytes:
    gated = [arm for arm in rows if summary["arms"][arm]["gate"] in ("dgg", "global_norm")]
    gated = [arm for arm in gated if updates(rows[arm])]
    if not gated:
        return b""
    figure, axes = _axes(2 * len(gated), 1, 5.2 * len(gated))
    for i, arm in enumerate(gated):
        label, colour, _ = style(arm)
        log = updates(rows[arm])
        shut = [row for row in log if row["gate/shut"]]
        upper, lower = axes[2 * i, 0], axes[2 * i + 1, 0]
        lower.sharex(upper)
        # In the upper panel a line through all attempts, in the lower one points of the applied.
        upper.plot(
            [row["step"] for row in log], [row["gate/energy"] for row in log],
            color=colour, linewidth=0.9,
        )  # fmt: skip
        applied = [row for row in log if not row["gate/shut"]]
        lower.plot(
            [row["step"] for row in applied], [row["gate/z"] for row in applied], ".",
            color=colour, markersize=4, label="update applied",
        )  # fmt: skip
        for ax, key, name in (
            (upper, "gate/energy", "gradient norm"),
            (lower, "gate/z", "z-score"),
        ):
            ax.plot(
                [row["step"] for row in shut], [row[key] for row in shut], "x",
                color="#D55E00", markersize=5, label="gate shut: update discarded",
            )  # fmt: skip
            ax.set(xlabel="update attempts", ylabel=f"{label}: {name}")
        threshold = summary["config"][arm]["gate_threshold"]
        lower.axhline(threshold, color=INK, linestyle=":", label=f"threshold {threshold:g}")
        if any(abs(row["gate/z"]) > 10 for row in log):
            lower.set_yscale("symlog", linthresh=4)
    _legend(figure, axes[1, 0])
    return _png(figure)


def draw_divergence(rows: dict[str, list[Row]]) -> bytes:
    figure, axes = _axes(2, 2, 7.2)
    for column, (layer, title) in enumerate((("lm_head", "lm_head"), ("middle", "middle layer"))):
        per_update, total = axes[0, column], axes[1, column]
        for arm, log in rows.items():
            label, colour, dash = style(arm)
            applied = [row for row in log if row["type"] == "update" and not row["gate/shut"]]
            means = {b: sum(v) / len(v) for b, v in per_batch(applied, f"dwd/{layer}").items()}
            per_update.plot(
                list(means), smooth(list(means.values())), dash, color=colour, label=label
            )
            ends = {b: v[-1] for b, v in per_batch(applied, f"dwd_total/{layer}").items()}
            total.plot(list(ends), list(ends.values()), dash, color=colour)
        per_update.set(title=title, xlabel="rollout batches")
        total.set(xlabel="rollout batches")
    axes[0, 0].set_ylabel("change per update, ‖ΔW‖ / ‖W‖\n(moving mean of 9 batches)")
    axes[1, 0].set_ylabel("change since the start, ‖W - W₀‖ / ‖W₀‖")
    for pair in axes:  # one scale per row: the point is to compare layers
        top = max(ax.get_ylim()[1] for ax in pair)
        for ax in pair:
            ax.set_ylim(0, top)
    _legend(figure, axes[0, 0])
    return _png(figure)


def draw_uses(rows: dict[str, list[Row]]) -> bytes:
    figure, axes = _axes(1, 2, 4.2)
    left, right = axes[0]
    uses = {
        arm: [sum(1 - shut for shut in batch) for batch in per_batch(log, "gate/shut").values()]
        for arm, log in rows.items()
    }
    most = int(max((n for counts in uses.values() for n in counts), default=1))
    width = 0.8 / max(len(uses), 1)
    for i, (arm, counts) in enumerate(uses.items()):
        label, colour, dash = style(arm)
        right.plot(range(1, len(counts) + 1), smooth(counts, 21), dash, color=colour, label=label)
        shares = [100 * counts.count(n) / max(len(counts), 1) for n in range(most + 1)]
        shifted = [n + (i - (len(uses) - 1) / 2) * width for n in range(most + 1)]
        left.bar(shifted, shares, width, color=colour)
    left.set(xlabel="updates applied from one rollout batch", ylabel="share of batches (%)")
    left.set_xticks(range(most + 1))
    right.set(xlabel="rollout batches", ylabel="updates applied per batch\n(moving mean of 21)")
    right.set_ylim(bottom=0)
    _legend(figure, right)
    return _png(figure)
