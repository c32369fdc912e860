"""Run by test_trainer_distributed.py in every rank: one arm, alone or under DDP or FSDP2."""

from __future__ import annotations

import contextlib
import os
import sys
from dataclasses import replace
from pathlib import Path

import torch.distributed as dist
from tiny_models import build
from trainer_toys import TINY, Echo

from python_trainer.config import TrainConfig
from python_trainer.loop import Progress, WarmStart, prepare, train
from python_trainer.model import Policy
from python_trainer.tokenizer import FittedTokenizer
from python_trainer.warmup import warm_up


class Killed(Exception):
    pass


def config(parallel: str, gate: str) -> TrainConfig:
    """Eight episodes are sampled at a time, so that it does not matter who samples them."""
    return replace(
        TINY, parallel=parallel, gate=gate, generation_batch_size=8, grad_eps=0.0,
        micro_batch_size=4, gate_threshold=0.0, save_every=2, lr_warmup=3,
        loss_type="dapo", scale_rewards="batch",
    )  # fmt: skip


def main(parallel: str, out: str, gate: str, model: str, updates: str = "") -> None:
    """Train; stop after so many updates if told to. All that is left is what `train` writes."""
    settings = config(parallel, gate)
    if model.startswith("embedded"):
        dtype = "bfloat16" if model.endswith("bfloat16") else "float32"
        settings = replace(settings, dtype=dtype)
        start = prepare(settings, Echo())
    else:  # one of tiny_models; a pass takes all sequences of a rank
        settings = replace(settings, micro_batch_size=None)
        policy = Policy(build(model), FittedTokenizer(128))
        start = WarmStart(Echo(), policy, warm_up(policy, Echo(), settings))

    def stop(progress: Progress) -> None:
        if updates and progress.updates_attempted >= int(updates):
            raise Killed

    with contextlib.suppress(Killed):
        train(settings, start, Path(out), Progress(), stop)
    if dist.is_initialized():
        dist.barrier()
        # Tearing gloo and DDP's reducer down in order now and then hangs at interpreter exit.
        os._exit(0)


if __name__ == "__main__":
    main(*sys.argv[1:])
