"""A head whose vocabulary is sharded over ranks: every rank keeps some rows of the weight."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .lm_head import LogprobOutput, autocast, check_tensors, logprob_with_lse
from .monitor import norm


class _SumGradients(torch.autograd.Function):
    """Identity; the gradients of the ranks, each from its own shard, are added up."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        total = grads[0].contiguous().clone()
        dist.all_reduce(total, group=ctx.group)
        return total, None


class _Sum(torch.autograd.Function):
    """Sum over the ranks; what follows is the same on each, and so is its gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
        total = x.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


def vocab_parallel_logprob(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    first: int,
    *,
    group: dist.ProcessGroup | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    grad_eps: float = 2**-12,
) -> LogprobOutput:
    """`linear_logprob` over a weight of which this rank holds rows [first, first + V_r).

    The shards' log-sum-exps lse_r are combined: lse = log sum_r exp lse_r, and with shares
    s_r = exp(lse_r - lse) of the probability, entropy = lse - sum_r s_r (lse_r - entropy_r).
    Four all-reduces of [...] values forward, one of the hidden gradient backward.

    Args:
        hidden: [..., D], the same on every rank of the group.
        weight: [V_r, D], this rank's rows.
        target: [...], int64 indices of the whole vocabulary, or `ignore_index`, the same on all.
        first: index in the whole vocabulary of this rank's first row.
        group: the ranks that share the vocabulary; None: all.
        temperature, softcap, ignore_index, grad_eps: as in `linear_logprob`.

    Returns:
        LogprobOutput of the whole vocabulary, the same on every rank. A target that no rank holds
        gives a log-prob of -lse: it is not looked for.

    Raises:
        TypeError, ValueError: as `linear_logprob`.

    Gate it with `gate.decide(energy=sharded_norm(weight.grad))`; to clip, too, pass `grad_norm` the
    norm over all parameters, of which this one is a part.
    """
    cast, weight, _ = autocast(hidden, weight, None)
    check_tensors(cast, weight, target, None)
    if not isinstance(first, int):
        raise TypeError(f"first: expected an int, got {type(first).__name__}")
    return over_shards(
        _SumGradients.apply(hidden, group), weight, target, first, group, temperature, softcap,
        ignore_index, grad_eps,
    )  # fmt: skip


def over_shards(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    first: int,
    group: dist.ProcessGroup | None,
    temperature: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    grad_eps: float = 2**-12,
) -> LogprobOutput:
    """`vocab_parallel_logprob`, whose gradient of `hidden` is this rank's part: not summed."""
    kept = target != ignore_index
    local = target - first
    inside = kept & (local >= 0) & (local < weight.shape[0])
    # Of a row whose target another rank holds, only what does not depend on the target is used.
    mine = logprob_with_lse(
        hidden, weight, local.where(inside, 0).where(kept, -100), temperature=temperature,
        softcap=softcap, ignore_index=-100, grad_eps=grad_eps,
    )  # fmt: skip
    lse_local = mine.lse
    score = mine.logp + mine.lse
    highest = lse_local.detach().clone()
    dist.all_reduce(highest, dist.ReduceOp.MAX, group=group)
    share = (lse_local - highest).exp()
    # Divided only after the sums: _Sum's gradient holds for what all ranks compute alike.
    total = _Sum.apply(share, group)
    lse = highest + total.log()
    logp = _Sum.apply(score.where(inside, 0.0), group) - lse
    entropy = lse - _Sum.apply(share * (lse_local - mine.entropy), group) / total
    sum_p2 = _Sum.apply((share / total).detach().square() * mine.sum_p2, group)
    outputs = (logp, entropy, lse.detach(), sum_p2)
    return LogprobOutput(*(o.where(kept, 0.0) for o in outputs))


def sharded_norm(gradient: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """Norm of a gradient of which every rank of the group holds a part: 0-dim fp32, the same bits.

    Args:
        gradient: this rank's part, any shape.
        group: the ranks; None: all.
    """
    squared = norm(gradient).square()
    dist.all_reduce(squared, group=group)
    return squared.sqrt().float()
