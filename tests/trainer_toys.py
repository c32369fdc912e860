"""A task and a configuration small enough for tests of the trainer."""

from __future__ import annotations

import random
from typing import Any

from python_trainer.config import TrainConfig
from python_trainer.tasks import Episode, Example, Verified

TINY = TrainConfig(
    task="digits",
    task_options={},
    rollout_batches=6,
    prompts_per_batch=4,
    num_generations=4,
    max_completion_length=5,
    num_iterations=4,
    learning_rate=3e-3,
    gate="dgg",
    gate_window=3,
    vocab_size=128,
    hidden_size=16,
    num_layers=2,
    num_heads=2,
    warmup_max_steps=10,
    warmup_accuracy=1.0,
    warmup_batch_size=16,
    eval_every=2,
    eval_prompts=8,
    threads=1,
)


class Digits:
    """Reward: the share of the turn's five places that hold a digit. Easy to raise."""

    name = "digits"
    exact = False

    def __init__(self, options: dict[str, Any] | None = None) -> None:
        self.calls = 0

    def sample(self, n: int, seed: str, held_out: bool = False) -> list[Example]:
        rng = random.Random(seed)
        prompts = ["".join(rng.choices("abc", k=rng.randint(1, 3))) for _ in range(n)]
        return [Example(prompt, prompt, ("12",)) for prompt in prompts]

    def begin(self, example: Example) -> Episode:
        return Verified(self.verify)

    def verify(self, turn: str) -> float:
        self.calls += 1
        return sum(c.isdigit() for c in turn[:5]) / 5


class Echo(Digits):
    """Three turns; the environment answers each with what it was, and the last one counts."""

    name = "echo"

    def sample(self, n: int, seed: str, held_out: bool = False) -> list[Example]:
        examples = super().sample(n, seed, held_out)
        return [Example(e.prompt, e.item, ("12", "3", "456")) for e in examples]

    def begin(self, example: Example) -> Episode:
        return Talk()


class Talk:
    """An episode of Echo."""

    def __init__(self) -> None:
        self.turns, self.reward = 0, 0.0

    def step(self, turn: str) -> str | None:
        self.turns += 1
        self.reward = sum(c.isdigit() for c in turn[:3]) / 3
        return None if self.turns == 3 else f"you said {turn[:3]}\n"


class Fails(Digits):
    """Its verifier breaks in a rollout batch after the first, with TINY."""

    name = "fails"

    def verify(self, turn: str) -> float:
        if self.calls == 500:
            raise ZeroDivisionError("no\nluck")
        return super().verify(turn)
