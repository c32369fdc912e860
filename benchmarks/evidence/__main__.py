"""What the runs of docs/evidence.md came to: raw record, tables, verdicts, figures.

    python -m python_trainer compare --config benchmarks/evidence/main.toml --out runs/main
    python -m benchmarks.evidence record runs/main --save main     # raw logs, compressed
    python -m benchmarks.evidence report main                      # tables and figures from them
    python -m benchmarks.evidence report                           # of every record
    python -m benchmarks.evidence times timed                      # of runs on a quiet machine

To make a record's runs again, with all settings as they were (every record holds them):

    python -m benchmarks.evidence settings alfworld > again.toml
    python -m python_trainer compare --config again.toml --out runs/again

Several run directories (some seeds each, say, on several machines) become one record.
"""

from __future__ import annotations

import argparse
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import fmean, median, stdev
from typing import Any

import numpy as np

from python_trainer.files import updates

from .. import common
from . import figures, record
from .numbers import (
    GOAL,
    METRICS,
    SOONER,
    Found,
    auc,
    combined_auc,
    effects,
    holm,
    reached,
    speedup,
    updates_paid,
    values,
    verdicts,
)  # fmt: skip
from .record import Run, Runs, label

CLOSE = (GOAL, SOONER, "uses")  # shown to two digits


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


def effects_tables(runs: Runs) -> Iterator[str]:
    """Share of harmful updates by use; AUC of every signal; of the arms that tried all uses."""
    found = {
        arm: [effects(run) for run in of.values()]
        for arm, of in runs.items()
        if any(row["type"] == "effect" for run in of.values() for row in run.rows)
    }
    if not found:
        return
    uses = sorted(next(iter(found.values()))[0])
    yield "| harmful updates at use | " + " | ".join(map(str, uses)) + " |"
    yield "|---" * (len(uses) + 1) + "|"
    for arm, seen in found.items():
        shares = [fmean(effect < 0 for of in seen for effect, _ in of[use]) for use in uses]
        yield f"| {label(arm)} | " + " | ".join(f"{share:.0%}" for share in shares) + " |"
    yield ""
    yield "| AUC within a use index | " + " | ".join(map(label, found)) + " |"
    yield "|---" * (len(found) + 1) + "|"
    (_, told), *_ = next(iter(found.values()))[0][uses[0]]
    for name in told:
        yield f"| {name} | " + " | ".join(f"{auc(of, name):.3f}" for of in found.values()) + " |"
    combined = " | ".join(f"{combined_auc(of):.3f}" for of in found.values())
    yield f"| all of these, linear, fitted on the other seeds | {combined} |"


