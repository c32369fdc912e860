"""When to stop re-using a rollout batch: one small class per arm, all behind one protocol.

Every arm steps through a `GradientGate`, with an infinite threshold where no z-score decides. So
clipping, energy, skipping and metrics are the same code in all of them, and only the rule differs.
"""

from __future__ import annotations

import math
import random
from statistics import fmean, pstdev
from typing import Any

import torch
from torch import Tensor

from dgg_kernels import GateConfig, GradientGate
from dgg_kernels.monitor import norm

from .config import ConfigError, TrainConfig
from .distributed import Ranks, whole
from .model import Policy


class Arm:
    """Up to K passes over a batch, as far as its gate lets them: the paper's, on the norm of the
    lm_head's gradient, or (gate="off") one that never shuts. Other arms override a method each.
    """

    scored = "gate/energy"  # what, of a row of metrics.jsonl, the gate scores

    def __init__(
        self, config: TrainConfig, policy: Policy, optimizer: torch.optim.Optimizer
    ) -> None:
        self.config, self.policy, self.optimizer = config, policy, optimizer
        self.gate = GradientGate(gate_config(config, policy), policy.head.weight)
        self.gate.attach(optimizer, max_grad_norm=config.max_grad_norm)
        self.memory: list[float] = []  # what else a checkpoint must hold

    def allows(self, batch: int, update: int) -> bool:
        """Before update number `update` from rollout batch `batch` (both from 1): may it begin?"""
        return True

    def foresee(self, seen: dict[str, Tensor]) -> None:
        """After the forward, before (the last) backward: shut the gate, for what was seen."""

    def decide(self) -> None:
        """After the backward, before the optimizer: energy, z-score, skip flag, clipping."""
        self.gate.decide()

    def goes_on(self, applied: bool) -> bool:
        """After the optimizer's step: may the batch be used again?"""
        return applied

    def head_energy(self) -> Tensor:
        """After the decision: norm of the lm_head's gradient, 0-dim; NaN where it is not known."""
        return self.gate.metrics()["gate/energy"]


class NormGate(Arm):
    """The same gate, fed with the norm of another gradient: before the step, which clips it."""

    def decide(self) -> None:
        head = self.policy.head.weight
        # Of a tied one the gradient is the embedding's as well.
        unknown = torch.full((), math.nan, device=head.device)
        self._head_norm = unknown if self.policy.tied else norm_of(head)
        self.gate.decide(energy=self.signal())

    def signal(self) -> Tensor:
        """The norm of all gradients."""
        return self.gate.total_grad_norm()

    def head_energy(self) -> Tensor:
        return self._head_norm


class MiddleLayerGate(NormGate):
    """Fed with that of a weight in the middle of the model."""

    def signal(self) -> Tensor:
        return norm_of(self.policy.middle)


class GainGate(Arm):
    """Shuts before the backward, when the last update lowered the loss by less than usual.

    The increment of the loss within a batch is what that update failed to gain: the same score, of
    a signal that costs a forward.
    """

    scored = "loss"

    def foresee(self, seen: dict[str, Tensor]) -> None:
        self.gate.foresee(seen[self.scored])


class LogRatioGate(Arm):
    """Shuts before the backward, when the last update pushed bad tokens down more than usual.

    Fed with minus the mean log-ratio of the tokens of negative advantage.
    """

    scored = "log_ratio/negative"

    def foresee(self, seen: dict[str, Tensor]) -> None:
        self.gate.foresee(-seen[self.scored])


class KLStop(Arm):
    """Shuts before the backward, when KL(old || new) of the batch exceeds `kl_stop`."""

    def foresee(self, seen: dict[str, Tensor]) -> None:
        self.gate.foresee(within(self.config.kl_stop, seen["kl"], 0.0))


class Chi2Stop(Arm):
    """The same with the Pearson χ² of the batch and `chi2_stop`."""

    def foresee(self, seen: dict[str, Tensor]) -> None:
        self.gate.foresee(within(self.config.chi2_stop, seen["gate/chi2"], 0.0))


class GainKLGate(GainGate):
    """The gain gate, and a KL stop beside it: until its window is full, and where no clip is."""

    def foresee(self, seen: dict[str, Tensor]) -> None:
        self.gate.foresee(within(self.config.kl_stop, seen["kl"], seen[self.scored]))


class RandomStop(Arm):
    """A coin before each further pass: the control for "fewer updates", whatever their choice."""

    def __init__(
        self, config: TrainConfig, policy: Policy, optimizer: torch.optim.Optimizer
    ) -> None:
        super().__init__(config, policy, optimizer)
        self.go_on = continue_probability(config.mean_uses, config.num_iterations)

    def allows(self, batch: int, update: int) -> bool:
        use, within = divmod(update - 1, self.config.mini_batches)
        if use == 0 or within > 0:
            return True
        coin = random.Random(f"{self.config.seed} stop {batch} {use + 1}").random()
        return coin < self.go_on


