"""What a task is: prompts to start from, and an environment that answers the policy and scores it.

A task with a verifier and nothing else (mathematics) is an environment of one turn.
"""

from __future__ import annotations

import importlib
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from math import inf  # `math` is the name of a module here
from typing import Any, Protocol, TypeVar

from ..config import ConfigError


@dataclass(frozen=True)
class Example:
    """Where one episode starts."""

    prompt: str
    item: Any  # what the environment is made of; opaque to the trainer
    # An expert's turns, where one is known: what to imitate in the warm-up. They score about 1.
    answer: tuple[str, ...] | None


class Episode(Protocol):
    """One attempt at an example: the policy takes a turn, the environment answers, and so on."""

    reward: float  # in [0, 1]; of what was done so far, and final when the episode is over

    def step(self, turn: str) -> str | None:
        """Take the policy's turn; returns what the environment writes, or None: it is over.

        Any text may come: what cannot be understood is answered so, and never raises.
        """
        ...


class Task(Protocol):
    """Examples and environments of one kind."""

    name: str
    exact: bool  # is the reward 1 for an example's own answer, and 0 for everything else?

    def sample(self, n: int, seed: str, held_out: bool = False) -> list[Example]:
        """`n` examples, a pure function of the arguments. No prompt is ever in both pools."""
        ...

    def begin(self, example: Example) -> Episode:
        """A fresh episode, a pure function of the example; many may be under way at once."""
        ...


class Verified:
    """The episode of a task of one turn."""

    def __init__(self, verify: Callable[[str], float]) -> None:
        self.verify = verify
        self.reward = 0.0

    def step(self, turn: str) -> None:
        self.reward = self.verify(turn)


HELD_OUT_SHARE = 8  # one in so many is held out


def is_held_out(identity: str) -> bool:
    """Which pool an example belongs to, by a hash of what tells it from others."""
    return zlib.crc32(identity.encode(errors="replace")) % HELD_OUT_SHARE == 0


O = TypeVar("O")


def options_of(kind: type[O], given: dict[str, Any]) -> O:
    """A family's options, a dataclass, from those that were given.

    Raises:
        ConfigError: one is not known; or what the dataclass says of their values.
    """
    known = [field.name for field in fields(kind)]  # type: ignore[arg-type]
    for name in given:
        if name not in known:
            raise ConfigError(f"task_options: expected {', '.join(known)}, got {name!r}")
    return kind(**given)


def check_integers(options: Any, **bounds: tuple[int, float]) -> None:
    """Raise ConfigError unless these options are integers, from the first bound to the second."""
    for name, (low, high) in bounds.items():
        value = getattr(options, name)
        if type(value) is not int or not low <= value <= high:
            bound = f">= {low}" if high == inf else f"in {low}..{high}"
            raise ConfigError(f"task_options.{name}: expected an integer {bound}, got {value!r}")


def check_paths(options: Any, *names: str) -> None:
    """Raise ConfigError unless these options are texts or None."""
    for name in names:
        if not isinstance(value := getattr(options, name), str | None):
            raise ConfigError(f"task_options.{name}: expected a path, got {value!r}")


FAMILIES = {
    "math": "MathTask",
    "alfworld": "AlfworldTask",
    "webshop": "WebshopTask",
    "search_qa": "SearchQATask",
}


def make_task(name: str, options: dict[str, Any]) -> Task:
    """The task family called `name`.

    Raises:
        ConfigError: one line, when the name or an option is not known, or the family's packages
            are not installed.
    """
    if name not in FAMILIES:
        raise ConfigError(f"task: expected one of {', '.join(FAMILIES)}, got {name!r}")
    try:
        module = importlib.import_module(f"{__name__}.{name}")
    except ImportError as error:
        raise ConfigError(f"task: {name} needs a package that is not here ({error})") from error
    return getattr(module, FAMILIES[name])(options)


def play(task: Task, example: Example, turns: Sequence[str]) -> tuple[float, list[str]]:
    """Reward of an episode in which the policy says `turns`, and what the environment wrote."""
    episode, written = task.begin(example), []
    for turn in turns:
        text = episode.step(turn)
        if text is None:
            break
        written.append(text)
    return episode.reward, written


__all__ = ["FAMILIES", "Episode", "Example", "Task", "Verified", "make_task", "play"]
