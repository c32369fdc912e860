"""verl's fused head, in signature; verl itself is needed only to put this one in its place."""

from __future__ import annotations

import functools
import importlib
from contextlib import ExitStack
from typing import Any

import torch.distributed as dist
from torch import Tensor

from dgg_kernels import linear_logprob
from dgg_kernels.distributed import over_shards


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    temperature: float = 1.0,
    reduction: str = "none",
    dist_process_group: dist.ProcessGroup | None = None,
    lse: list[Tensor] | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """verl's `linear_cross_entropy`: log-probs and entropies of N tokens, without their logits.

    Args:
        hidden: [..., D], N rows.
        weight: [V, D]; with a process group this rank's V / ranks rows of it, in rank order.
        labels: [...], int64. -100 gives zeros.
        temperature: divides the logits.
        reduction: "none", "sum" or "mean" of the log-probs over all rows. Entropies stay per row.
        dist_process_group: the ranks that share the vocabulary. The gradient of `hidden` is then
            this rank's part, to be summed over the group by the caller, as with verl's kernel.
        lse: empty, or the log-sum-exps [N] of these tokens' last use, as `lse_ref`: this use's take
            their place. Without effect with a process group.
        options: of `linear_logprob`: gate, grad_eps, screen. With a process group: grad_eps.

    Returns:
        Log-probs, [N] or 0-dim, and entropies [N], fp32.

    Raises:
        ValueError: another reduction; or as `linear_logprob`.
    """
    if reduction not in ("none", "sum", "mean"):
        raise ValueError(f"reduction: expected 'none', 'sum' or 'mean', got {reduction!r}")
    hidden, labels = hidden.reshape(-1, hidden.shape[-1]), labels.reshape(-1)
    options["temperature"] = temperature
    if dist_process_group is None:
        known = lse[0] if lse and lse[0].shape == labels.shape else None
        out = linear_logprob(hidden, weight, labels, lse_ref=known, **options)
        if lse is not None:
            lse[:] = [out.lse]
    else:
        first = dist.get_rank(dist_process_group) * weight.shape[0]
        out = over_shards(hidden, weight, labels, first, dist_process_group, **options)
    logp = out.logp if reduction == "none" else getattr(out.logp, reduction)()
    return logp, out.entropy


def use_linear_cross_entropy(**options: Any) -> ExitStack:
    """Put `linear_cross_entropy` in place of verl's, for what imports it from now on.

    verl's FSDP forwards import it at each call (`use_fused_kernels`, `impl_backend=triton`), its
    Megatron ones when their module is imported.

    Args:
        options: of `linear_cross_entropy`: lse, gate, grad_eps, screen.

    Returns:
        `.close()`, or the end of a `with` block, puts back what was there.
    """
    module: Any = importlib.import_module("verl.utils.kernel.linear_cross_entropy")
    undo = ExitStack()
    undo.callback(setattr, module, "linear_cross_entropy", module.linear_cross_entropy)
    module.linear_cross_entropy = functools.partial(linear_cross_entropy, **options)
    return undo
