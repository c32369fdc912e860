"""Every setting of the trainer, in one frozen dataclass; names as in TRL where TRL has one."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

GATES = ("off", "dgg", "random", "kl", "global_norm")
LOSSES = ("grpo", "dapo")
STATISTICS = ("increment", "level", "either")
SCREENS = (None, "bf16", "int8", "fp8")


class ConfigError(ValueError):
    """A setting is wrong. The message is one line: field, what was expected, what came."""


class TaskError(RuntimeError):
    """A task's sampler or verifier failed. The message is one line that names the task."""


def default_task_options() -> dict[str, Any]:
    return {"dataset": "number_sorting"}


@dataclass(frozen=True)
class TrainConfig:
    """One training run (one arm).

    Lengths are in tokens, temperatures divide the logits, `threshold`s are in standard deviations
    (gate) or nats per token (`kl_stop`).
    """

    # Task
    task: str = "math"
    task_options: dict[str, Any] = field(default_factory=default_task_options)

    # Rollouts
    rollout_batches: int = 160
    prompts_per_batch: int = 16
    num_generations: int = 8  # completions per prompt: the group that advantages compare
    max_completion_length: int = 9  # the default task's longest answer, and eos
    temperature: float = 1.0

    # Updates
    num_iterations: int = 8  # K: the most updates that one rollout batch may give
    loss_type: str = "dapo"
    epsilon: float = 0.2
    epsilon_high: float | None = None  # None: the same as epsilon
    beta: float = 0.0  # weight of the k3 KL to the warm start
    learning_rate: float = 2e-4
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    grad_eps: float = 2**-12  # where linear_logprob's random tail begins; 0 is exact
    screen: str | None = None  # "int8", "fp8", "bf16": screened logits, in every pass of the policy

    # When to stop re-using a batch
    gate: str = "dgg"
    gate_threshold: float = 0.5  # tau, standard deviations
    gate_window: int = 32
    gate_statistic: str = "increment"
    kl_stop: float = 0.01  # gate="kl": stop when KL(old || new) per token exceeds this
    mean_uses: float = 2.0  # gate="random": updates per batch to aim at

    # Model: a Llama-style decoder with an untied head, trained from scratch
    vocab_size: int = 512
    hidden_size: int = 64
    num_layers: int = 2
    num_heads: int = 4

    # Supervised warm-up, which stands in for pre-training
    warmup_accuracy: float = 0.2  # stop here
    warmup_max_steps: int = 2000
    warmup_batch_size: int = 128
    warmup_learning_rate: float = 3e-3

    # Evaluation: exact expected accuracy on held-out prompts
    eval_every: int = 4  # rollout batches
    eval_prompts: int = 512

    seed: int = 0
    device: str = "cpu"
    # CPU threads of torch. Fixed, because the order of sums depends on it; 1, because two threads
    # gain little on matrices this small and lose a lot when another process wants the core.
    threads: int = 1

    def __post_init__(self) -> None:
        for name in (
            "rollout_batches", "prompts_per_batch", "max_completion_length", "num_iterations",
            "vocab_size", "hidden_size", "num_layers", "num_heads",
            "warmup_batch_size", "eval_every", "eval_prompts", "threads",
        ):  # fmt: skip
            self._integer(name, at_least=1)
        self._integer("num_generations", at_least=2)  # a group of one has no advantage
        self._integer("gate_window", at_least=2)
        self._integer("warmup_max_steps", at_least=0)
        self._integer("seed", at_least=0)
        for name in ("temperature", "learning_rate", "max_grad_norm", "warmup_learning_rate"):
            self._number(name, above=0.0)
        for name in ("beta", "weight_decay", "kl_stop", "grad_eps"):
            self._number(name, at_least=0.0)
        for name in ("gate_threshold", "mean_uses"):
            self._number(name)
        self._number("warmup_accuracy", at_least=0.0, at_most=1.0)
        self._number("epsilon", above=0.0, at_most=1.0)
        if self.epsilon_high is not None:
            self._number("epsilon_high", above=0.0)
        self._choice("gate", GATES)
        self._choice("loss_type", LOSSES)
        self._choice("gate_statistic", STATISTICS)
        self._choice("screen", SCREENS)
        if self.screen is not None and self.grad_eps == 0:
            raise ConfigError("screen: needs grad_eps > 0, got grad_eps=0.0")
        if not isinstance(self.task_options, dict):
            raise ConfigError(f"task_options: expected a dict, got {self.task_options!r}")
        if self.gate == "random" and not 1.0 <= self.mean_uses <= self.num_iterations:
            raise ConfigError(
                f"mean_uses: expected 1 <= mean_uses <= num_iterations ({self.num_iterations}) "
                f"for gate='random', got {self.mean_uses!r}"
            )
        if self.hidden_size % (2 * self.num_heads):
            raise ConfigError(
                "hidden_size: expected a multiple of 2 * num_heads "
                f"({2 * self.num_heads}; rotary embeddings pair channels), got {self.hidden_size!r}"
            )

    @property
    def clip_range(self) -> tuple[float, float]:
        """(low, high) bounds of the importance ratio."""
        high = self.epsilon if self.epsilon_high is None else self.epsilon_high
        return 1.0 - self.epsilon, 1.0 + high

    @property
    def sequences_per_batch(self) -> int:
        return self.prompts_per_batch * self.num_generations

    def _integer(self, name: str, at_least: int) -> None:
        value = getattr(self, name)
        if not isinstance(value, int) or isinstance(value, bool) or value < at_least:
            raise ConfigError(f"{name}: expected an integer >= {at_least}, got {value!r}")

    def _number(
        self,
        name: str,
        at_least: float = -math.inf,
        above: float = -math.inf,
        at_most: float = math.inf,
    ) -> None:
        value = getattr(self, name)
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if is_number and math.isfinite(value) and at_least <= value <= at_most and value > above:
            return
        bounds = [
            f"{sign} {bound:g}"
            for sign, bound in ((">=", at_least), (">", above), ("<=", at_most))
            if math.isfinite(bound)
        ]
        wanted = " ".join(["a finite number", " and ".join(bounds)]).strip()
        raise ConfigError(f"{name}: expected {wanted}, got {value!r}")

    def _choice(self, name: str, known: tuple[str | None, ...]) -> None:
        value = getattr(self, name)
        if value not in known:
            raise ConfigError(
                f"{name}: expected one of {', '.join(map(str, known))}, got {value!r}"
            )
