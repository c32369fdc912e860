"""Does the random tail of `grad_eps`, or a screen, change training? GRPO with and without them.

    python -m benchmarks.bench_bias --seeds 5      # minutes per seed, on one core
    python -m benchmarks.bench_bias --arms "every entry" "screen int8" --save bias_screen

Trains the demo's task at a vocabulary of 8,192 from one warm start per seed, with every entry of
the gradient (grad_eps = 0), with the default, with a tail that begins 64 times earlier, and with
the default behind a screen; same prompts, same sampling seeds. Entropy, KL and reward must not part
beyond the spread over seeds.
"""

from __future__ import annotations

import dataclasses
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import Progress as Bars

from python_trainer.config import TrainConfig
from python_trainer.files import read_metrics, updates
from python_trainer.loop import Progress, prepare, train
from python_trainer.plots import smooth
from python_trainer.results import last_quarter
from python_trainer.tasks import make_task

from . import common
from .tables import show

ARMS: dict[str, dict[str, Any]] = {
    "every entry": {"grad_eps": 0.0},
    "default, 2^-12": {"grad_eps": 2**-12},
    "2^-6": {"grad_eps": 2**-6},
    "screen int8": {"grad_eps": 2**-12, "screen": "int8"},
}
CURVES = ("entropy", "kl", "reward")
COLOURS = {"every entry": "#000000", "default, 2^-12": "#0072B2", "2^-6": "#D55E00",
           "screen int8": "#009E73"}  # fmt: skip


def curves(config: TrainConfig, arms: list[str], tick: Any) -> dict[str, dict[str, list[float]]]:
    """Arm -> curve -> value per update, all from one warm start."""
    start = prepare(config, make_task(config.task, config.task_options))
    found = {}
    for arm in arms:
        with tempfile.TemporaryDirectory() as folder:
            changed = dataclasses.replace(config, **ARMS[arm])
            train(changed, start, Path(folder), Progress(), lambda _: tick())
            rows = updates(read_metrics(Path(folder) / "metrics.jsonl"))
        found[arm] = {name: [row[name] for row in rows] for name in CURVES}
    return found


def plot(record: dict[str, Any], path: Path) -> None:
    """Mean over seeds with the range of the seeds, one panel per curve."""
    figure = Figure(figsize=(12, 3.6), dpi=110, layout="constrained")
    panels = figure.subplots(1, len(CURVES))
    labels = {"entropy": "entropy (nats)", "kl": "KL(old || new) per token", "reward": "reward"}
    for ax, name in zip(panels, CURVES, strict=True):
        for arm in record["arms"]:
            colour = COLOURS[arm]
            curves = [dict(enumerate(seed[arm][name])) for seed in record["seeds"].values()]
            runs = [[*smooth(curve, 15).values()] for curve in curves]
            columns = list(zip(*runs, strict=True))
            x = range(len(columns))
            ax.fill_between(x, [min(c) for c in columns], [max(c) for c in columns],
                            color=colour, alpha=0.12, linewidth=0)  # fmt: skip
            means = [statistics.mean(c) for c in columns]
            dash = "--" if arm == "default, 2^-12" else "-"
            ax.plot(x, means, color=colour, label=arm, linewidth=1.4, linestyle=dash)
        ax.set_xlabel("update")
        ax.set_ylabel(labels[name])
        ax.spines[["top", "right"]].set_visible(False)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3,
                  frameon=False)  # fmt: skip
    figure.savefig(path)


def verdict(record: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Over the last quarter: paired difference to exact, its standard error, spread of seeds."""
    found = {}
    for arm in list(record["arms"])[1:]:
        for name in CURVES:
            exact, drawn = ([last_quarter(seed[a][name]) for seed in record["seeds"].values()]
                            for a in ("every entry", arm))  # fmt: skip
            pairs = [b - a for a, b in zip(exact, drawn, strict=True)]
            found[f"{arm}: {name}"] = {
                "mean_difference": statistics.mean(pairs),
                "standard_error": statistics.stdev(pairs) / len(pairs) ** 0.5,
                "exact_mean": statistics.mean(exact),
                "seed_spread": statistics.stdev(exact),
            }
    return found


def main() -> None:
    """Run, record, draw."""
    parser = common.parser(__doc__)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--batches", type=int, default=160, help="rollout batches, two uses each")
    parser.add_argument("--vocabulary", type=int, default=8192)
    parser.add_argument("--arms", nargs="+", metavar="ARM", choices=ARMS, default=list(ARMS)[:3],
                        help=f"held to the first; of {list(ARMS)}")  # fmt: skip
    args = parser.parse_args()
    console = Console()
    record: dict[str, Any] = {
        "benchmark": "bias",
        "stamp": common.stamp(torch.device("cpu"), 1),
        "arms": {arm: ARMS[arm] for arm in args.arms},
        "seeds": {},
    }
    with Bars(console=console, transient=True) as progress:
        bar = progress.add_task("runs", total=args.seeds * len(args.arms) * args.batches)
        for seed in range(args.seeds):
            config = TrainConfig(
                seed=seed, rollout_batches=args.batches, vocab_size=args.vocabulary,
                gate="off", num_iterations=2, eval_every=10**6, eval_prompts=64,
            )  # fmt: skip
            record["config"] = {"rollout_batches": args.batches, "vocab_size": args.vocabulary,
                                "num_iterations": 2}  # fmt: skip
            record["seeds"][seed] = curves(config, args.arms, lambda: progress.advance(bar))
            if seed:
                record["verdict"] = verdict(record)
            if args.save:
                plot(record, common.save(args.save, record).with_suffix(".png"))
    show(record, console)


if __name__ == "__main__":
    main()
