"""What came out: a table, plots, and one self-contained report.html, all from the run's files."""

from __future__ import annotations

import base64
import html
import json
from pathlib import Path
from typing import Any

from .config import ConfigError
from .files import read_metrics, write_atomically
from .plots import STYLES, draw_divergence, draw_gates, draw_learning, draw_uses, style

Summary = dict[str, Any]


def write(out: Path) -> None:
    """Draw the PNGs and `report.html` of the run in `out`, finished or not.

    Raises:
        ConfigError: `out` holds no summary.json.
    """
    path = out / "summary.json"
    if not path.is_file():
        raise ConfigError(f"out: expected a run directory with summary.json, got {str(out)!r}")
    summary = json.loads(path.read_text())
    rows = {arm: read_metrics(out / arm / "metrics.jsonl") for arm in in_order(summary)}
    plots = {
        "learning": ("Accuracy and reward against rollout batches", draw_learning(rows)),
        "gate": ("What the gates saw", draw_gates(rows, summary)),
        "divergence": ("Weight divergence per layer", draw_divergence(rows)),
        "uses": ("Updates applied per rollout batch", draw_uses(rows)),
    }
    plots = {name: (title, png) for name, (title, png) in plots.items() if png}
    for name, (_, png) in plots.items():
        write_atomically(out / f"{name}.png", png)
    write_atomically(out / "report.html", render_html(summary, plots))


def in_order(summary: Summary) -> list[str]:
    """Arms in the order of STYLES, whatever order they ran in."""
    names = list(STYLES)
    return sorted(summary["arms"], key=lambda arm: names.index(arm) if arm in names else 99)


# -- table and sentence ---------------------------------------------------------------------------

# Heading and meaning: headings are short so that the table fits a terminal of 80 columns.
COLUMNS = {
    "arm": "",
    "batches": "rollout batches drawn",
    "tried": "updates attempted",
    "applied": "updates applied",
    "uses": "updates applied per rollout batch",
    "final": "accuracy at the end",
    "late": "mean accuracy over the last quarter of the evaluations",
    "best": "best accuracy",
    "to goal": "rollout batches until as accurate as single use at its end",
    "wall s": "seconds, wall clock",
}


def table(summary: Summary) -> list[list[str]]:
    """One row of text per arm, under COLUMNS."""
    lines = []
    for arm in in_order(summary):
        a = summary["arms"][arm]
        reached = a["rollouts_to_single_use_final"]
        lines.append([
            style(arm)[0] + ("" if a["finished"] else " (cut)"),
            str(a["rollouts"]), str(a["updates_attempted"]), str(a["updates_applied"]),
            f"{a['mean_uses']:.2f}", _percent(a["final_accuracy"]), _percent(a["late_accuracy"]),
            _percent(a["best_accuracy"]),
            _fewer(reached, a["rollouts"]),
            f"{a['wall_s']:.1f}",
        ])  # fmt: skip
    return lines


def _fewer(reached: int | None, total: int) -> str:
    """Batches to the goal, and how many times fewer than `total` that is."""
    if reached is None:
        return "never"
    return f"{reached} ({total / reached:.1f}x)" if 0 < reached < total else str(reached)


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}%"


