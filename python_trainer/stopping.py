"""When to stop re-using a rollout batch: one small class per arm, all behind one protocol.

Every arm steps through a `GradientGate`, with an infinite threshold where it does not gate. So
clipping, energy and metrics are the same code in all of them, and only the rule differs.
"""

from __future__ import annotations

import math
import random

import torch
from torch import Tensor

from dgg_kernels import GateConfig, GradientGate

from .config import TrainConfig


class Arm:
    """Up to K updates per batch, always (gate="off"). The other arms override one method each."""

    def __init__(
        self, config: TrainConfig, weight: Tensor, optimizer: torch.optim.Optimizer
    ) -> None:
        self.config = config
        self.gate = GradientGate(gate_config(config), weight)
        self.gate.attach(optimizer, max_grad_norm=config.max_grad_norm)

    def allows(self, use: int) -> bool:
        """Before use number `use` (from 1) of the batch: may it begin? Asked once per use."""
        return True

    def vetoes(self, kl: Tensor) -> bool:
        """After the forward: is this use, and with it the batch, to be dropped?"""
        return False

    def decide(self) -> None:
        """After the backward, before the optimizer: energy, z-score, skip flag, clipping."""
        self.gate.decide()


class DynamicGate(Arm):
    """The paper's gate on the lm_head gradient norm."""


class GlobalNormGate(Arm):
    """The same gate, fed with the norm of the whole gradient."""

    def decide(self) -> None:
        self.gate.decide(energy=self.gate.total_grad_norm())


class RandomStop(Arm):
    """A coin before each re-use: the control for "fewer updates", whatever their choice."""

    def __init__(
        self, config: TrainConfig, weight: Tensor, optimizer: torch.optim.Optimizer
    ) -> None:
        super().__init__(config, weight, optimizer)
        self.go_on = continue_probability(config.mean_uses, config.num_iterations)
        self.rng = random.Random(config.seed)

    def allows(self, use: int) -> bool:
        return use == 1 or self.rng.random() < self.go_on


class KLStop(Arm):
    """Stop when KL(old || new) of the batch exceeds `kl_stop`; that use is not applied."""

    def vetoes(self, kl: Tensor) -> bool:
        return not bool(kl <= self.config.kl_stop)


ARMS: dict[str, type[Arm]] = {
    "off": Arm,
    "dgg": DynamicGate,
    "random": RandomStop,
    "kl": KLStop,
    "global_norm": GlobalNormGate,
}
GATED = ("dgg", "global_norm")  # arms whose z-score decides


def gate_config(config: TrainConfig) -> GateConfig:
    """The gate of `config`'s arm: what `dgg_kernels.replay` needs to repeat its decisions."""
    return GateConfig(
        threshold=config.gate_threshold if config.gate in GATED else math.inf,
        window=config.gate_window,
        max_reuse=config.num_iterations,
        statistic=config.gate_statistic,  # type: ignore[arg-type]
    )


def continue_probability(mean_uses: float, cap: int) -> float:
    """q with 1 + q + … + q^(cap-1) = mean_uses: a geometric stop, cut at `cap` uses."""
    low, high = 0.0, 1.0
    for _ in range(60):
        q = (low + high) / 2
        if sum(q**k for k in range(cap)) < mean_uses:
            low = q
        else:
            high = q
    return (low + high) / 2
