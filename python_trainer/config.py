"""Every setting of the trainer, in one frozen dataclass; names as in TRL where TRL has one."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields, replace
from typing import Any, NamedTuple
from urllib.parse import urlsplit

GATES = (
    "off", "dgg", "gain", "gain_kl", "log_ratio", "random", "shuffled", "kl", "chi2",
    "global_norm", "middle_norm", "skip_step", "zclip",
)  # fmt: skip


class Score(NamedTuple):
    """What a gate scores a value of its signal by."""

    threshold: float  # tau, standard deviations
    window: int  # values
    include_shut: bool  # those that shut the gate among them


PAPERS = Score(0.5, 32, False)  # on the norm of a gradient
# As docs/evidence.md tested them.
SCORES: dict[str, Score] = dict.fromkeys(("gain", "gain_kl", "log_ratio"), Score(0.4, 96, True))
LOSSES = ("grpo", "dr_grpo", "bnpo", "dapo", "cispo", "gspo")
SCALES = ("group", "batch", "none")
STATISTICS = ("increment", "level", "either")
AVERAGES = ("window", "ema")
DTYPES = ("float32", "bfloat16")
PARALLELS = ("ddp", "fsdp2")
SCREENS = (None, "bf16", "int8", "fp8")


class ConfigError(ValueError):
    """A setting is wrong. The message is one line: field, what was expected, what came."""


def one_line(text: str, length: int = 200) -> str:
    """Any text as a part of an error's message."""
    line = " ".join(text.split())
    return line if len(line) <= length else line[: length - 1] + "…"


class TaskError(RuntimeError):
    """A task's sampler or verifier failed. The message is one line that names the task."""


class EngineError(RuntimeError):
    """A server that samples cannot be reached or did not answer as it should. One line."""


class CheckpointError(RuntimeError):
    """No checkpoint can be read, or this one is of another run. The message is one line."""


def setting(default: Any, meaning: str) -> Any:
    """A field of TrainConfig, and what `--help` says of it."""
    return field(default=default, metadata={"help": meaning})