def verdict(summary: Summary) -> str:
    """What the numbers say, whoever wins."""
    arms = {name: a for name, a in summary["arms"].items() if a["finished"]}
    if len(arms) < 2:
        return "There is no second finished arm to compare with."
    warmup = summary["warmup"]
    ranked = sorted(arms, key=lambda name: -arms[name]["final_accuracy"])
    text = "Final accuracy, best first: " + ", ".join(
        f"{style(name)[0]} {_percent(arms[name]['final_accuracy'])}" for name in ranked
    )
    late = max(arms, key=lambda name: arms[name]["late_accuracy"])
    text += f". Best over the last quarter: {style(late)[0]}."
    if "dgg" in arms and "single_use" in arms:
        total = arms["single_use"]["rollouts"]
        text += (
            " Rollout batches to single use's final accuracy (and how many times fewer): "
            + ", ".join(
                f"{style(name)[0]} {_fewer(arms[name]['rollouts_to_single_use_final'], total)}"
                for name in in_order(summary)
                if name in arms
            )
        )
        text += "."
    if "dgg" in arms and "random" in arms:
        gap = 100 * (arms["dgg"]["final_accuracy"] - arms["random"]["final_accuracy"])
        text += (
            f" Stopping at random, with {arms['random']['mean_uses']:.2f} uses per batch against "
            f"DGG's {arms['dgg']['mean_uses']:.2f}, ended {abs(gap):.1f} points "
            f"{'below' if gap > 0 else 'above'} DGG."
        )
    if not warmup["reached"]:
        text += f" The warm-up ended early, at {_percent(warmup['accuracy'])}."
    return text + " This is one seed: run several before trusting a small difference."


def print_table(summary: Summary, console: Any) -> None:
    """The table and the verdict, on a rich console."""
    from rich.table import Table

    grid = Table(box=None, collapse_padding=True, pad_edge=False)
    for i, column in enumerate(COLUMNS):
        grid.add_column(column, justify="left" if i == 0 else "right", no_wrap=True)
    for line in table(summary):
        grid.add_row(*line)
    console.print(grid)
    meanings = "; ".join(f"{name}: {text}" for name, text in COLUMNS.items() if text)
    console.print(f"({meanings}; seed {summary['seed']})", style="dim", highlight=False)
    console.print(verdict(summary), highlight=False)


# -- html -----------------------------------------------------------------------------------------

PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; color: #222; max-width: 70rem; margin: 2rem auto;
       padding: 0 1rem }}
table {{ border-collapse: collapse; font-variant-numeric: tabular-nums }}
th, td {{ padding: .3rem .8rem; text-align: right; border-bottom: 1px solid #ddd }}
th:first-child, td:first-child {{ text-align: left }}
img {{ max-width: 100% }} pre {{ background: #f6f6f6; padding: 1rem; overflow-x: auto }}
.wide {{ overflow-x: auto }}
</style></head><body>
<h1>{title}</h1>{notice}<p>{verdict}</p><div class="wide"><table>{table}</table></div>
<p><small>{legend}.</small></p>
<p>Accuracy is the exact expected accuracy: the policy's mean probability of the whole right answer
on held-out prompts. Every arm has the same warm start, the same prompts and the same number of
rollout batches.</p>
{plots}
<h2>Settings</h2><pre>{settings}</pre></body></html>
"""


def render_html(summary: Summary, plots: dict[str, tuple[str, bytes]]) -> str:
    """One file with the images inside."""
    head = "".join(
        f'<th title="{html.escape(t)}">{html.escape(c)}</th>' for c, t in COLUMNS.items()
    )
    legend = "; ".join(f"{name}: {text}" for name, text in COLUMNS.items() if text)
    body = "".join(
        "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in line) + "</tr>"
        for line in table(summary)
    )
    images = "".join(
        f'<h2>{html.escape(title)}</h2><img alt="{html.escape(title)}" '
        f'src="data:image/png;base64,{base64.b64encode(png).decode()}">'
        for title, png in plots.values()
    )
    notice = ""
    if summary["interrupted"] or summary["error"]:
        reason = summary["error"] or "interrupted"
        notice = f"<p><strong>This run did not finish: {html.escape(reason)}.</strong></p>"
    settings = {key: value for key, value in summary.items() if key != "arms"}
    return PAGE.format(
        title=f"GRPO with gated re-use, seed {summary['seed']}",
        notice=notice,
        verdict=html.escape(verdict(summary)),
        table=head + body,
        legend=html.escape(legend),
        plots=images,
        settings=html.escape(json.dumps(settings, indent=2)),
    )
