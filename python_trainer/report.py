"""What came out, to look at: a table, plots, and one self-contained report.html."""

from __future__ import annotations

import base64
import html
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from .compare import read_run
from .config import ConfigError, TrainConfig
from .evaluate import readable
from .files import Row, read_metrics, write_atomically
from .plots import PLOTS, Logs, draw_divergence, draw_gates, draw_learning, draw_uses, png, style
from .results import (
    COLUMNS,
    Summary,
    counted,
    finished,
    gated,
    in_order,
    line,
    listed,
    meanings,
    paired,
    points,
    seeds_of,
    table,
    verdict,
    what_accuracy_is,
)
from .stopping import ARMS, GATED

Plots = dict[str, tuple[str, bytes]]  # name -> (title, PNG)


def write(out: Path) -> None:
    """Draw the PNGs and `report.html` of the run in `out`, finished or not.

    Raises:
        ConfigError: `out` holds no summary.json, or what is in it cannot be read.
    """
    summary = read_summary(out)
    logs: Logs = {
        arm: {run["seed"]: rows for run in counted(summary, arm) if (rows := read_rows(out, run))}
        for arm in in_order(summary)
    }
    logs = {arm: seeds for arm, seeds in logs.items() if seeds}
    plots = draw(logs, summary) if logs else {}
    for name, (_, image) in plots.items():
        write_atomically(out / f"{name}.png", image)
    write_atomically(out / "report.html", page(summary, plots, logs, missing(out, summary)))


def draw(logs: Logs, summary: Summary) -> Plots:
    """The plots that there is something to draw in."""
    configs = {arm: TrainConfig(**summary["config"][arm]) for arm in logs}
    gates = {arm: (c.score.threshold, ARMS[c.gate].scored)
             for arm, c in configs.items() if c.gate in GATED}  # fmt: skip
    drawn = {
        "learning": draw_learning(logs),
        "gate": draw_gates(logs, gates),
        "divergence": draw_divergence(logs),
        "uses": draw_uses(logs),
    }
    return {name: (PLOTS[name], png(figure)) for name, figure in drawn.items() if figure}


def print_table(summary: Summary, console: Any) -> None:
    """The table and the verdict, on a rich console."""
    from rich.table import Table

    grid = Table(box=None, collapse_padding=True, pad_edge=False)
    for i, column in enumerate(COLUMNS):
        grid.add_column(column, justify="left" if i == 0 else "right", no_wrap=i > 0)
    for cells in table(summary):
        grid.add_row(*cells)
    console.print(grid)
    accuracy = "accuracy: expected, or the mean reward of sampled episodes, as the task allows"
    console.print(f"({meanings(summary)}; {accuracy})", style="dim", highlight=False)
    for sentence in verdict(summary):
        console.print(sentence, highlight=False)


# -- files ----------------------------------------------------------------------------------------


def read_summary(out: Path) -> Summary:
    try:
        summary = json.loads((out / "summary.json").read_text())
        _ = summary["runs"], summary["warmups"], summary["match"]
        _ = [TrainConfig(**config) for config in summary["config"].values()]
        return summary
    except FileNotFoundError as error:
        raise ConfigError(
            f"out: expected a run directory with summary.json, got {str(out)!r}"
        ) from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"out: expected a summary.json of this version in {str(out)!r}, got {error!r}"
        ) from error


def read_rows(out: Path, run: Row) -> list[Row]:
    """The rows of one run; none if it never began to write, or its file was taken away."""
    path = out / run["arm"] / f"seed-{run['seed']}" / "metrics.jsonl"
    try:
        return read_metrics(path)
    except FileNotFoundError:
        return []
    except ValueError as error:
        raise ConfigError(f"out: expected a row of JSON a line in {path}, got {error}") from error


def missing(out: Path, summary: Summary) -> list[str]:
    """Runs that were asked for and did not finish: all that a killed one leaves to know it by."""
    try:
        asked = read_run(out)
    except ConfigError:
        return []
    return [
        f"{style(arm)[0]} (seed {seed})"
        for seed in asked.seeds
        for arm in asked.arms
        if seed not in finished(summary, arm)
    ]


# -- html -----------------------------------------------------------------------------------------

PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; color: #222; max-width: 70rem; margin: 2rem auto;
       padding: 0 1rem }}
table {{ border-collapse: collapse; font-variant-numeric: tabular-nums }}
th, td {{ padding: .3rem .8rem; text-align: right; border-bottom: 1px solid #ddd;
         white-space: nowrap }}
