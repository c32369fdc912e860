"""Advantages and losses of GRPO and its relatives, a few lines each over log-probs [B, C].

`loss_type` and every other name and value are TRL's (1.16), which a test holds them to:

    grpo     clipped ratio per token; mean over a sequence's tokens, then over sequences
    dr_grpo  the same, over a constant: 1 / (B max_completion_length) (arXiv 2503.20783)
    bnpo     the same, over all tokens of the batch: 1 / Σ|o_i|
    dapo     the same as bnpo here, where Σ|o_i| spans all micro-batches of an update in either; in
             TRL it does so in dapo alone (arXiv 2503.14476)
    cispo    no clipping: the ratio, capped and detached, weighs -A logp; over all tokens
             (MiniMax-M1, arXiv 2506.13585)
    gspo     one ratio per sequence, exp of the mean log-ratio; otherwise grpo (arXiv 2507.18071).
             In TRL: importance_sampling_level="sequence" with loss_type="grpo"

Where TRL and the papers differ, TRL is followed:
- `epsilon_high` of cispo is the cap itself (ScaleRL's ε_max, arXiv 2510.13786), not 1 + ε.
- The KL term is r · k3, not the bare k3 of GRPO (arXiv 2402.03300): on samples of the old policy
  its gradient is that of KL(new || ref), and the bare one's is not (DeepSeek-V3.2,
  arXiv 2512.02556). TRL's `use_bias_correction_kl=False` has no counterpart here.
- DAPO's and CISPO's formulas divide by the tokens of one prompt's group; here it is by those of
  the batch. Dr. GRPO's divides by nothing; here it is by a constant, as in its authors' code.
- A completion that is masked as truncated still counts in the B of grpo, gspo and dr_grpo, and in
  its group's mean and standard deviation.

Left out: entropy bonuses, token-level advantages, the two-sided clip `delta`, sapo, luspo, vespo.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .config import TrainConfig


@dataclass
class Loss:
    """The loss and what it was made of. All 0-dim unless a suffix says otherwise."""

    loss: Tensor  # differentiable
    kl: Tensor  # k3 estimate of KL(old || new), nats per token
    kl_ref: Tensor | None  # estimate of KL(new || warm start), nats per token; with beta > 0
    clip_ratio: Tensor  # share of tokens whose gradient the clip cuts off (cispo: caps)
    # What multiplies share · A · ∇logp in the surrogate's gradient: the importance ratio (gspo: its
    # sequence's), 0 where clipped or masked, the cap where capped. The w of the χ² monitor.
    weight_BC: Tensor
    share_BC: Tensor  # each token's share of the loss: token_shares
    log_ratio_BC: Tensor  # logp - old_logp of each token, detached; 0 where masked


def group_advantages(
    reward_B: Tensor, num_generations: int, scale_rewards: str = "group"
) -> Tensor:
    """(r - mean) / (std + 1e-4), [B], with the mean of each group of neighbours.

    The standard deviation (of n - 1) is that of the group, of the whole "batch", or left out
    ("none": Dr. GRPO). A group of equals gets 0.
    """
    reward_PG = reward_B.view(-1, num_generations)
    # In fp64: the fp32 mean of eight times 0.6 is not 0.6, and Adam makes whole steps of the rest.
    exact_PG = reward_PG.double()
    centred_B = (exact_PG - exact_PG.mean(dim=1, keepdim=True)).float().flatten()
    if scale_rewards == "none":
        return centred_B
    if scale_rewards == "batch":
        return centred_B / (reward_B.std() + 1e-4)
    return centred_B / (reward_PG.std(dim=1).repeat_interleave(num_generations) + 1e-4)


def token_shares(
    mask_BC: Tensor, config: TrainConfig, total: Callable[[Tensor], Tensor] = lambda x: x
) -> Tensor:
    """How much of the loss each token is, [B, C] fp32; 0 where masked.

    1 / (B |o_i|) with `grpo` and `gspo`, 1 / (B max_completion_length) with `dr_grpo`, else
    1 / Σ|o_i|. The sum is 1, but for `dr_grpo` and for rows that are masked as a whole. `total`
    sums a 0-dim tensor over the ranks, each of which holds a part of the batch.
    """
    mask_BC = mask_BC.float()
    rows = total(mask_BC.new_tensor(len(mask_BC)))
    if config.loss_type in ("grpo", "gspo"):
        return mask_BC / mask_BC.sum(dim=1, keepdim=True).clamp_min(1.0) / rows
    if config.loss_type == "dr_grpo":
        return mask_BC / (rows * config.max_completion_length)
    return mask_BC / total(mask_BC.sum()).clamp_min(1.0)


def policy_loss(
    logp_BC: Tensor,
    old_logp_BC: Tensor,
    advantage_B: Tensor,
    mask_BC: Tensor,
    config: TrainConfig,
    ref_logp_BC: Tensor | None = None,
    share_BC: Tensor | None = None,
) -> Loss:
    """-Σ share · surrogate + beta · Σ share · r · k3, with share of `token_shares`.

    r = exp(logp - old_logp) per token, or exp of its mean over the sequence with `gspo`; the
    surrogate is min(r A, clip(r) A), or min(r, epsilon_high).detach() A logp with `cispo`.
    k3 = exp(ref - logp) - (ref - logp) - 1 estimates KL(new || ref) on samples of the new policy,
    to which r carries those of the old one; with the roles swapped it gives KL(old || new)
    (Schulman, 2020). Values at masked positions do not matter, be they NaN.
    """
    low, high = config.clip_range
    cispo = config.loss_type == "cispo"
    if share_BC is None:  # else these are some rows of a larger batch
        share_BC = token_shares(mask_BC, config)
    advantage_B1 = advantage_B[:, None]
    logp_BC = logp_BC.masked_fill(~mask_BC, 0.0)
    token_log_ratio_BC = logp_BC - old_logp_BC.masked_fill(~mask_BC, 0.0)
    log_ratio_BC = token_log_ratio_BC
    if config.loss_type == "gspo":
        length_B1 = mask_BC.sum(dim=1, keepdim=True).clamp_min(1)
        mean_B1 = token_log_ratio_BC.sum(dim=1, keepdim=True) / length_B1
        log_ratio_BC = mean_B1.expand_as(logp_BC)
    ratio_BC = log_ratio_BC.exp()
    bounded_BC = ratio_BC.clamp(low, high)
    if cispo:
        surrogate_BC = bounded_BC.detach() * advantage_B1 * logp_BC
    else:
        surrogate_BC = torch.minimum(ratio_BC * advantage_B1, bounded_BC * advantage_B1)
    loss = -(share_BC * surrogate_BC).sum()

    tokens = mask_BC.sum().clamp_min(1)
    kl_ref = None
    if ref_logp_BC is not None:
        delta_BC = ref_logp_BC.masked_fill(~mask_BC, 0.0) - logp_BC
        kl_ref_BC = ratio_BC * (delta_BC.exp() - delta_BC - 1.0)
        loss = loss + config.beta * (share_BC * kl_ref_BC).sum()
        kl_ref = (kl_ref_BC.detach() * mask_BC).sum() / tokens

    with torch.no_grad():
        # The min picks the clipped, constant branch on one side only, by the advantage's sign;
        # the cap of cispo holds on either side.
        over_BC = (ratio_BC > high) & ((advantage_B1 > 0) | cispo)
        clipped_BC = mask_BC & (over_BC | ((ratio_BC < low) & (advantage_B1 < 0)))
        weight_BC = ratio_BC.masked_fill(clipped_BC, high if cispo else 0.0) * mask_BC
        kl = ((token_log_ratio_BC.exp() - token_log_ratio_BC - 1.0) * mask_BC).sum() / tokens
        clip_ratio = clipped_BC.sum() / tokens
    log_ratio_BC = token_log_ratio_BC.detach()
    return Loss(loss, kl, kl_ref, clip_ratio, weight_BC, share_BC, log_ratio_BC)