class ShuffledStop(Arm):
    """As many updates from each batch as another run made of some other: its counts, shuffled.

    Among `shuffle_within` batches in a row they keep that run's trend over time.
    """

    def __init__(
        self, config: TrainConfig, policy: Policy, optimizer: torch.optim.Optimizer
    ) -> None:
        super().__init__(config, policy, optimizer)
        if len(config.use_counts) < config.rollout_batches:
            raise ConfigError(
                f"use_counts: expected one of each of {config.rollout_batches} rollout batches, "
                f"got {len(config.use_counts)}"
            )
        self.counts, rng = [], random.Random(f"{config.seed} shuffled")
        size = config.shuffle_within or len(config.use_counts)
        for first in range(0, len(config.use_counts), size):
            block = list(config.use_counts[first : first + size])
            rng.shuffle(block)
            self.counts += block

    def allows(self, batch: int, update: int) -> bool:
        return update <= self.counts[batch - 1]


class SkipStep(Arm):
    """Fixed re-use that skips, and does not stop at, updates of an outlying gradient norm.

    OLMo's rule on the norm: above mean + 6 standard deviations of the last 128.
    """

    def decide(self) -> None:
        norm = float(self.gate.total_grad_norm())
        known = self.memory
        outlier = len(known) >= 64 and not norm <= fmean(known) + 6 * pstdev(known)
        if math.isfinite(norm):
            self.memory = [*known, norm][-128:]
        if outlier:
            self.gate.decide(energy=torch.tensor(math.nan, device=self.config.device))
        else:
            self.gate.decide()

    def goes_on(self, applied: bool) -> bool:
        if not applied:
            self.gate.new_batch()  # opens the gate for the next use
        return True


class ZClip(Arm):
    """Fixed re-use that scales outlying gradients down (arXiv 2504.02507), and stops at none.

    Beyond z = 2.5 of the running mean m and deviation s (decay 0.97, 25 norms to begin with), a
    norm becomes m + s 2.5² / z.
    """

    def decide(self) -> None:
        norm = float(self.gate.total_grad_norm())
        if math.isfinite(norm):
            self._clip(norm)
        self.gate.decide()

    def _clip(self, norm: float) -> None:
        count, mean, variance = self.memory or (0, 0.0, 0.0)
        if count < 25:  # exact, over all so far
            last, mean = mean, mean + (norm - mean) / (count + 1)
            variance += ((norm - last) * (norm - mean) - variance) / (count + 1)
            self.memory = [count + 1, mean, variance]
            return
        z = (norm - mean) / (math.sqrt(variance) + 1e-6)
        if z > 2.5:
            to = mean + 2.5**2 / z * math.sqrt(variance)
            for group in self.optimizer.param_groups:
                for p in group["params"]:
                    if p.grad is not None:
                        p.grad.mul_(to / norm)
            norm = to
        mean = 0.97 * mean + 0.03 * norm
        self.memory = [count, mean, 0.97 * variance + 0.03 * (norm - mean) ** 2]


ARMS: dict[str, type[Arm]] = {
    "off": Arm,
    "dgg": Arm,
    "gain": GainGate,
    "gain_kl": GainKLGate,
    "log_ratio": LogRatioGate,
    "random": RandomStop,
    "shuffled": ShuffledStop,
    "kl": KLStop,
    "chi2": Chi2Stop,
    "global_norm": NormGate,
    "middle_norm": MiddleLayerGate,
    "skip_step": SkipStep,
    "zclip": ZClip,
}
# Arms whose z-score decides.
GATED = ("dgg", "gain", "gain_kl", "log_ratio", "global_norm", "middle_norm")


def within(limit: float, value: Tensor, signal: Tensor | float) -> Tensor:
    """The signal for a gate that also shuts where `value` is above the limit, or NaN."""
    return torch.where(value <= limit, signal, math.nan)  # NaN always shuts


def norm_of(parameter: Tensor) -> Tensor:
    """Of its gradient, 0-dim, over all ranks; NaN of a frozen one."""
    if not parameter.requires_grad:
        return torch.full((), math.nan, device=parameter.device)
    gradient: Any = parameter.grad
    return whole(norm(gradient))


def gate_config(config: TrainConfig, policy: Policy) -> GateConfig:
    """The gate of `config`'s arm: what `dgg_kernels.replay` needs to repeat its decisions."""
    # Backward passes, or ranks', add up in .grad.
    several = config.micro_batch_size is not None or Ranks().world > 1
    frozen = not policy.head.weight.requires_grad
    foresees = ARMS[config.gate].foresee is not Arm.foresee
    return GateConfig(
        energy="loss" if foresees else "head",
        threshold=config.score.threshold if config.gate in GATED else math.inf,
        window=config.score.window,
        max_reuse=config.num_iterations,
        mini_batches=config.mini_batches,
        statistic=config.gate_statistic,  # type: ignore[arg-type]
        average=config.gate_average,  # type: ignore[arg-type]
        squared=config.gate_squared,
        include_shut=config.score.include_shut,
        # What the head alone gets, where .grad does not hold it.
        accumulate=frozen or (policy.tied and several),
    )


def batches_to_fill(config: TrainConfig) -> int:
    """Rollout batches, used as often as may be, until an update finds the gate's window full."""
    passes = config.num_iterations - (config.gate_statistic == "increment")
    return config.score.window // max(passes * config.mini_batches, 1) + 1


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
