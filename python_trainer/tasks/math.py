"""The `math` family: reasoning-gym's items and verifiers in two renderings, or problems of a file.

`rendering="compact"`, for a model that was never taught English. A character-level model of 100k
parameters cannot read an instruction, so the prompt is written from the item's metadata, and the
completion is expanded again to the format that the verifier parses:

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

`rendering="plain"`, for instruct models. The prompt is reasoning-gym's own question, of any of its
datasets but the `UNUSABLE`, and the verifier is given what follows the last "answer:", "####" or
\\boxed{, or the whole completion where there is none of them. The reward is 1.0 for its full score,
else 0.0, or the raw score with `partial_credit=True`. It runs within bounds (see `bounded`).

`data="problems.jsonl"` takes a file instead: see `problems`.
"""

from __future__ import annotations

import functools
import math
import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any, Protocol

import reasoning_gym
from reasoning_gym.factory import DATASETS

from ..config import ConfigError, TaskError, one_line
from . import HELD_OUT_SHARE, Example, Verified, is_held_out
from .bounded import Bounded
from .problems import LONGEST, Problems

UNUSABLE = {
    **dict.fromkeys(
        ("boxnet", "graph_color", "propositional_logic", "rubiks_cube", "rush_hour"),
        "its items have no answer that its verifier accepts",
    ),
    "game_of_life_halting": "its verifier accepts any text",
    "puzzle24": "its verifier accepts any four numbers",
    "codeio": "its items run programs that need other packages",
    "composite": "it is a mixture of others",
}
# Verifiers that evaluate the completion as Python (`eval`, or sympy's `parse_expr`) get nothing but
# arithmetic, lists, single letters and a few functions; those that compare numbers by |a - b| > eps
# get no NaN, which they accept.
ARITHMETIC = re.compile(
    r"(?:[\d\s+\-*/^().,\[\]_]|\b(?:[A-Za-z]|[A-Z]{2,}"
    r"|a?sin|a?cos|a?tan|exp|log|sqrt|Integral)\b)*"
)
NOT_A_NUMBER = re.compile(r"(?!.*nan).*", re.DOTALL | re.IGNORECASE)
ALLOWED = {
    **dict.fromkeys(
        (
            "binary_matrix", "countdown", "intermediate_integration", "n_queens",
            "polynomial_multiplication", "simple_integration", "spiral_matrix", "string_insertion",
        ),
        ARITHMETIC,
    ),
    **dict.fromkeys(("complex_arithmetic", "number_sorting"), NOT_A_NUMBER),
}  # fmt: skip


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


SUMS = Rendering(
    defaults=dict(min_terms=2, max_terms=2, min_digits=1, max_digits=2),
    prompt=lambda m: m["expression"].replace(" ", "") + "=",
    answer=lambda entry: entry["answer"],
    expand=str,
)
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
    "chain_sum": SUMS,
    "basic_arithmetic": SUMS,
}


class Source(Protocol):
    """Where the items of a math task come from."""

    name: str

    def draws(self, rng: random.Random) -> Iterator[Example]:
        """Random examples without end; a prompt may come more than once."""
        ...

    def reward(self, example: Example, completion: str) -> float: ...


class MathTask:
    """One reasoning-gym dataset, or the problems of one file.

    Options: `data` alone, or `rendering` ("compact" or "plain"), `dataset` (a name from RENDERINGS,
    or any but the UNUSABLE), `partial_credit` (bool), `direction` ("ascending", "descending" or
    "both"; compact number_sorting alone), and any option of the dataset's generator (with "plain",
    `size` is how many different items there are). With any of them, `pool` is how many training
    items there are, drawn once and sampled with replacement; held-out ones have no such bound.
    """

    def __init__(self, options: dict[str, Any]) -> None:
        options = dict(options)
        pool = options.pop("pool", None)
        if pool is not None and (not isinstance(pool, int) or isinstance(pool, bool) or pool < 1):
            raise ConfigError(f"task_options.pool: expected an integer >= 1, got {pool!r}")
        if "data" in options:
            self.source: Source = Problems(options)
        else:
            kinds = {"compact": Compact, "plain": Plain}
            rendering = options.pop("rendering", "compact")
            if rendering not in kinds:
                raise ConfigError(
                    f"task_options.rendering: expected compact or plain, got {rendering!r}"
                )
            self.source = kinds[rendering](options)
        self.name = self.source.name
        self.pool: list[Example] = []
        if pool is not None:
            self.pool = self.sample(pool, "pool")
        self.exact = isinstance(self.source, Compact) and not self.source.partial_credit

    def sample(self, n: int, seed: str, held_out: bool = False) -> list[Example]:
        """`n` items drawn by `seed` from the training pool, or from the held-out one.

        A prompt belongs to one pool by a hash of its text, so that an item that the generator
        makes twice cannot leak from one to the other.
        """
        if self.pool and not held_out:
            return random.Random(seed).choices(self.pool, k=n)
        draws = islice(self.source.draws(random.Random(seed)), 1000 * HELD_OUT_SHARE * n)
        in_pool = (example for example in draws if is_held_out(example.prompt) == held_out)
        examples = list(islice(in_pool, n))
        if len(examples) < n:
            pool = "held-out" if held_out else "training"
            raise TaskError(
                f"task {self.name}: expected {n} {pool} items, got {len(examples)}: "
                "its options leave too few different prompts"
            )
        return examples

    def begin(self, example: Example) -> Verified:
        return Verified(functools.partial(self.source.reward, example))


