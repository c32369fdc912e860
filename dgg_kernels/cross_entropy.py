"""`linear_cross_entropy`: supervised fine-tuning over the same op."""

from __future__ import annotations

from numbers import Real
from typing import Literal

import torch
from torch import Tensor

from .lm_head import autocast, check_tensors, logprob_with_lse


def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    reduction: Literal["mean", "sum", "none"] = "mean",
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    grad_eps: float = 2**-12,
) -> Tensor:
    """Cross-entropy of a linear head, without its logits.

    As `torch.nn.functional.linear_cross_entropy` with class-index targets. Class weights and class
    probabilities are not offered.

    Args:
        input: [..., D], bf16, fp16 or fp32.
        linear_weight: [V, D].
        target: [...], int64 class indices.
        linear_bias: [V] or None.
        reduction: "mean" over the targets that are not ignored, "sum", or "none" for [...].
        ignore_index: target whose rows give 0 and no gradient.
        label_smoothing: weight in [0, 1] of the uniform distribution mixed into the target's.
        grad_eps: as in `linear_logprob`.

    Returns:
        The loss, fp32: 0-dim, or [...] under "none". The mean of no target is NaN, as in torch.

    Raises:
        ValueError: `reduction` or `label_smoothing` out of range; else as `linear_logprob`.
    """
    if not isinstance(reduction, str) or reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction: expected 'mean', 'sum' or 'none', got {reduction!r}")
    if not (isinstance(label_smoothing, Real) and 0 <= label_smoothing <= 1):
        raise ValueError(f"label_smoothing: expected a number in [0, 1], got {label_smoothing!r}")
    input, linear_weight, linear_bias = autocast(input, linear_weight, linear_bias)
    names = ("input", "linear_weight", "linear_bias")
    check_tensors(input, linear_weight, target, linear_bias, names=names)
    out = logprob_with_lse(
        input, linear_weight, target, bias=linear_bias, ignore_index=ignore_index, grad_eps=grad_eps
    )
    loss = -out.logp
    kept = target != ignore_index
    if label_smoothing:
        # -(1 - s) logp_y - s mean_v logp_v = -logp_y + s (z_y - mean_v z_v), and mean_v z_v is the
        # product with the mean weight: no logits are needed for it.
        mean_weight = linear_weight.sum(0, dtype=torch.float32) / linear_weight.shape[0]
        # What an ignored row holds must not reach the mean weight's gradient.
        mean = (input.float().where(kept[..., None], 0.0) * mean_weight).sum(-1)
        if linear_bias is not None:
            mean = mean + linear_bias.float().mean()
        gap = out.logp + out.lse - mean
        loss = loss + label_smoothing * gap.where(kept, 0.0)
    if reduction == "none":
        return loss
    return loss.sum() if reduction == "sum" else loss.sum() / torch.count_nonzero(kept)
