"""The training loop of one arm: GRPO with gated re-use of each rollout batch.

What the rows of `metrics.jsonl` hold is told at `update_row` and `evaluate`.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from dgg_kernels.monitor import WeightDivergence, chi2, chi2_lower_bound, score_squared

from .config import TrainConfig
from .files import MetricsLog, Row
from .loss import Loss, group_advantages, policy_loss
from .model import CharTokenizer, build_model, head_weight, middle_weight
from .rollout import (
    Rollout,
    Sequences,
    completion_logprobs,
    expected_accuracy,
    rollout,
    with_answers,
)
from .stopping import ARMS
from .tasks import Task
from .warmup import WarmUp, warm_up


@dataclass
class WarmStart:
    """What all arms of a comparison begin from."""

    task: Task
    tokenizer: CharTokenizer
    model: Any  # each arm trains a copy
    held_out: Sequences
    warmup: WarmUp


@dataclass
class ArmResult:
    """Counters of one arm, kept up to date while it runs, so that an interrupted one has them."""

    rollouts: int = 0  # rollout batches drawn
    sequences: int = 0  # completions sampled: rollouts * prompts_per_batch * num_generations
    updates_attempted: int = 0  # uses begun, applied or not
    updates_applied: int = 0
    accuracy: list[tuple[int, float]] = field(default_factory=list)  # (rollouts, accuracy)
    seconds: dict[str, float] = field(
        default_factory=lambda: {"rollout": 0.0, "update": 0.0, "evaluate": 0.0}
    )
    finished: bool = False

    @property
    def mean_uses(self) -> float:
        """Applied updates per rollout batch."""
        return self.updates_applied / max(self.rollouts, 1)


def prepare(config: TrainConfig, task: Task) -> WarmStart:
    """Build and warm up the model; deterministic in `config`."""
    torch.set_num_threads(config.threads)
    torch.manual_seed(config.seed)
    tokenizer = CharTokenizer(config.vocab_size)
    model = build_model(config)
    examples = task.sample(config.eval_prompts, "held-out", held_out=True)
    held_out = with_answers(tokenizer, examples, config.device)
    warmup = warm_up(model, tokenizer, task, held_out, config)
    return WarmStart(task, tokenizer, model, held_out, warmup)


def train(
    config: TrainConfig,
    start: WarmStart,
    log: MetricsLog,
    result: ArmResult,
    tick: Callable[[ArmResult], None] = lambda _: None,
) -> None:
    """Train a copy of the warm start; rows go to `log`, counters to `result`.

    Bit-reproducible for a seed, machine and torch version: prompts depend on (seed, batch) alone,
    so that all arms meet the same ones; sampling has its own generator; torch's default generator
    (which seeds `linear_logprob`'s random tail) is reseeded here.

    Raises:
        TaskError: the task's verifier failed. `log` and `result` hold all that came before.
    """
    torch.set_num_threads(config.threads)
    torch.manual_seed(config.seed)
    generator = torch.Generator(config.device).manual_seed(config.seed)
    model = copy.deepcopy(start.model)
    reference = copy.deepcopy(model).requires_grad_(False) if config.beta > 0 else None
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay, fused=True
    )
    head, middle = head_weight(model), middle_weight(model)
    arm = ARMS[config.gate](config, head, optimizer)
    divergence = WeightDivergence({"lm_head": head, "middle": middle})
    evaluate(model, start, config, log, result)

    for batch in range(config.rollout_batches):
        began = time.perf_counter()
        examples = start.task.sample(config.prompts_per_batch, f"{config.seed} train {batch}")
        drawn = rollout(model, start.tokenizer, start.task, examples, config, generator)
        result.rollouts += 1
        result.sequences += len(drawn.reward_B)
        advantage_B = group_advantages(drawn.reward_B, config.num_generations)
        mask_BC = drawn.sequences.mask_BC
        ref_logp_BC = reference_logprobs(reference, drawn, config)
        lse_BC = drawn.lse_BC
        result.seconds["rollout"] += time.perf_counter() - began

        began = time.perf_counter()
        arm.gate.new_batch()
        for use in range(1, config.num_iterations + 1):
            if not arm.allows(use):
                break
            optimizer.zero_grad(set_to_none=True)
            out, hidden_BCD = completion_logprobs(
                model, drawn.sequences, config, lse_ref_BC=lse_BC, gate=arm.gate
            )
            loss = policy_loss(
                out.logp, drawn.old_logp_BC, advantage_B, mask_BC, config, ref_logp_BC
            )
            result.updates_attempted += 1
            if arm.vetoes(loss.kl):
                log.write(update_row(result, drawn, out, loss, use=use, applied=False))
                break
            loss.loss.backward()
            monitors = chi2_monitors(head.grad, out, hidden_BCD, loss, advantage_B, mask_BC, config)
            arm.decide()
            optimizer.step()  # does nothing when the gate is shut
            # The trainer logs every update, so it reads the flag at once; a loop that does not
            # want to wait for the device asks with wait=False (see GradientGate).
            shut = arm.gate.is_shut(wait=True)
            result.updates_applied += not shut
            monitors |= arm.gate.metrics() | divergence.update()
            log.write(update_row(result, drawn, out, loss, monitors, use, applied=not shut))
            if shut:
                break
            lse_BC = out.lse
        result.seconds["update"] += time.perf_counter() - began

        if (batch + 1) % config.eval_every == 0 or batch + 1 == config.rollout_batches:
            evaluate(model, start, config, log, result)
        tick(result)
    result.finished = True


def evaluate(
    model: Any, start: WarmStart, config: TrainConfig, log: MetricsLog, result: ArmResult
) -> None:
    """Log the exact expected accuracy on the held-out prompts."""
    began = time.perf_counter()
    accuracy = expected_accuracy(model, start.held_out, config)
    result.accuracy.append((result.rollouts, accuracy))
    log.write({
        "type": "eval",
        "rollouts": result.rollouts,
        "sequences": result.sequences,
        "updates_attempted": result.updates_attempted,
        "updates_applied": result.updates_applied,
        "accuracy": accuracy,
    })  # fmt: skip
    result.seconds["evaluate"] += time.perf_counter() - began


@torch.no_grad()
def reference_logprobs(reference: Any, drawn: Rollout, config: TrainConfig) -> Tensor | None:
    """Log-probs [B, C] under the warm start; None without a KL term."""
    if reference is None:
        return None
    return completion_logprobs(reference, drawn.sequences, config)[0].logp


def chi2_monitors(
    head_grad: Tensor | None,
    out: Any,
    hidden_BCD: Tensor,
    loss: Loss,
    advantage_B: Tensor,
    mask_BC: Tensor,
    config: TrainConfig,
) -> dict[str, Tensor]:
    """The batch's Pearson χ² and its lower bound from the head gradient's norm, 0-dim each.

    The bound speaks of mean_i(w_i A_i ∇logp_i) over the N counted tokens. The loss's gradient is
    Σ share_i w_i A_i ∇logp_i; so N · share_i · A_i takes the place of A_i, which is A_i itself
    with `dapo`. A KL term adds a gradient of its own: then there is no bound.
    """
    weight_N = loss.weight_BC[mask_BC]
    monitors = {"gate/chi2": chi2(weight_N)}
    if head_grad is not None and config.beta == 0:
        scaled_BC = mask_BC.sum() * loss.share_BC * advantage_B[:, None]
        score_sq_N = score_squared(
            scaled_BC[mask_BC], out.logp[mask_BC].detach(), out.sum_p2[mask_BC],
            hidden_BCD[mask_BC].detach(), config.temperature,
        )  # fmt: skip
        energy = torch.linalg.vector_norm(head_grad, dtype=torch.float32)
        monitors["gate/chi2_lower_bound"] = chi2_lower_bound(energy, weight_N, score_sq_N)
    return monitors


def update_row(
    result: ArmResult,
    drawn: Rollout,
    out: Any,
    loss: Loss,
    monitors: dict[str, Tensor] | None = None,
    use: int = 1,
    applied: bool = True,
) -> Row:
    """One attempted update. Without `monitors` (a use dropped before its backward) they are null.

    `rollouts` counts rollout batches and `sequences` completions, this batch included;
    `updates_applied` includes this update if it was applied. `reward` is the batch's mean. `kl` is
    KL(old || new) and `kl_ref` that to the warm start, nats per token, as `entropy`; `clip_ratio`
    the share of tokens whose gradient the clip cuts off. `gate/reuse` counts uses from 1;
    `gate/energy` is the norm that the gate scored, `grad_norm` the global one before clipping.
    `dwd/*` is ‖W_t - W_{t-1}‖ / ‖W_{t-1}‖ (0 when discarded), `dwd_total/*` that against W_0.
    """
    names = (
        "grad_norm", "gate/energy", "gate/z", "gate/chi2", "gate/chi2_lower_bound",
        "dwd/lm_head", "dwd/middle", "dwd_total/lm_head", "dwd_total/middle",
    )  # fmt: skip
    monitors = monitors or {}
    mask_BC = drawn.sequences.mask_BC
    return {
        "type": "update",
        "step": result.updates_attempted,
        "rollouts": result.rollouts,
        "sequences": result.sequences,
        "updates_attempted": result.updates_attempted,
        "updates_applied": result.updates_applied,
        "reward": float(drawn.reward_B.mean()),
        "loss": float(loss.loss.detach()),
        "kl": float(loss.kl),
        "kl_ref": None if loss.kl_ref is None else float(loss.kl_ref),
        "entropy": float((out.entropy.detach() * mask_BC).sum() / mask_BC.sum()),
        "clip_ratio": float(loss.clip_ratio),
        "completion_length": float(mask_BC.sum() / len(mask_BC)),
        "gate/shut": not applied,
        "gate/reuse": use,
        **{name: float(monitors[name]) if name in monitors else None for name in names},
    }