th:first-child, td:first-child {{ text-align: left }}
img {{ max-width: 100% }} pre {{ background: #f6f6f6; padding: 1rem; overflow-x: auto }}
.wide {{ overflow-x: auto }} details {{ font-size: .85rem }}
summary {{ cursor: pointer; margin: 1rem 0 .5rem }}
.episode {{ margin: 0 0 1.5rem }} .episode h3 {{ font-size: 1rem; margin: 0 0 .3rem }}
.episode div {{ font: 14px/1.4 ui-monospace, monospace; white-space: pre-wrap;
               overflow-wrap: anywhere; padding: .25rem .7rem; border-left: 4px solid #ccc }}
.episode .policy {{ border-color: #0072B2; background: #eaf3fa }}
.episode div::before {{ content: attr(title); display: block; color: #666;
                       font: 12px/1.4 system-ui, sans-serif }}
</style></head><body>
<h1>{title}</h1>{notice}<ul>{verdict}</ul>{table}
<p><small>{meanings}.</small></p>
<p>{accuracy} Every arm of a seed has the same warm start{shared}.</p>
{more}{plots}{episodes}
<h2>Settings</h2><pre>{settings}</pre></body></html>
"""


def page(summary: Summary, plots: Plots, logs: Logs, absent: Sequence[str]) -> str:
    """One file with the images inside."""
    seeds = seeds_of(summary)
    images = "".join(
        f'<h2>{html.escape(title)}</h2><img alt="{html.escape(title)}" '
        f'src="data:image/png;base64,{base64.b64encode(image).decode()}">'
        for title, image in plots.values()
    )
    of = f", seed{'s' if len(seeds) > 1 else ''} {listed(seeds)}" if seeds else ""
    return PAGE.format(
        title=f"GRPO with gated re-use{of}",
        notice=notice(summary, absent),
        verdict="".join(f"<li>{html.escape(sentence)}</li>" for sentence in verdict(summary)),
        table=grid(COLUMNS, table(summary)),
        meanings=html.escape(meanings(summary)),
        accuracy=html.escape(what_accuracy_is(summary)),
        shared=" and meets the same prompts, in as many rollout batches" if alike(summary) else "",
        more=by_seed(summary) if len(seeds) > 1 else "",
        plots=images,
        episodes=sampled_episodes(logs, gated(summary)),
        settings=html.escape(json.dumps(settings(summary), indent=2)),
    )


def alike(summary: Summary) -> bool:
    """Do all arms draw the same prompts?"""
    drawn = ("rollout_batches", "prompts_per_batch")
    return len({tuple(c[name] for name in drawn) for c in summary["config"].values()}) < 2


def grid(heads: Iterable[str], lines: Iterable[Iterable[str]]) -> str:
    head = "".join(
        f'<th title="{html.escape(COLUMNS.get(head, ""))}">{html.escape(head)}</th>'
        for head in heads
    )
    body = "".join(
        "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in cells) + "</tr>"
        for cells in lines
    )
    return f'<div class="wide"><table><tr>{head}</tr>{body}</table></div>'


def notice(summary: Summary, absent: Sequence[str]) -> str:
    """What is not there, if anything."""
    if not (summary["interrupted"] or summary["error"] or absent):
        return ""
    reason = summary["error"] or ("interrupted" if summary["interrupted"] else "it was cut off")
    text = f"This run did not finish: {reason}."
    if absent:
        text += f" Not finished: {listed(absent)}."
    return f"<p><strong>{html.escape(text)}</strong></p>"


def by_seed(summary: Summary) -> str:
    """Gated arms minus single use and their controls, seed by seed; and every run for itself."""
    pairs = paired(summary)
    seeds = sorted({seed for of in pairs.values() for values in of.values() for seed in values})
    lines = [
        [f"{style(arm)[0]} minus {style(other)[0]}, {when}"]
        + [f"{values[seed]:+.1f}" if seed in values else "-" for seed in seeds]
        + [points(values)]
        for (arm, other), measures in pairs.items()
        for when, values in measures.items()
    ]
    heads = ["", *(f"seed {seed}" for seed in seeds), "mean ± standard error"]
    text = f"<h2>Differences by seed, in points</h2>{grid(heads, lines)}" if lines else ""
    parts = list(dict.fromkeys(part for run in summary["runs"] for part in run["seconds"]))
    order, goals = in_order(summary), finished(summary, "single_use")
    runs = [
        [style(run["arm"])[0] + ("" if run["finished"] else " (cut)"), str(run["seed"])]
        + line("", [run], [run] if run["seed"] in goals else [])[1:]
        + [f"{run['seconds'].get(part, 0.0):.1f}" for part in parts]
        for run in sorted(summary["runs"], key=lambda run: order.index(run["arm"]))
    ]
    arm, *columns = COLUMNS
    heads = [arm, "seed", *columns, *(f"{part} s" for part in parts)]
    return f"{text}<details><summary>Every run</summary>{grid(heads, runs)}</details>"


def settings(summary: Summary) -> dict[str, Any]:
    """Everything but the runs; what all arms share is said once."""
    config: dict[str, dict[str, Any]] = summary["config"]
    first = next(iter(config.values()), {})
    own = {key for key in first if any(arm[key] != first[key] for arm in config.values())}
    return {
        **{key: value for key, value in summary.items() if key not in ("runs", "config")},
        "seeds": seeds_of(summary),
        "all arms": {key: first[key] for key in first if key not in own | {"seed"}},
        "by arm": {arm: {key: of[key] for key in of if key in own} for arm, of in config.items()},
    }


# -- episodes -------------------------------------------------------------------------------------


def sampled_episodes(logs: Logs, gated: Sequence[str]) -> str:
    """The first, the middle and the last logged episode of gated arms, or of the first with any.

    What is in them comes from a policy and from environments: no character of it is trusted.
    """
    found = {}
    for arm in logs:
        seed = min(logs[arm])
        rows = [row for row in logs[arm][seed] if row["type"] == "episode"]
        if rows:
            some = [rows[i] for i in sorted({0, len(rows) // 2, len(rows) - 1})]
            found[arm] = (
                f"<h2>Sampled episodes of {html.escape(style(arm)[0])}, seed {seed}</h2>"
                "<p>The prompt, then what the policy (blue) and its environment (grey) wrote in "
                f"turn, during training.</p>{''.join(map(episode, some))}"
            )
    return "".join(found[arm] for arm in found if arm in gated) or next(iter(found.values()), "")


def episode(row: Row) -> str:
    parts = []
    for i, text in enumerate(row["text"]):
        who = "prompt" if i == 0 else ("policy" if i % 2 else "environment")
        parts.append(f'<div class="{who}" title="{who}">{html.escape(readable(text))}</div>')
    heading = f"Rollout batch {row['rollouts']}, reward {row['reward']:.2f}"
    return f'<div class="episode"><h3>{heading}</h3>{"".join(parts)}</div>'
