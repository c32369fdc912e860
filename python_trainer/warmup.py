"""Supervised warm-up: it gives the policy something to be rewarded for, as pre-training would."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .config import TaskError, TrainConfig
from .distributed import Ranks
from .engine import TransformersEngine
from .evaluate import Evaluator
from .model import Policy
from .rollout import expert, pack, sample
from .tasks import Task


@dataclass
class WarmUp:
    """What the warm-up came to."""

    steps: int
    accuracy: float
    reached: bool  # False: `warmup_max_steps` ended it before `warmup_accuracy`


def warm_up(policy: Policy, task: Task, config: TrainConfig) -> WarmUp:
    """Imitate expert episodes, in place, until `config.warmup_accuracy`.

    Of a task's examples, those that have an answer. The loss is the mean negative log-likelihood
    over the policy's own tokens, eos included.
    """
    evaluator = Evaluator(task, policy, config, Ranks.alone())
    engine = TransformersEngine(policy)
    if config.warmup_max_steps == 0:
        return WarmUp(0, evaluator.accuracy(policy, engine), reached=True)
    optimizer = torch.optim.AdamW(
        [p for p in policy.parameters() if p.requires_grad],
        lr=config.warmup_learning_rate, weight_decay=0.0, fused=True,
    )  # fmt: skip
    accuracy = 0.0
    for step in range(config.warmup_max_steps + 1):
        if step % config.warmup_eval_every == 0 or step == config.warmup_max_steps:
            accuracy = evaluator.accuracy(policy, engine)
        if accuracy >= config.warmup_accuracy or step == config.warmup_max_steps:
            return WarmUp(step, accuracy, reached=accuracy >= config.warmup_accuracy)
        drawn = sample(task, config.warmup_batch_size, f"{config.seed} warm-up {step}")
        examples = [example for example in drawn if example.answer is not None]
        if not examples:
            raise TaskError(
                f"task {task.name}: expected examples with an answer to imitate, got none among "
                f"{len(drawn)}; warmup_max_steps=0 does without a warm-up"
            )
        shown = pack(expert(policy.tokenizer, task, examples, config), policy.tokenizer.pad,
                     config.device)  # fmt: skip
        optimizer.zero_grad(set_to_none=True)
        size = config.micro_batch_size or len(examples)
        for first in range(0, len(examples), size):
            part = shown.rows(slice(first, first + size))
            loss = -policy(*part, config).out.logp.sum() / shown.mask_BC.sum()
            loss.backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
    raise AssertionError("unreachable")
