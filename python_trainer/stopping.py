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
from .distributed import whole
from .model import Policy


class Arm:
    """Up to K updates per batch, always (gate="off"). The other arms override one method each."""

    def __init__(
        self, config: TrainConfig, policy: Policy, optimizer: torch.optim.Optimizer
    ) -> None:
        self.config, self.head = config, policy.head.weight
        self.gate = GradientGate(gate_config(config, policy), self.head)
        self.gate.attach(optimizer, max_grad_norm=config.max_grad_norm)

    def allows(self, batch: int, use: int) -> bool:
        """Before use number `use` of rollout batch `batch` (both from 1): may it begin?"""
        return True

    def vetoes(self, kl: Tensor) -> bool:
        """Before the decision: is this use, and with it the batch, to be dropped?"""
        return False

    def decide(self) -> None:
        """After the backward, before the optimizer: energy, z-score, skip flag, clipping."""
        self.gate.decide()

    def head_energy(self) -> Tensor:
        """After the decision: norm of the lm_head's gradient, 0-dim."""
        return self.gate.metrics()["gate/energy"]


class DynamicGate(Arm):
    """The paper's gate on the lm_head gradient norm."""


class GlobalNormGate(Arm):
    """The same gate, fed with the norm of the whole gradient."""

    def decide(self) -> None:
        # Before the optimizer's step, which clips the gradient in place.
        self._head_norm = whole(torch.linalg.vector_norm(self.head.grad, dtype=torch.float32))
        self.gate.decide(energy=self.gate.total_grad_norm())

    def head_energy(self) -> Tensor:
        return self._head_norm


class RandomStop(Arm):
    """A coin before each re-use: the control for "fewer updates", whatever their choice."""

    def __init__(
        self, config: TrainConfig, policy: Policy, optimizer: torch.optim.Optimizer
    ) -> None:
        super().__init__(config, policy, optimizer)
        self.go_on = continue_probability(config.mean_uses, config.num_iterations)

    def allows(self, batch: int, use: int) -> bool:
        coin = random.Random(f"{self.config.seed} stop {batch} {use}").random()
        return use == 1 or coin < self.go_on


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


def gate_config(config: TrainConfig, policy: Policy) -> GateConfig:
    """The gate of `config`'s arm: what `dgg_kernels.replay` needs to repeat its decisions."""
    several = config.micro_batch_size is not None  # backward passes add up in .grad
    frozen = not policy.head.weight.requires_grad
    return GateConfig(
        threshold=config.gate_threshold if config.gate in GATED else math.inf,
        window=config.gate_window,
        max_reuse=config.num_iterations,
        statistic=config.gate_statistic,  # type: ignore[arg-type]
        # What the head alone gets, where .grad does not hold it.
        accumulate=frozen or (policy.tied and several),
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
