"""What to watch beside the gate: weight divergence per layer, and the chi-square of the batch.

Everything returned is a 0-dim tensor on the device; nothing here makes the host wait.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


class WeightDivergence:
    """Relative weight change per layer ("disproportionate weight divergence" compares layers).

    Keeps two copies of each watched weight and reads it twice per `update()`: watch the head and a
    middle layer, not the whole model.

    Args:
        weights: name -> parameter, for instance {"lm_head": head, "middle": some_mlp_weight}.
    """

    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        self._weights = dict(weights)  # not their memory, which Module.to() changes
        self._first = {name: w.detach().clone() for name, w in weights.items()}
        self._last = {name: w.clone() for name, w in self._first.items()}

    @torch.no_grad()
    def update(self) -> dict[str, Tensor]:
        """Changes since the last call and since construction.

        Returns:
            `dwd/NAME` = ||W_t - W_(t-1)||_F / ||W_(t-1)||_F and `dwd_total/NAME` =
            ||W_t - W_0||_F / ||W_0||_F, 0-dim fp32. A skipped update gives exactly 0.
        """
        changes = {}
        for name, w in self._weights.items():
            for key, old in ((f"dwd/{name}", self._last), (f"dwd_total/{name}", self._first)):
                old[name] = old[name].to(w.device)
                changes[key] = (norm(w - old[name]) / norm(old[name])).float()
            self._last[name].copy_(w)
        return changes


def norm(t: Tensor) -> Tensor:
    """Frobenius norm of bf16, fp16 or fp32 values, 0-dim fp64; of a DTensor's, a DTensor.

    Row by row, then in fp64: one fp32 sum over a large head is off by a thousandth on a CPU.
    """
    rows = torch.linalg.vector_norm(t, dim=-1, dtype=torch.float32) if t.dim() > 1 else t
    return torch.linalg.vector_norm(rows, dtype=torch.float64)


def chi2(weights: Tensor) -> Tensor:
    """Empirical Pearson chi-square divergence of the policy from the one that sampled the batch.

    Args:
        weights: [n] w_i of the tokens: the importance ratio, 0 where the loss clips the gradient.

    Returns:
        mean(w^2) - 2 mean(w) + 1, the mean of (w - 1)^2, 0-dim.
    """
    return (weights - 1).square().mean()


def chi2_lower_bound(energy: Tensor, weights: Tensor, score_sq: Tensor) -> Tensor:
    """What the head gradient's norm alone says of the chi-square: never more than `chi2(weights)`.

    With g = mean_i w_i s_i and s_i = A_i (e_yi - p_i) h_i^T / T, Cauchy-Schwarz gives
    mean(w^2) >= ||g||^2 / mean ||s_i||^2 (our derivation; see docs/algorithm.md).

    Args:
        energy: 0-dim ||g||, the head-gradient norm of mean_i w_i A_i logp_i over the same tokens.
        weights: [n] w_i as in `chi2`.
        score_sq: [n] ||s_i||^2, from `score_squared`.

    Returns:
        ||g||^2 / mean(score_sq) - 2 mean(w) + 1, 0-dim; without any score, -2 mean(w) + 1.
    """
    mean_sq = score_sq.mean()
    ratio = torch.where(mean_sq > 0, energy.square() / mean_sq, torch.zeros_like(mean_sq))
    return ratio - 2 * weights.mean() + 1


def score_squared(
    advantage: Tensor, logp: Tensor, sum_p2: Tensor, hidden: Tensor, temperature: float = 1.0
) -> Tensor:
    """||s_i||^2 = A_i^2 (1 - 2 p_y + sum_v p_v^2) ||h_i||^2 / T^2 of each token, [n] fp32.

    Args:
        advantage: [n] A_i.
        logp: [n] log-prob of the token, whose exponential is p_y.
        sum_p2: [n] from `linear_logprob`.
        hidden: [n, D] h_i.
        temperature: T of the head.
    """
    spread = 1 - 2 * logp.exp() + sum_p2
    length_sq = torch.linalg.vector_norm(hidden, dim=-1, dtype=torch.float32).square()
    return advantage.square() * spread * length_sq / temperature**2