@dataclass(frozen=True)
class TrainConfig:
    """One training run (one arm).

    Lengths are in tokens, temperatures divide the logits, `threshold`s are in standard deviations
    (gate) or nats per token (`kl_stop`).
    """

    # Task
    task: str = setting("math", "math, webshop, search_qa or alfworld")
    task_options: dict[str, Any] = field(default_factory=dict)

    # Rollouts
    rollout_batches: int = setting(160, "how many to draw")
    prompts_per_batch: int = setting(16, "of all processes together")
    num_generations: int = setting(8, "completions a prompt: the group that advantages compare")
    max_completion_length: int = setting(9, "tokens a turn, the end of sequence among them")
    max_context_length: int = setting(512, "tokens an episode: prompt, turns and observations")
    generation_batch_size: int = setting(128, "episodes that are sampled side by side")
    vllm_url: str | None = setting(None, "a vLLM server that samples (default: transformers do)")
    task_timeout: float = setting(60.0, "seconds for an answer of an environment or verifier")
    temperature: float = setting(1.0, "divides the logits, in sampling and in training")

    # Updates
    num_iterations: int = setting(8, "K: the most passes over one rollout batch")
    mini_batches: int = setting(1, "updates a pass, each of another part of the batch")
    loss_type: str = setting("dapo", "one of " + ", ".join(LOSSES))
    epsilon: float = setting(0.2, "clip of the importance ratio: 1 - this to 1 + epsilon_high")
    epsilon_high: float | None = setting(
        None, "see epsilon (default: the same); cispo needs it: the most that a ratio may weigh"
    )
    beta: float = setting(0.0, "weight of the k3 KL to the warm start")
    scale_rewards: str = setting("group", "whose standard deviation advantages are divided by: "
                                 + ", ".join(SCALES))  # fmt: skip
    mask_truncated_completions: bool = setting(False, "those that did not end count for nothing")
    micro_batch_size: int | None = setting(
        None, "sequences a backward, whose gradients add up (default: all)"
    )
    learning_rate: float = setting(2e-4, "AdamW's")
    lr_warmup: int = setting(0, "applied updates over which the learning rate rises")
    reuse_decay: float = setting(1.0, "the learning rate's factor from use to use of a batch")
    lr_decay: int | None = setting(
        None, "applied updates after which the learning rate is zero (default: it stays)"
    )
    weight_decay: float = setting(0.0, "AdamW's")
    max_grad_norm: float = setting(1.0, "the global norm is clipped to it")
    grad_eps: float = setting(2**-12, "probabilities below it: gradient drawn at random; 0: exact")
    screen: str | None = setting(
        None, "int8, fp8 or bf16: screened logits, in every pass of the policy (default: exact)"
    )

    # When to stop re-using a batch
    gate: str = setting("gain", "one of " + ", ".join(GATES)
                        + ": see docs/trainer.md; without the ratio's clip, dgg or kl")  # fmt: skip
    gate_threshold: float | None = setting(
        None, "tau, standard deviations (default: gain, gain_kl, log_ratio 0.4; others 0.5)"
    )
    gate_window: int | None = setting(None, "values that z is taken of (default: as above, 96; 32)")
    gate_include_shut: bool | None = setting(
        None, "values that shut the gate enter its window (default: as above, true; false)"
    )
    gate_statistic: str = setting("increment", "what is scored: " + ", ".join(STATISTICS))
    gate_average: str = setting("window", "what z is taken of; or ema, which forgets 3 % a value")
    gate_squared: bool = setting(False, "score the squared norm")
    kl_stop: float = setting(0.01, "kl and gain_kl stop above this KL(old || new), nats a token")
    chi2_stop: float = setting(0.1, "chi2 stops above this Pearson chi-squared of the batch")
    mean_uses: float = setting(2.0, "random aims at so many passes over a batch")
    use_counts: tuple[int, ...] = ()  # gate="shuffled": updates from each batch, in any order
    shuffle_within: int | None = setting(
        None, "gate shuffled: counts are shuffled among so many batches in a row (default: all)"
    )

    # Model
    model: str = setting("embedded", "embedded, smollm2, or a name or folder of transformers")
    dtype: str = setting(
        "float32", "what products are in: " + ", ".join(DTYPES) + "; weights and moments are fp32"
    )
    lora_rank: int = setting(0, "0: all weights are trained")
    gradient_checkpointing: bool = setting(False, "recompute layers in the backward: less memory")
    parallel: str = setting("ddp", "under torchrun: " + ", ".join(PARALLELS))
    vocab_size: int = setting(512, "of the embedded model, as the next three")
    hidden_size: int = setting(64, "its width")
    num_layers: int = setting(2, "its depth")
    num_heads: int = setting(4, "its attention heads")

    # Supervised warm-up, which stands in for pre-training
    warmup_accuracy: float = setting(0.2, "held-out accuracy at which the warm-up ends")
    warmup_max_steps: int = setting(2000, "steps after which it ends at the latest; 0: no warm-up")
    warmup_batch_size: int = setting(128, "examples a step")
    warmup_learning_rate: float = setting(3e-3, "AdamW's")
    warmup_eval_every: int = setting(5, "steps")

    # Evaluation on held-out examples: exact expectation or sampled episodes, as the task allows
    eval_every: int = setting(4, "rollout batches")
    eval_prompts: int = setting(512, "held-out examples")

    save_every: int = setting(200, "update attempts between checkpoints")
    seed: int = setting(0, "of prompts, samples, weights")
    device: str = setting("cpu", "or cuda, cuda:1, ...")
    # Fixed, because the order of sums depends on it; 1, because two threads gain little on matrices
    # this small and lose a lot when another process wants the core.
    threads: int = setting(1, "CPU threads of torch")

    def __post_init__(self) -> None:
        for name in (
            "rollout_batches", "prompts_per_batch", "max_completion_length", "max_context_length",
            "generation_batch_size", "num_iterations", "mini_batches", "vocab_size", "hidden_size",
            "num_layers", "num_heads", "warmup_batch_size", "warmup_eval_every", "eval_every",
            "eval_prompts", "save_every", "threads",
        ):  # fmt: skip
            self._integer(name, at_least=1)
        for name in ("micro_batch_size", "lr_decay", "shuffle_within"):
            if getattr(self, name) is not None:
                self._integer(name, at_least=1)
        self._integer("num_generations", at_least=2)  # a group of one has no advantage
        for name in ("warmup_max_steps", "lr_warmup", "lora_rank"):
            self._integer(name, at_least=0)
        self._integer("seed", at_least=0, below=2**63)  # torch takes no more, with a rank added
        for name in (
            "temperature", "learning_rate", "max_grad_norm", "warmup_learning_rate", "task_timeout",
        ):  # fmt: skip
            self._number(name, above=0.0)
        for name in ("beta", "weight_decay", "kl_stop", "chi2_stop", "grad_eps"):
            self._number(name, at_least=0.0)
        self._number("mean_uses")
        if self.gate_threshold is not None:
            self._number("gate_threshold")
        if self.gate_window is not None:
            self._integer("gate_window", at_least=2)
        if not isinstance(self.gate_include_shut, bool | None):
            raise ConfigError(f"gate_include_shut: expected a bool, got {self.gate_include_shut!r}")
        self._number("warmup_accuracy", at_least=0.0, at_most=1.0)
        for name in ("epsilon", "reuse_decay"):
            self._number(name, above=0.0, at_most=1.0)
        if self.loss_type == "cispo":
            self._number("epsilon_high", at_least=1.0)  # below, fresh samples are capped as well
        elif self.epsilon_high is not None:
            self._number("epsilon_high", above=0.0)
        self._choice("gate", GATES)
        self._choice("loss_type", LOSSES)
        self._choice("scale_rewards", SCALES)
        for name in ("task", "model", "device"):
            if not isinstance(value := getattr(self, name), str) or not value:
                raise ConfigError(f"{name}: expected a name, got {value!r}")
        self._choice("dtype", DTYPES)
        self._choice("parallel", PARALLELS)
        for name in (
            "mask_truncated_completions", "gradient_checkpointing", "gate_squared",
        ):  # fmt: skip
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name}: expected a bool, got {getattr(self, name)!r}")
        self._choice("gate_statistic", STATISTICS)
        self._choice("gate_average", AVERAGES)
        counts = self.use_counts
        if not isinstance(counts, list | tuple) or not all(isinstance(n, int) for n in counts):
            raise ConfigError(f"use_counts: expected a list of integers, got {counts!r}")
        self._choice("screen", SCREENS)
        if self.vllm_url is not None:
            self._server(self.vllm_url)
        if self.screen is not None and self.grad_eps == 0:
            raise ConfigError("screen: needs grad_eps > 0, got grad_eps=0.0")
        if not isinstance(self.task_options, dict):
            raise ConfigError(f"task_options: expected a dict, got {self.task_options!r}")
        if self.gate == "random" and not 1.0 <= self.mean_uses <= self.num_iterations:
            raise ConfigError(
                f"mean_uses: expected 1 <= mean_uses <= num_iterations ({self.num_iterations}) "
                f"for gate='random', got {self.mean_uses!r}"
            )
        if self.prompts_per_batch % self.mini_batches:
            raise ConfigError(
                f"mini_batches: expected a divisor of prompts_per_batch ({self.prompts_per_batch}),"
                f" got {self.mini_batches!r}"
            )
        if self.hidden_size % (2 * self.num_heads):
            raise ConfigError(
                "hidden_size: expected a multiple of 2 * num_heads "
                f"({2 * self.num_heads}; rotary embeddings pair channels), got {self.hidden_size!r}"
            )

    @property
    def score(self) -> Score:
        """What the gate scores a value by."""
        given = {
            "threshold": self.gate_threshold,
            "window": self.gate_window,
            "include_shut": self.gate_include_shut,
        }
        own = SCORES.get(self.gate, PAPERS)
        return own._replace(**{name: value for name, value in given.items() if value is not None})

    @property
    def clip_range(self) -> tuple[float, float]:
        """(low, high) bounds of the importance ratio: (1 - epsilon, 1 + epsilon_high).

        (0, epsilon_high) with cispo, where TRL takes epsilon_high for the bound itself.
        """
        if self.loss_type == "cispo" and self.epsilon_high is not None:
            return 0.0, self.epsilon_high
        high = self.epsilon if self.epsilon_high is None else self.epsilon_high
        return 1.0 - self.epsilon, 1.0 + high

    def learning_rate_factor(self, applied: int) -> float:
        """Of the learning rate, after so many applied updates: up, then in a straight line down."""
        factor = min(1.0, (applied + 1) / (self.lr_warmup + 1))
        if self.lr_decay is not None:
            factor *= max(0.0, 1.0 - applied / self.lr_decay)
        return factor

    def _integer(self, name: str, at_least: int, below: float = math.inf) -> None:
        value = getattr(self, name)
        whole = isinstance(value, int) and not isinstance(value, bool)
        if not whole or not at_least <= value < below:
            bounds = f">= {at_least}" + (f" and < {below}" if below < math.inf else "")
            raise ConfigError(f"{name}: expected an integer {bounds}, got {value!r}")

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

    def _server(self, url: Any) -> None:
        """`vllm_url`, and what cannot be had with it."""
        try:
            parts = urlsplit(url)
            known = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
            if not (known and parts.path in ("", "/") and not parts.query + parts.fragment):
                raise ValueError
        except (ValueError, TypeError, AttributeError):  # a wrong port is a ValueError
            raise ConfigError(f"vllm_url: expected http(s)://HOST[:PORT], got {url!r}") from None
        if self.lora_rank:
            raise ConfigError(f"lora_rank: expected 0 with vllm_url, got {self.lora_rank!r}")

    def _choice(self, name: str, known: tuple[str | None, ...]) -> None:
        value = getattr(self, name)
        if value not in known:
            raise ConfigError(
                f"{name}: expected one of {', '.join(map(str, known))}, got {value!r}"
            )


def changed(config: TrainConfig, values: dict[str, Any], where: str) -> TrainConfig:
    """`config` with other values, which came from `where`.

    Raises:
        ConfigError: there is no such field, or a value does not fit.
    """
    for name in values:
        if name not in {f.name for f in fields(TrainConfig)}:
            raise ConfigError(f"{where}: expected settings of TrainConfig, got {name!r}")
    return replace(config, **values)
