"""The definition that every kernel is tested against: plain PyTorch, all logits in memory."""

from __future__ import annotations

import torch
from torch import Tensor


def reference_logprob(
    hidden: Tensor,  # [N, D]
    weight: Tensor,  # [V, D]
    target: Tensor,  # [N], int64
    *,
    bias: Tensor | None = None,  # [V]
    temperature: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Log-prob of the target, entropy, log-sum-exp and sum of squared probabilities, each [N].

    With z_v = cap(h . W_v + b_v) / T, where cap(x) = s tanh(x / s) under a softcap s:

        lse = log sum_v exp z_v        logp = z_y - lse          p_v = exp(z_v - lse)
        entropy = -sum_v p_v log p_v   sum_p2 = sum_v p_v^2

    In the dtype of its inputs (fp64 for gradcheck). Ignored rows give zeros and no gradient.
    """
    kept = target != ignore_index
    logits = hidden @ weight.T
    if bias is not None:
        logits = logits + bias
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    logits = logits / temperature
    lse = logits.logsumexp(-1)
    logp_all = logits - lse[:, None]
    p = logp_all.exp()
    logp = logp_all.gather(-1, target.where(kept, 0)[:, None]).squeeze(-1)
    # 0 log 0 = 0: a banned token (bias -inf) contributes nothing.
    entropy = -(p * logp_all.masked_fill(p == 0, 0)).sum(-1)
    sum_p2 = p.square().sum(-1)
    zero = torch.zeros_like(logp)
    outputs = (logp, entropy, lse.detach(), sum_p2.detach())
    return tuple(torch.where(kept, x, zero) for x in outputs)  # pyright: ignore
