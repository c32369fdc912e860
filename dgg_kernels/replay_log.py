"""`python -m dgg_kernels.replay_log LOG.jsonl`: where a gate would have shut, to choose tau.

The log holds one JSON object per update attempt with `gate/energy` (null for NaN) and `gate/reuse`
(the pass over the rollout batch, from 1), as the trainer writes it; other lines are passed over.
What a gate that scores the loss would have done is said by `--signal loss`.
`rollouts`, where the objects have it, is the batch; else one begins where `gate/reuse` is 1 again.
A log of fixed re-use shows every threshold whole; in a gated one a batch ends where that run's own
gate shut.
"""

from __future__ import annotations

import argparse
import gzip
import json
import sys
from dataclasses import replace
from pathlib import Path

from dgg_kernels import Decision, GateConfig, replay


def read_energies(
    path: Path, mini_batches: int = 1, signal: str = "gate/energy"
) -> list[list[float]]:
    """What a gate scored, or could have scored, per rollout batch.

    Args:
        path: of the log; `.gz` is unpacked.
        mini_batches: updates a pass.
        signal: name of the number to take.

    Raises:
        ValueError: a line is not JSON, no update or not every one holds the signal, or a batch's
            first pass is of more than `mini_batches` updates; names file and line.
    """
    batches: list[list[float]] = []
    batch, use = None, 0  # of the row before
    opened = gzip.open if path.suffix == ".gz" else open
    with opened(path, "rt", encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            try:
                row = json.loads(line)
                if not isinstance(row, dict) or row.keys().isdisjoint({signal, "gate/reuse"}):
                    continue
                energy = row[signal]
                energy = float("nan" if energy is None else energy)
                before, use = use, int(row["gate/reuse"])
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"{path}:{number}: expected a JSON row, got {error!r}") from None
            full = use == 1 and (before != 1 or len(batches[-1]) >= mini_batches)
            if not batches or (row["rollouts"] != batch if "rollouts" in row else full):
                batches.append([])
            elif full:
                raise ValueError(
                    f"{path}:{number}: expected {mini_batches} updates of pass 1 in a rollout "
                    "batch (--mini-batches), got another one"
                )
            batch = row.get("rollouts")
            batches[-1].append(energy)
    if not batches:
        raise ValueError(f"{path}: expected rows with {signal} and gate/reuse, got none")
    return batches


def row_of(decisions: list[list[Decision]]) -> dict[str, float]:
    """Counts over a replayed log; what follows a shut decision in its batch was never reached."""
    reached = [batch[: [*(d.shut for d in batch), True].index(True) + 1] for batch in decisions]
    applied = sum(not d.shut for batch in reached for d in batch)
    shut = sum(d.shut for batch in reached for d in batch)
    return {
        "attempted": sum(map(len, reached)),
        "applied": applied,
        "shut": shut,
        "uses per batch": applied / len(decisions),
        "batches shut": shut / len(decisions),
    }


def plot(results: dict[float, list[list[Decision]]], signal: str, path: Path) -> None:
    """The signal of every recorded update, and per threshold a mark where the gate would shut."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 2.6 + 1.2 * len(results)), dpi=110, layout="constrained")
    panels = figure.subplots(len(results), 1, sharex=True, squeeze=False)[:, 0]
    for ax, (threshold, batches) in zip(panels, results.items(), strict=True):
        flat = [d for batch in batches for d in batch]
        ax.plot([d.energy for d in flat], color="#0072B2", linewidth=0.8)
        position, marks = 0, []
        for batch in batches:
            hit = [*(d.shut for d in batch), True].index(True)
            if hit < len(batch):
                marks.append(position + hit)
            position += len(batch)
        energies = [flat[m].energy for m in marks]
        ax.plot(marks, energies, "x", color="#D55E00", markersize=5)
        ax.set_ylabel(f"{signal}, τ = {threshold:g}")
        ax.spines[["top", "right"]].set_visible(False)
    panels[-1].set_xlabel("recorded update (×: the gate would shut here)")
    figure.savefig(path)


def main(argv: list[str] | None = None) -> int:
    """Replay, print a table, draw a plot; 2 where the log cannot be read."""
    parser = argparse.ArgumentParser(
        prog="python -m dgg_kernels.replay_log", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("log", type=Path)
    parser.add_argument("--threshold", type=float, nargs="+", default=[0.1, 0.5, 1.0])
    parser.add_argument("--window", type=int, default=GateConfig.window)
    parser.add_argument("--max-reuse", type=int, help="default: the longest batch of the log")
    parser.add_argument("--mini-batches", type=int, default=1, help="updates a pass (default 1)")
    parser.add_argument("--signal", default="gate/energy", metavar="NAME",
                        help="what to score (default gate/energy)")  # fmt: skip
    parser.add_argument("--statistic", default=GateConfig.statistic)
    parser.add_argument("--average", default=GateConfig.average)
    parser.add_argument("--squared", action="store_true")
    parser.add_argument("--include-shut", action="store_true")
    parser.add_argument("--plot", type=Path, metavar="PNG", help="needs matplotlib")
    args = parser.parse_args(argv)
    try:
        energies = read_energies(args.log, args.mini_batches, args.signal)
        config = GateConfig(
            window=args.window, statistic=args.statistic, average=args.average,
            max_reuse=args.max_reuse or max(map(len, energies)), include_shut=args.include_shut,
            squared=args.squared, mini_batches=args.mini_batches,
        )  # fmt: skip
        results = {t: replay(energies, replace(config, threshold=t)) for t in args.threshold}
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{args.log}: {len(energies)} rollout batches, {sum(map(len, energies))} updates")
    rows = {threshold: row_of(decisions) for threshold, decisions in results.items()}
    names = list(next(iter(rows.values())))
    print("      τ" + "".join(f"{name:>16}" for name in names))
    for threshold, row in rows.items():
        print(f"{threshold:7g}" + "".join(f"{row[name]:16.4g}" for name in names))
    if args.plot:
        plot(results, args.signal, args.plot)
        print(f"written: {args.plot}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