def surge_table(runs: Runs) -> Iterator[str]:
    """Whether the head's gradient grows in re-use, and whether the head moves out of proportion."""
    yield (
        "| arm | head norm, last use over first: median | 95th percentile | batches where it rose "
        "| step of the head over a middle layer's: first quarter | last quarter |"
    )
    yield "|---" * 6 + "|"
    for arm, of in sorted(runs.items()):
        rises, early, late = [], [], []
        for run in of.values():
            rows = updates(run.rows)
            rises += [v[-1] / v[0] for v in head_norms(rows) if len(v) > 1 and v[0] > 0]
            steps = [
                row["dwd/lm_head"] / row["dwd/middle"] for row in rows if row["dwd/middle"] > 0
            ]
            early += steps[: len(steps) // 4]
            late += steps[-len(steps) // 4 :]
        if rises:
            rose = fmean(rise > 1 for rise in rises)
            first, last = (f"{median(of):.2f}" if of else "-" for of in (early, late))
            yield (
                f"| {label(arm)} | {median(rises):.2f} | {np.percentile(rises, 95):.2f} "
                f"| {rose:.0%} | {first} | {last} |"
            )


def head_norms(rows: list[dict[str, Any]]) -> list[list[float]]:
    """From use to use of a batch, each of its mini-batches apart; of updates with a backward."""
    norms: dict[tuple[int, int], list[float]] = {}
    seen: Counter[tuple[int, int]] = Counter()
    for row in rows:
        use = row["rollouts"], row["gate/reuse"]
        if not math.isnan(row["gate/energy"]):
            norms.setdefault((row["rollouts"], seen[use]), []).append(row["gate/energy"])
        seen[use] += 1
    return [*norms.values()]


def times_table(runs: Runs) -> Iterator[str]:
    """Seconds as measured, beside what the model of `speedup` makes of them."""
    yield (
        "| arm | seeds | s sampling a batch | s updating | times sooner to the goal, measured: "
        "median (lowest to highest) | modelled at single use's own share |"
    )
    yield "|---" * 6 + "|"
    for arm, of in runs.items():
        rows = []
        for seed, run in of.items():
            single, batches = runs["single_use"][seed], run.curve[-1][0]
            goal, whole = single.late, spent(single, batches)
            rows.append((
                run.seconds["rollout"] / batches,
                run.seconds["update"] / batches,
                spent(single, reached(single, goal)) / spent(run, reached(run, goal)),
                speedup(run, single, single.seconds["rollout"] / whole),
            ))  # fmt: skip
        columns = list(zip(*rows, strict=True))
        cells = [f"{median(column):.2f}" for column in columns]
        cells[2] += f" ({min(columns[2]):.2f} to {max(columns[2]):.2f})"
        yield f"| {label(arm)} | {len(of)} | " + " | ".join(cells) + " |"


def spent(run: Run, batches: int) -> float:
    """Seconds for the first so many batches, whose share of the updates may be another's."""
    every = run.curve[-1][0]
    sampling = run.seconds["rollout"] * batches / every
    return sampling + run.seconds["update"] * updates_paid(run, batches) / updates_paid(run, every)


def best_rates(runs: Runs) -> dict[str, str]:
    """Arm -> the value of the grid with the highest mean curve; of two alike the first."""
    found: dict[str, dict[str, float]] = {}
    for arm in runs:
        name, _, value = arm.partition("@")
        found.setdefault(name, {})[value] = fmean(values(runs, arm, "curve mean").values())
    return {name: max(sorted(of), key=of.__getitem__) for name, of in found.items()}


def tables(name: str, runs: Runs, about: list[dict[str, Any]], found: Found) -> list[str]:
    """Every table of a record, line by line."""
    lines = [*heading(name, about), *arms_table(runs), ""]
    if any("@" in arm for arm in runs):
        best = ", ".join(f"{label(arm)} {rate}" for arm, rate in best_rates(runs).items())
        lines += [f"Best by curve mean: {best}", ""]
    else:
        lines += [*verdicts_table(found), "", *effects_tables(runs), ""]
    return [*lines, *surge_table(runs)]


def draw(name: str, runs: Runs, about: list[dict[str, Any]], found: Found) -> None:
    """What the record has figures for: in docs/images where docs/evidence.md shows them."""
    if any("@" in arm for arm in runs):
        return
    drawn = {
        "curves": figures.curves(runs),
        "intervals": figures.intervals(found),
        "signals": figures.signals(runs),
        "growth": figures.growth(runs),
        "time": figures.time(runs),
        "sensitivity": figures.sensitivity(
            runs, {k: v for of in about for k, v in of["arms"].items()}
        ),
    }
    page = (common.ROOT.parent / "docs" / "evidence.md").read_text()
    for title, figure in drawn.items():
        if figure is not None:
            path = Path("docs", "images", f"evidence_{name}_{title}.png")
            if f"({path.relative_to('docs')})" not in page:
                path = Path("build", "evidence", path.name)
            path = common.ROOT.parent / path
            path.parent.mkdir(parents=True, exist_ok=True)
            figure.savefig(path, metadata={"Software": None})
            print(path)


def heading(name: str, about: list[dict[str, Any]]) -> list[str]:
    """What made the record; older ones do not say where and when."""
    commits = dict.fromkeys(str(of["commit"])[:12] for of in about)
    made = dict.fromkeys(f"{of['device']}, {of['date'][:10]}" for of in about if "device" in of)
    return [f"Record {name}: commits {', '.join(commits)}{''.join(f'; {of}' for of in made)}.", ""]


def say(name: str, lines: list[str]) -> None:
    (record.FOLDER / f"{name}.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


def arms_of(text: str) -> tuple[str, list[str]]:
    """RECORD:ARM,ARM as the two parts."""
    name, _, arms = text.partition(":")
    if not arms:
        raise argparse.ArgumentTypeError(f"expected RECORD:ARM,ARM, got {text!r}")
    return name, arms.split(",")


def main(argv: Sequence[str] | None = None) -> None:
    """Record or report."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    recorded = commands.add_parser("record", help="raw logs of run directories into one file")
    recorded.add_argument("folders", nargs="*", type=Path)
    recorded.add_argument("--save", required=True, metavar="NAME")
    recorded.add_argument("--arms", nargs="+", default=(), help="these alone (default: all)")
    recorded.add_argument(
        "--beside", nargs="+", default=(), type=arms_of, metavar="RECORD:ARM,...",
        help="arms of other records to compare with",
    )  # fmt: skip
    reported = commands.add_parser("report", help="tables and figures of records")
    reported.add_argument("names", nargs="*", help="default: all there are")
    commands.add_parser("settings", help="TOML to run a record again with").add_argument("name")
    commands.add_parser("times", help="wall-clock times of a record").add_argument("name")
    args = parser.parse_args(argv)
    if args.command == "record":
        print(record.write(args.folders, args.save, args.arms, args.beside))
    elif args.command == "report":
        for name in args.names or record.names():
            runs, about = record.read(name)
            found = verdicts(runs)
            say(name, tables(name, runs, about, found))
            draw(name, runs, about, found)
    elif args.command == "settings":
        print(record.settings(args.name), end="")
    else:
        runs, about = record.read(args.name)
        say(f"{args.name}_times", [*heading(args.name, about), *times_table(runs)])


if __name__ == "__main__":
    main()
