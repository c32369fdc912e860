"""GRPO's advantages and loss, a few lines each over per-token log-probabilities.

Left out of GRPO as published (Shao et al., arXiv 2402.03300): nothing of the objective. Entropy
bonuses, token-level advantages and sequence-level ratios (GSPO) are not here.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .config import TrainConfig


@dataclass
class Loss:
    """The loss and what it was made of. All 0-dim unless a suffix says otherwise."""

    loss: Tensor  # differentiable
    kl: Tensor  # k3 estimate of KL(old || new), nats per token
    kl_ref: Tensor | None  # k3 estimate of KL(new || warm start), nats per token; with beta > 0
    clip_ratio: Tensor  # share of tokens whose gradient the clip cuts off
    weight_BC: Tensor  # importance ratio; 0 where clipped or masked: the w of the χ² monitor
    share_BC: Tensor  # each token's share of the loss; sums to 1 over the mask


def group_advantages(reward_B: Tensor, num_generations: int) -> Tensor:
    """(r - mean) / (std + 1e-4) within each group of neighbours, [B]. A group of equals gets 0."""
    reward_PG = reward_B.view(-1, num_generations)
    centred_PG = reward_PG - reward_PG.mean(dim=1, keepdim=True)
    return (centred_PG / (reward_PG.std(dim=1, keepdim=True) + 1e-4)).flatten()


def token_shares(mask_BC: Tensor, loss_type: str) -> Tensor:
    """How much of the loss each token is, [B, C]; 0 where masked, sum 1.

    `grpo` averages over the tokens of a sequence, then over sequences: 1 / (B |o_i|).
    `dapo` averages over all tokens of the batch: 1 / Σ|o_i| (Yu et al., arXiv 2503.14476).
    """
    mask_BC = mask_BC.float()
    if loss_type == "grpo":
        return mask_BC / mask_BC.sum(dim=1, keepdim=True).clamp_min(1.0) / len(mask_BC)
    return mask_BC / mask_BC.sum().clamp_min(1.0)


def policy_loss(
    logp_BC: Tensor,
    old_logp_BC: Tensor,
    advantage_B: Tensor,
    mask_BC: Tensor,
    config: TrainConfig,
    ref_logp_BC: Tensor | None = None,
) -> Loss:
    """The clipped surrogate -Σ share · min(r A, clip(r) A) + beta · Σ share · k3(ref).

    r = exp(logp - old_logp) per token; `share` is `token_shares` (mask and normalisation in one).
    k3(q) = exp(q - logp) - (q - logp) - 1 estimates KL(new || ref) on samples of the new policy,
    and with the roles swapped KL(old || new) on samples of the old one (Schulman, 2020).
    """
    low, high = config.clip_range
    share_BC = token_shares(mask_BC, config.loss_type)
    advantage_B1 = advantage_B[:, None]
    log_ratio_BC = logp_BC - old_logp_BC
    ratio_BC = log_ratio_BC.exp()
    surrogate_BC = torch.minimum(ratio_BC * advantage_B1, ratio_BC.clamp(low, high) * advantage_B1)
    loss = -(share_BC * surrogate_BC).sum()

    kl_ref = None
    if ref_logp_BC is not None:
        delta_BC = ref_logp_BC - logp_BC
        kl_ref = (share_BC * (delta_BC.exp() - delta_BC - 1.0)).sum()
        loss = loss + config.beta * kl_ref
        kl_ref = kl_ref.detach()

    with torch.no_grad():
        tokens = mask_BC.sum().clamp_min(1)
        # The min picks the clipped, constant branch on one side only, by the advantage's sign.
        clipped_BC = mask_BC & (
            ((ratio_BC > high) & (advantage_B1 > 0)) | ((ratio_BC < low) & (advantage_B1 < 0))
        )
        kl = ((ratio_BC - log_ratio_BC - 1.0) * mask_BC).sum() / tokens
        weight_BC = ratio_BC * (mask_BC & ~clipped_BC)
        clip_ratio = clipped_BC.sum() / tokens
    return Loss(loss, kl, kl_ref, clip_ratio, weight_BC, share_BC)
