"""Supervised warm-up: it gives the policy something to be rewarded for, as pre-training would."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from .config import TrainConfig
from .model import CharTokenizer
from .rollout import Sequences, completion_logprobs, expected_accuracy, with_answers
from .tasks import Task

EVAL_EVERY = 5  # steps


@dataclass
class WarmUp:
    """What the warm-up came to."""

    steps: int
    accuracy: float
    reached: bool  # False: `warmup_max_steps` ended it before `warmup_accuracy`


def warm_up(
    model: Any,
    tokenizer: CharTokenizer,
    task: Task,
    held_out: Sequences,
    config: TrainConfig,
) -> WarmUp:
    """Train `model` in place on reference answers until `config.warmup_accuracy`.

    The loss is the mean negative log-likelihood over answer tokens, eos included.
    """
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=config.warmup_learning_rate, weight_decay=0.0, fused=True
    )
    accuracy = expected_accuracy(model, held_out, config)
    for step in range(config.warmup_max_steps):
        if step % EVAL_EVERY == 0:
            accuracy = expected_accuracy(model, held_out, config)
            if accuracy >= config.warmup_accuracy:
                return WarmUp(step, accuracy, reached=True)
        examples = task.sample(config.warmup_batch_size, f"{config.seed} warm-up {step}")
        sequences = with_answers(tokenizer, examples, config.device)
        out, _ = completion_logprobs(model, sequences, config)
        loss = -out.logp.sum() / sequences.mask_BC.sum()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    accuracy = expected_accuracy(model, held_out, config)
    return WarmUp(config.warmup_max_steps, accuracy, accuracy >= config.warmup_accuracy)
