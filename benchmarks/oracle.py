"""The true effect of every update, and what the best prefix of a batch's uses could gain.

    python -m benchmarks.oracle --config benchmarks/evidence/main.toml --seeds 0 1 --out runs/oracle

Each rollout batch is used K times. After every use the accuracy is taken on held-out prompts that
the reported accuracy does not use. `best` then goes back to the use at which it was highest
(perhaps to none): a gate that knew the effect would do no better one batch ahead. `all` goes on
from the last use, as fixed re-use does. Rows: <out>/<keep>/seed-<n>/effects.jsonl, beside the run's
own metrics.jsonl.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from torch import Tensor

from python_trainer.__main__ import config_of, parser, read_toml
from python_trainer.compare import progress_bar
from python_trainer.config import TrainConfig
from python_trainer.evaluate import Evaluator
from python_trainer.loop import Progress, Run, WarmStart, prepare
from python_trainer.tasks import make_task


def state(run: Run) -> list[Tensor]:
    """The tensors that an update changes."""
    moments = [t for of in run.optimizer.state.values() for t in of.values()]
    return [p.data for p in run.policy.parameters()] + moments


def one(config: TrainConfig, start: WarmStart, folder: Path, keep: str, tick: Any) -> None:
    """One run; `config.gate` is "off"."""
    progress = Progress()
    run = Run(config, start, folder, progress, print, ())
    other = Evaluator(start.task, run.policy, config, run.ranks, key="effects")

    def accuracy() -> float:
        return other.accuracy(run.model, run.engine)

    with (folder / "effects.jsonl").open("w") as file:
        while progress.rollouts < config.rollout_batches:
            if progress.rollouts % config.eval_every == 0:
                run.evaluate()
            run.draw()
            seen = [accuracy()]
            best, kept = -1.0, []
            for _ in range(config.num_iterations):
                # After the first update of all: before it there are no moments to go back to.
                if seen[-1] > best and run.optimizer.state:
                    best, kept = seen[-1], [t.clone() for t in state(run)]
                run.use_again()
                seen.append(accuracy())
            if keep == "best" and kept and best >= seen[-1]:
                for mine, before in zip(state(run), kept, strict=True):
                    mine.copy_(before)
            file.write(json.dumps({"rollouts": progress.rollouts, "accuracy": seen}) + "\n")
            run.batch = None
            tick(progress)
        run.evaluate()
    run.log.close()


def main() -> None:
    """Run what was asked for, seed by seed."""
    mine = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    mine.add_argument("--config", required=True, metavar="TOML")
    mine.add_argument("--out", type=Path, required=True)
    mine.add_argument("--seeds", type=int, nargs="+", default=[0])
    mine.add_argument("--keep", nargs="+", choices=("best", "all"), default=("best", "all"))
    mine.add_argument("--learning-rate", type=float)
    args = mine.parse_args()
    options = ["train", "--out", str(args.out), "--gate", "off"]
    if args.learning_rate is not None:
        options += ["--learning-rate", str(args.learning_rate)]
    shared = config_of(parser().parse_args(options), read_toml(args.config))
    console = Console()
    for seed in args.seeds:
        config = replace(shared, seed=seed)
        start = prepare(config, make_task(config.task, config.task_options))
        for keep in args.keep:
            folder = args.out / keep / f"seed-{seed}"
            folder.mkdir(parents=True, exist_ok=True)
            with progress_bar(console, keep, config.rollout_batches) as tick:
                one(config, start, folder, keep, tick)
            console.print(f"{folder}: done")


if __name__ == "__main__":
    main()
