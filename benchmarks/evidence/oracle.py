r"""The true effect of every update, and what the best prefix of a batch's uses could gain.

    python -m benchmarks.evidence.oracle --config benchmarks/evidence/main.toml --seeds 0 1 \
        --out runs/oracle [--prompts-per-batch 64 ...]

Each rollout batch is used K times. After every use (pass) the accuracy is taken on held-out prompts
that the reported accuracy does not use. The arm `oracle` then goes back to the use at which it was
highest (perhaps to none): a gate that knew the effect would do no better one batch ahead. The arm
`all_uses` goes on from the last use, as fixed re-use does. The run directory is as `compare` makes
it, with a row {"type": "effect", "rollouts", "accuracies": before, after use 1, ...} a batch.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor
from torch.nn.functional import cosine_similarity

from python_trainer.__main__ import config_of, parser, read_toml
from python_trainer.compare import Plan, progress_bar, summarise
from python_trainer.config import TrainConfig
from python_trainer.evaluate import Evaluator
from python_trainer.files import write_json
from python_trainer.loop import Progress, Run, WarmStart, prepare
from python_trainer.loss import policy_loss, token_shares
from python_trainer.tasks import make_task


def state(run: Run) -> list[Tensor]:
    """The tensors that an update changes."""
    moments = [t for of in run.optimizer.state.values() for t in of.values()]
    return [p.data for p in run.policy.parameters()] + moments


class Ahead:
    """What gradients of the lm_head tell of a pass before it, beside what the trainer logs."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.first: Tensor | None = None  # the gradient before the batch's first use

    def signals(self) -> dict[str, float]:
        """Norm without the clip of the ratio, cosine with the first use's, and of two halves.

        On the whole batch. Halves are of its prompts. The run's random states are left alone.
        """
        run, batch, config = self.run, self.run.batch, self.run.config
        assert batch is not None
        with torch.random.fork_rng(devices=[]):
            logp_BC = run.model(*batch.sequences, config, batch.lse_BC).out.logp

        def gradient(rows_B: Tensor, config: TrainConfig) -> Tensor:
            mask_BC = batch.mask_BC & rows_B[:, None]
            loss = policy_loss(
                logp_BC, batch.old_logp_BC, batch.advantage_B, mask_BC, config,
                share_BC=token_shares(mask_BC, config),
            ).loss  # fmt: skip
            with torch.random.fork_rng(devices=[]):
                return torch.autograd.grad(loss, run.policy.head.weight, retain_graph=True)[0]

        prompt_B = torch.arange(len(batch.reward_B)) // config.num_generations
        every_B, half_B = prompt_B >= 0, prompt_B % 2 == 0
        whole = gradient(every_B, config)
        if self.first is None:
            self.first = whole
        unclipped = gradient(every_B, replace(config, epsilon=1.0, epsilon_high=1e6))
        halves = [gradient(of, config).flatten() for of in (half_B, ~half_B)]
        found = {
            "unclipped": torch.linalg.vector_norm(unclipped),
            "with_first": cosine_similarity(whole.flatten(), self.first.flatten(), dim=0),
            "of_halves": cosine_similarity(*halves, dim=0),
        }
        return {name: round(value.item(), 6) for name, value in found.items()}


def one(arm: str, config: TrainConfig, start: WarmStart, folder: Path, tick: Any) -> Progress:
    """One run; `config.gate` is "off"."""
    progress = Progress()
    run = Run(config, start, folder, progress, print, ())
    other = Evaluator(start.task, run.policy, config, run.ranks, key="effects")

    def accuracy() -> float:
        return other.accuracy(run.model, run.engine)

    while progress.rollouts < config.rollout_batches:
        if progress.rollouts % config.eval_every == 0:
            run.evaluate()
        run.draw()
        ahead, signals, seen = Ahead(run), [], [accuracy()]
        best, kept = -1.0, []
        for _ in range(config.num_iterations):
            # After the first update of all: before it there are no moments to go back to.
            if seen[-1] > best and run.optimizer.state:
                best, kept = seen[-1], [t.clone() for t in state(run)]
            signals.append(ahead.signals())
            for _ in range(config.mini_batches):
                run.use_again()
            seen.append(accuracy())
        if arm == "oracle" and kept and best >= seen[-1]:
            for mine, before in zip(state(run), kept, strict=True):
                mine.copy_(before)
        run.log.write({
            "type": "effect", "rollouts": progress.rollouts, "accuracies": seen, "signals": signals,
        })  # fmt: skip
        run.batch = None
        tick(progress)
    run.evaluate()
    run.log.close()
    progress.finished = True
    return progress


def main() -> None:
    """Run what was asked for, seed by seed."""
    mine = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,  # --seed is a setting
    )
    mine.add_argument("--config", required=True, metavar="TOML")
    mine.add_argument("--out", type=Path, required=True)
    mine.add_argument("--seeds", type=int, nargs="+", default=[0])
    args, settings = mine.parse_known_args()  # the rest are those of `python -m python_trainer`
    options = ["train", "--out", str(args.out), "--gate", "off", *settings]
    shared = config_of(parser().parse_args(options), read_toml(args.config))
    console, runs, warmups = Console(), {}, {}
    status = {"interrupted": False, "error": None, "match": {}}
    configs = dict.fromkeys(("oracle", "all_uses"), shared)
    write_json(args.out / "run.json", asdict(Plan(configs, args.seeds)))
    for seed in args.seeds:
        config = replace(shared, seed=seed)
        start = prepare(config, make_task(config.task, config.task_options))
        warmups[str(seed)] = asdict(start.warmup)
        for arm in configs:
            folder = args.out / arm / f"seed-{seed}"
            with progress_bar(console, arm, config.rollout_batches) as tick:
                runs[arm, seed] = one(arm, config, start, folder, tick)
            write_json(args.out / "summary.json", summarise(configs, runs, warmups, status))
            console.print(f"{folder}: done")


if __name__ == "__main__":
    main()
