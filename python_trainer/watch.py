"""What one update is measured by, over its micro-batches and all ranks."""

from __future__ import annotations

import torch
from torch import Tensor

from dgg_kernels.monitor import chi2, chi2_lower_bound, score_squared

from .config import TrainConfig
from .distributed import Ranks
from .loss import Loss
from .model import Evaluated

MEANS = ("kl", "kl_ref", "entropy", "clip_ratio")  # per token
SIGNS = {"log_ratio/negative": -1, "log_ratio/positive": 1}  # of the tokens' advantage


class Watch:
    """Collects from every micro-batch; `forward` and `chi2_bound` are collectives."""

    def __init__(self, config: TrainConfig, ranks: Ranks, tokens: Tensor) -> None:
        self.config, self.ranks = config, ranks
        self.tokens = tokens  # 0-dim: those that count, over all ranks
        self.loss = torch.zeros((), device=tokens.device)
        self.sums = dict.fromkeys(MEANS, torch.zeros((), device=tokens.device))
        self.by_sign = torch.zeros(len(SIGNS), 2, device=tokens.device)  # log-ratios, tokens
        self.weights: list[Tensor] = []
        self.score_sq: list[Tensor] = []

    @torch.no_grad()
    def add(self, seen: Evaluated, loss: Loss, mask_BC: Tensor, advantage_B: Tensor) -> None:
        """A micro-batch's part.

        The χ² bound speaks of mean_i(w_i A_i ∇logp_i) over the N counted tokens, the loss's
        gradient is Σ share_i w_i A_i ∇logp_i: so N · share_i · A_i takes the place of A_i, which is
        A_i itself with `dapo`.
        """
        out = seen.out
        self.loss = self.loss + loss.loss.detach()
        here = {"kl": loss.kl, "kl_ref": loss.kl_ref, "clip_ratio": loss.clip_ratio}
        count = mask_BC.sum()
        sums = {name: value * count for name, value in here.items() if value is not None}
        sums["entropy"] = (out.entropy * mask_BC).sum()
        self.sums = {name: self.sums[name] + sums.get(name, 0.0) for name in MEANS}
        for row, sign in zip(self.by_sign, SIGNS.values(), strict=True):
            of_sign_BC = mask_BC & (advantage_B.sign() == sign)[:, None]
            row += torch.stack([(loss.log_ratio_BC * of_sign_BC).sum(), of_sign_BC.sum()])
        self.weights.append(loss.weight_BC[mask_BC])
        scaled_BC = self.tokens * loss.share_BC * advantage_B[:, None]
        self.score_sq.append(
            score_squared(
                scaled_BC[mask_BC], out.logp[mask_BC], out.sum_p2[mask_BC],
                seen.hidden_BCD[mask_BC], self.config.temperature,
            )
        )  # fmt: skip

    def forward(self) -> dict[str, Tensor]:
        """What the forward tells, 0-dim each: the loss, per-token means, and the batch's χ²."""
        found = {
            name: self.ranks.total(s) / self.tokens.clamp_min(1) for name, s in self.sums.items()
        }
        if self.config.beta == 0:
            del found["kl_ref"]
        log_ratios, counts = self.ranks.total(self.by_sign).unbind(dim=1)
        found |= dict(zip(SIGNS, log_ratios / counts.clamp_min(1), strict=True))
        self.all_weights = self.ranks.gather(torch.cat(self.weights))
        return found | {"loss": self.ranks.total(self.loss), "gate/chi2": chi2(self.all_weights)}

    def chi2_bound(self, energy: Tensor) -> dict[str, Tensor]:
        """The lower bound of that χ² from the head gradient's norm, after `forward`.

        A KL term adds a gradient of its own: then there is no bound.
        """
        if self.config.beta > 0:
            return {}
        score_sq = self.ranks.gather(torch.cat(self.score_sq))
        bound = chi2_lower_bound(energy, self.all_weights, score_sq)
        return {"gate/chi2_lower_bound": bound}
