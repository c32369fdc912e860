"""The lm_head ops in plain PyTorch, by chunks of the vocabulary: for devices without a kernel.

Exact: every entry takes part, whatever `grad_eps` (an exact gradient is within any bound of it), so
no active set is kept. Logits of one chunk live at a time; dX is accumulated in fp32, dW is written
chunk by chunk, each from all rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import wraps
from typing import Any

import torch
from torch import Tensor

CHUNK_BYTES = 64 * 2**20  # fp32 logits held at a time


def without_autocast(op: Callable[..., Any]) -> Callable[..., Any]:
    """The op's own products are of the dtypes that it chose, in a region of autocast as well."""

    @wraps(op)
    def call(*args: Any) -> Any:
        with torch.autocast(args[0].device.type, enabled=False):
            return op(*args)

    return call


def _chunks(rows: int, vocabulary: int) -> Iterator[slice]:
    size = max(128, CHUNK_BYTES // (4 * max(rows, 1)))
    for start in range(0, vocabulary, size):
        yield slice(start, min(start + size, vocabulary))


def _logits(
    x: Tensor, weight: Tensor, bias: Tensor | None, temperature: float, softcap: float
) -> Tensor:
    z = x @ weight.float().T
    if bias is not None:
        z += bias.float()
    if softcap:
        z = z.div_(softcap).tanh_().mul_(softcap)
    return z.div_(temperature)


@without_autocast
def lm_head_forward(
    hidden: Tensor,  # [N, D]
    weight: Tensor,  # [V, D]
    target: Tensor,  # [N] int64, -1: ignored
    bias: Tensor | None,  # [V]
    temperature: float,
    softcap: float,  # 0: none
    grad_eps: float,
    lse_ref: Tensor | None,
    seed: Tensor | None,
    screen: Sequence[Tensor],  # refused before
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """logp, entropy, lse, sum_p2 [N] fp32 by an online log-sum-exp; no active set, no report."""
    n = hidden.shape[0]
    kept = target >= 0
    x = hidden.float().where(kept[:, None], 0.0)
    m = x.new_full((n,), -float("inf"))  # running maximum
    s, t, q, z_target = (x.new_zeros(n) for _ in range(4))  # sums of e, e (z - m), e^2
    for v in _chunks(n, weight.shape[0]):
        z = _logits(x, weight[v], None if bias is None else bias[v], temperature, softcap)
        m_new = torch.maximum(m, z.amax(1))
        # A chunk of nothing but banned tokens has no maximum to subtract.
        shift = torch.where(m_new == -float("inf"), 0.0, m_new)
        rescale = (m - shift).exp()
        t = rescale * (t + s * (m - shift).clamp_min(-1e4))
        s = rescale * s
        q = rescale.square() * q
        inside = (target >= v.start) & (target < v.stop)
        column = (target - v.start).where(inside, 0)
        z_target += z.gather(1, column[:, None]).squeeze(1).where(inside, 0.0)
        z.sub_(shift[:, None])
        e = z.exp()
        s += e.sum(1)
        t += e.mul(z.clamp_min_(-1e4)).sum(1)
        q += e.square_().sum(1)
        m = m_new
    log_s = s.log()
    lse = m + log_s
    outputs = (z_target - lse, log_s - t / s, lse, q / s.square())
    logp, entropy, lse, sum_p2 = (o.where(kept, 0.0) for o in outputs)
    active, report = hidden.new_empty(0, dtype=torch.int32), hidden.new_empty((0, 4)).float()
    return logp, entropy, lse, sum_p2, active, report


@without_autocast
def lm_head_backward(
    grad_logp: Tensor,  # [N] fp32
    grad_entropy: Tensor | None,  # [N] fp32
    grad_lse: Tensor | None,  # [N] fp32
    hidden: Tensor,  # [N, D]
    weight: Tensor,  # [V, D]
    target: Tensor,  # [N] int64, -1: ignored
    bias: Tensor | None,  # [V]
    lse: Tensor,  # [N] fp32
    entropy: Tensor,  # [N] fp32
    active: Tensor,
    seed: Tensor | None,
    temperature: float,
    softcap: float,
    grad_eps: float,
    screened: bool,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
    need_row_sq: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """d_hidden, d_weight, d_bias and row_sq; what is not needed is empty.

    dL/dz_iv = c_i (1[v = y_i] - p_iv) + cZ_i p_iv - cH_i p_iv (log p_iv + H_i), times
    dz/d(h . W_v).
    """
    n, vocabulary = hidden.shape[0], weight.shape[0]
    empty = hidden.new_empty(0)
    d_hidden = hidden.new_zeros(hidden.shape, dtype=torch.float32) if need_hidden else None
    d_weight = weight.new_empty(weight.shape) if need_weight else None
    d_bias = bias.new_empty(bias.shape) if need_bias and bias is not None else None
    row_sq = weight.new_empty(vocabulary, dtype=torch.float32) if need_row_sq else None
    # Rows without a coefficient do no harm either: their hidden state may hold anything.
    works = grad_logp != 0
    for grad in (grad_entropy, grad_lse):
        works = works if grad is None else works | (grad != 0)
    works &= target >= 0
    x = hidden.float().where(works[:, None], 0.0)
    c = grad_logp.where(works, 0.0)[:, None]
    c_of_p = c if grad_lse is None else c - grad_lse.where(works, 0.0)[:, None]
    c_entropy = None if grad_entropy is None else grad_entropy.where(works, 0.0)[:, None]
    for v in _chunks(n, vocabulary):
        z = _logits(x, weight[v], None if bias is None else bias[v], temperature, softcap)
        logp = z - lse[:, None]
        p = logp.exp()
        d_z = -c_of_p * p
        if c_entropy is not None:
            d_z -= c_entropy * p * (logp.clamp_min(-1e4) + entropy[:, None])
        inside = (target >= v.start) & (target < v.stop)
        column = (target - v.start).where(inside, 0)
        d_z.scatter_add_(1, column[:, None], c.where(inside[:, None], 0.0))
        if softcap:
            d_z *= 1 - (z * (temperature / softcap)).square_()
        d_z = d_z.div_(temperature).where(works[:, None], 0.0)
        if d_hidden is not None:
            d_hidden.addmm_(d_z, weight[v].float())
        if d_bias is not None:
            d_bias[v] = d_z.sum(0)
        if d_weight is not None or row_sq is not None:
            stored = (d_z.T @ x).to(weight.dtype)
            if d_weight is not None:
                d_weight[v] = stored
            if row_sq is not None:
                row_sq[v] = stored.float().square_().sum(1)
    return (
        empty if d_hidden is None else d_hidden.to(hidden.dtype),
        empty if d_weight is None else d_weight,
        empty if d_bias is None else d_bias,
        empty.float() if row_sq is None else row_sq,
    )
