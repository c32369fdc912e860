"""The `math` family: reasoning-gym's generators and verifiers, in a rendering for a tiny model.

The items and the scores are reasoning-gym's own. What is ours is the *rendering*. A character-level
model of 100k parameters cannot read an English instruction, so the prompt is written from the
item's metadata, and the completion is expanded again to the format that the verifier parses:

    dataset            prompt        answer      what the verifier is given
    number_sorting     52761846>     12456678    "['1', '2', '4', '5', '6', '6', '7', '8']"
    number_sorting     52761846<     87665421    (descending)
    chain_sum          4+13=         17          "17"
    basic_arithmetic   (-9/9)=       -1          "-1"

The reward is strict: 1.0 when the verifier gives its full score *and* the completion is the item's
own answer, else 0.0. The verifier alone would not do as a reward, because number_sorting
accepts every sorted list whose numbers are each within 1 of the right ones (with single digits
"12456678" and "11345567" both score 1.0), and the arithmetic verifiers give part of the score to an
answer with trailing rubbish (0.67 for "-40" in place of "-4"). `partial_credit=True` takes the raw
score as the reward.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import reasoning_gym

from ..config import ConfigError, TaskError
from . import Example

HELD_OUT_SHARE = 8  # one prompt in so many is held out


@dataclass(frozen=True)
class Rendering:
    """How one dataset looks to a character-level model."""

    defaults: dict[str, Any]  # generator options at a difficulty that a small model can learn
    prompt: Callable[[dict[str, Any]], str]  # metadata -> prompt
    answer: Callable[[dict[str, Any]], str]  # entry -> reference completion
    expand: Callable[[str], str]  # completion -> what the verifier parses


def _digits(numbers: list[str]) -> str:
    """["5.0", "2.0"] -> "52"; numbers of more than one digit are separated: "12,-3"."""
    # The generator prints decimals=0 as "5.0".
    short = [str(int(float(n))) if float(n) == int(float(n)) else n for n in numbers]
    return "".join(short) if all(len(n) == 1 for n in short) else ",".join(short)


def _expand_digits(completion: str) -> str:
    return str(completion.split(",") if "," in completion else list(completion))


def _strip_spaces(expression: str) -> str:
    return expression.replace(" ", "") + "="


RENDERINGS = {
    "number_sorting": Rendering(
        defaults=dict(
            min_numbers=8, max_numbers=8, min_decimals=0, max_decimals=0, min_value=0, max_value=9
        ),
        prompt=lambda m: (
            _digits(m["original_numbers"]) + (">" if m["direction"] == "ascending" else "<")
        ),
        answer=lambda entry: _digits(entry["metadata"]["sorted_numbers"]),
        expand=_expand_digits,
    ),
    "chain_sum": Rendering(
        defaults=dict(min_terms=2, max_terms=2, min_digits=1, max_digits=2),
        prompt=lambda m: _strip_spaces(m["expression"]),
        answer=lambda entry: entry["answer"],
        expand=lambda completion: completion,
    ),
    "basic_arithmetic": Rendering(
        defaults=dict(min_terms=2, max_terms=2, min_digits=1, max_digits=2),
        prompt=lambda m: _strip_spaces(m["expression"]),
        answer=lambda entry: entry["answer"],
        expand=lambda completion: completion,
    ),
}


class MathTask:
    """One reasoning-gym dataset.

    Options: `dataset` (a name from RENDERINGS), `partial_credit` (bool), `direction` ("ascending",
    "descending" or "both"; number_sorting alone), and any option of the dataset's generator.
    """

    def __init__(self, options: dict[str, Any]) -> None:
        options = dict(options)
        dataset = options.pop("dataset", "number_sorting")
        if dataset not in RENDERINGS:
            known = ", ".join(RENDERINGS)
            raise ConfigError(f"task_options.dataset: expected one of {known}, got {dataset!r}")
        self.name = f"math/{dataset}"
        self.rendering = RENDERINGS[dataset]
        self.partial_credit = options.pop("partial_credit", False)
        if not isinstance(self.partial_credit, bool):
            raise ConfigError(
                f"task_options.partial_credit: expected a bool, got {self.partial_credit!r}"
            )
        self.direction = "both"  # the other datasets have none
        if dataset == "number_sorting":
            self.direction = options.pop("direction", "ascending")
            if self.direction not in ("ascending", "descending", "both"):
                raise ConfigError(
                    "task_options.direction: expected ascending, descending or both, "
                    f"got {self.direction!r}"
                )
        try:
            # A seed of 0 makes the index the whole identity of an item: item i is Random(i)'s.
            self.dataset = reasoning_gym.create_dataset(
                dataset, seed=0, **{**self.rendering.defaults, **options}
            )
        except (AssertionError, TypeError, ValueError) as error:
            reason = " ".join(str(error).split()) or "its generator refused them"
            raise ConfigError(
                f"task_options: expected options of reasoning-gym's {dataset}, "
                f"got {options!r} ({reason})"
            ) from error

    def sample(self, n: int, seed: str, held_out: bool = False) -> list[Example]:
        """`n` items drawn by `seed` from the training pool, or from the held-out one.

        A prompt belongs to one pool by a hash of its text, so that an item that the generator
        makes twice cannot leak from one to the other.
        """
        rng = random.Random(seed)
        examples: list[Example] = []
        for _ in range(1000 * HELD_OUT_SHARE * n):
            entry = self.dataset[rng.getrandbits(48)]
            if self.direction != "both" and self.direction != entry["metadata"]["direction"]:
                continue
            prompt = self.rendering.prompt(entry["metadata"])
            if (zlib.crc32(prompt.encode()) % HELD_OUT_SHARE == 0) == held_out:
                examples.append(Example(prompt, entry, self.rendering.answer(entry)))
            if len(examples) == n:
                return examples
        pool = "held-out" if held_out else "training"
        raise TaskError(
            f"task {self.name}: expected {n} {pool} items, got {len(examples)}: "
            "its options leave too few different prompts"
        )

    def reward(self, example: Example, completion: str) -> float:
        """1.0 for the item's own answer if the verifier agrees, else 0.0 (module docstring)."""
        verdict = self.dataset.score_answer(self.rendering.expand(completion), example.item)
        if self.partial_credit:
            return verdict
        return float(verdict == 1.0 and completion == example.answer)
