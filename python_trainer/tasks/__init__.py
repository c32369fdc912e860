"""What a task is: prompts to sample, and a verifier that turns a completion into a reward."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import isfinite  # not "import math": our submodule of that name would shadow it
from typing import Any, Protocol

from ..config import ConfigError, TaskError


@dataclass(frozen=True)
class Example:
    """One prompt to complete."""

    prompt: str
    item: Any  # what the verifier checks against; opaque to the trainer
    answer: str | None  # a reference completion (warm-up and exact evaluation), where one is known


class Task(Protocol):
    """Prompts and rewards."""

    name: str

    def sample(self, n: int, seed: str, held_out: bool = False) -> list[Example]:
        """`n` examples, a pure function of the arguments. No prompt is ever in both pools."""
        ...

    def reward(self, example: Example, completion: str) -> float:
        """Score of one completion, in [0, 1]."""
        ...


def _math(options: dict[str, Any]) -> Task:
    from .math import MathTask

    return MathTask(options)


TASKS: dict[str, Callable[[dict[str, Any]], Task]] = {"math": _math}


def make_task(name: str, options: dict[str, Any]) -> Task:
    """The task called `name`.

    Raises:
        ConfigError: one line, when the name or an option is not known.
    """
    if name not in TASKS:
        raise ConfigError(f"task: expected one of {', '.join(TASKS)}, got {name!r}")
    return TASKS[name](options)


def score(task: Task, examples: Sequence[Example], completions: Sequence[str]) -> list[float]:
    """Reward of each completion.

    Raises:
        TaskError: one line naming the task, when its verifier raises or leaves [0, 1].
    """
    rewards = []
    for example, completion in zip(examples, completions, strict=True):
        try:
            reward = float(task.reward(example, completion))
        except Exception as error:  # anything may come out of a verifier
            raise TaskError(
                f"task {task.name}: reward raised {type(error).__name__}: {_one_line(error)} "
                f"(prompt {example.prompt!r}, completion {completion!r})"
            ) from error
        if not (isfinite(reward) and 0.0 <= reward <= 1.0):
            raise TaskError(
                f"task {task.name}: reward: expected a number in [0, 1], got {reward!r} "
                f"(prompt {example.prompt!r}, completion {completion!r})"
            )
        rewards.append(reward)
    return rewards


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or "no message"


__all__ = ["TASKS", "Example", "Task", "make_task", "score"]