class Compact:
    """One of the datasets that have a Rendering."""

    def __init__(self, options: dict[str, Any]) -> None:
        dataset, self.partial_credit = _common(options)
        if dataset not in RENDERINGS:
            known = ", ".join(RENDERINGS)
            raise ConfigError(f"task_options.dataset: expected one of {known}, got {dataset!r}")
        self.name = f"math/{dataset}"
        self.rendering = RENDERINGS[dataset]
        self.direction = "both"  # the other datasets have none
        if dataset == "number_sorting":
            self.direction = options.pop("direction", "ascending")
            if self.direction not in ("ascending", "descending", "both"):
                raise ConfigError(
                    "task_options.direction: expected ascending, descending or both, "
                    f"got {self.direction!r}"
                )
        self.dataset = _generator(dataset, {**self.rendering.defaults, **options})

    def draws(self, rng: random.Random) -> Iterator[Example]:
        while True:
            entry = self.dataset[rng.getrandbits(48)]
            if self.direction == "both" or self.direction == entry["metadata"]["direction"]:
                answer = self.rendering.answer(entry)
                yield Example(self.rendering.prompt(entry["metadata"]), entry, (answer,))

    def reward(self, example: Example, completion: str) -> float:
        """Exactly the item's own answer if the verifier agrees (module docstring)."""
        right = (completion,) == example.answer
        if not right and (not self.partial_credit or "nan" in completion.lower()):
            return 0.0  # so that hostile text does not even reach the verifier
        verdict = self.dataset.score_answer(
            self.rendering.expand(completion[-LONGEST:]), example.item
        )
        return verdict if self.partial_credit else float(verdict == 1.0)


class Plain:
    """Any usable dataset, as reasoning-gym words it."""

    def __init__(self, options: dict[str, Any]) -> None:
        dataset, self.partial_credit = _common(options)
        if dataset not in DATASETS or dataset in UNUSABLE:
            why = UNUSABLE.get(dataset, "reasoning-gym has no such dataset")
            raise ConfigError(
                f"task_options.dataset: expected a usable one, got {dataset!r} ({why})"
            )
        self.name = f"math/{dataset}"
        verifier = Verifier(dataset, {"size": 10_000, **options})
        self.dataset = verifier.dataset
        self.allowed = ALLOWED.get(dataset)
        self.score = Bounded(verifier, self.name)

    def draws(self, rng: random.Random) -> Iterator[Example]:
        while True:
            entry = self.dataset[rng.randrange(len(self.dataset))]
            yield Example(entry["question"], entry, (entry["answer"],))

    def reward(self, example: Example, completion: str) -> float:
        """The verifier's, of the final answer (module docstring)."""
        answer = final_answer(completion[-LONGEST:])
        if self.allowed is not None and not self.allowed.fullmatch(answer):
            return 0.0
        verdict = self.score(answer, example.item)
        if self.partial_credit and math.isfinite(verdict):
            return min(max(verdict, 0.0), 1.0)
        return float(verdict == 1.0)


def final_answer(completion: str) -> str:
    """What follows the last "answer:" or "####", or is in the last \\boxed{}; else all of it."""
    marks = list(re.finditer(r"\banswer:(?:\*\*)?|####|\\boxed\{", completion, re.IGNORECASE))
    if not marks:
        return completion.strip()
    text = completion[marks[-1].end() :]
    if marks[-1].group().endswith("{"):
        depth = 1
        for i, character in enumerate(text):
            depth += (character == "{") - (character == "}")
            if depth == 0:
                return text[:i].strip()
    return text.strip()


class Verifier:
    """A dataset's own score; another process makes the dataset anew (some cannot be pickled)."""

    def __init__(self, dataset: str, options: dict[str, Any]) -> None:
        self.arguments = dataset, options
        self.dataset = _generator(dataset, options)

    def __reduce__(self) -> tuple[Any, ...]:
        return Verifier, self.arguments

    def __call__(self, answer: str, entry: dict[str, Any]) -> float:
        return self.dataset.score_answer(answer, entry)


def _common(options: dict[str, Any]) -> tuple[str, bool]:
    """Takes `dataset` and `partial_credit` out of the options."""
    dataset = options.pop("dataset", "number_sorting")
    partial_credit = options.pop("partial_credit", False)
    if not isinstance(dataset, str):
        raise ConfigError(f"task_options.dataset: expected a name, got {dataset!r}")
    if not isinstance(partial_credit, bool):
        raise ConfigError(f"task_options.partial_credit: expected a bool, got {partial_credit!r}")
    return dataset, partial_credit


def _generator(dataset: str, options: dict[str, Any]) -> Any:
    try:
        # A seed of 0 makes the index the whole identity of an item: item i is Random(i)'s.
        return reasoning_gym.create_dataset(dataset, seed=0, **options)
    except (AssertionError, TypeError, ValueError) as error:
        reason = one_line(str(error)) or "its generator refused them"
        raise ConfigError(
            f"task_options: expected options of reasoning-gym's {dataset}, "
            f"got {options!r} ({reason})"
        ) from error
