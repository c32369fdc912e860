"""Problems with answers from a JSONL file, verified by math-verify.

One object a line, with the field names of the usual sets, in small or capital letters:

    problem or question    the text (MATH-500, AIME: problem; GSM8K and some AIME sets: question)
    answer                 LaTeX, text or an integer; of "reasoning #### 72" (GSM8K) the 72
    solution               optional; what the warm-up imitates

Other fields are left alone. A problem is asked with the usual request for a \\boxed answer, which
math-verify looks for in the completion (first that, then other LaTeX, then numbers) and compares
with the answer symbolically. Only the end of a completion is read.
"""

from __future__ import annotations

import functools
import json
import random
import reprlib
from collections.abc import Iterator
from typing import Any

from math_verify import parse, verify

from ..config import ConfigError, TaskError
from . import Example
from .bounded import Bounded

REQUEST = "\n\nPut the final answer in \\boxed{}."
LONGEST = 10_000  # characters of a completion, from its end, that are read


class Problems:
    """The problems of one file. Options: `data`, its path."""

    def __init__(self, options: dict[str, Any]) -> None:
        self.name = "math/data"
        path = options.pop("data")
        if not isinstance(path, str) or not path:
            raise ConfigError(f"task_options.data: expected a path, got {path!r}")
        if options:
            raise ConfigError(
                f"task_options.{next(iter(options))}: expected no option beside data, got one"
            )
        self.examples = _load(path)
        self.equal = Bounded(equal, self.name)

    def draws(self, rng: random.Random) -> Iterator[Example]:
        """All problems in random order, again and again."""
        while True:
            yield from rng.sample(self.examples, len(self.examples))

    def reward(self, example: Example, completion: str) -> float:
        return self.equal(example.item, completion[-LONGEST:])


def equal(answer: str, completion: str) -> float:
    """1.0 if the completion's answer is that one. Costs what the completion makes it cost."""
    given = parse(completion, parsing_timeout=None)  # pyright: ignore[reportArgumentType]
    return float(verify(_parsed(answer), given, timeout_seconds=None))


@functools.lru_cache(maxsize=1024)
def _parsed(answer: str) -> list[Any]:
    return parse(_boxed(answer), parsing_timeout=None)  # pyright: ignore[reportArgumentType]


def _boxed(answer: str) -> str:
    return f"\\boxed{{{answer}}}"


def _load(path: str) -> list[Example]:
    """Its examples; their item is the answer.

    Raises:
        TaskError: one line: file, line, what was expected, what came.
    """
    examples = []
    try:
        with open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    examples.append(_example(line, f"task math/data: {path}:{number}"))
    except OSError as error:
        raise TaskError(f"task math/data: {path!r}: expected a file, got {error}") from error
    if not examples:
        raise TaskError(f"task math/data: {path}: expected a JSON object a line, got none")
    return examples


def _example(line: bytes, where: str) -> Example:
    try:
        record = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise TaskError(f"{where}: expected UTF-8, got byte {line[error.start]:#04x}") from error
    except (ValueError, RecursionError) as error:
        raise TaskError(
            f"{where}: expected a JSON object, got {reprlib.repr(line.decode())}"
        ) from error
    if not isinstance(record, dict):
        raise TaskError(f"{where}: expected a JSON object, got {reprlib.repr(record)}")
    fields = {str(name).lower(): value for name, value in record.items()}
    problem = _text(fields, where, "problem", "question")
    answer = _text(fields, where, "answer").split("####")[-1].strip()
    expert = _boxed(answer)
    if fields.get("solution") is not None:
        expert = _text(fields, where, "solution")
        if "\\boxed" not in expert:
            expert = f"{expert}\n{_boxed(answer)}"
    return Example(problem + REQUEST, answer, (expert,))


def _text(fields: dict[str, Any], where: str, *names: str) -> str:
    value = next((fields[name] for name in names if name in fields), None)
    if isinstance(value, int) and not isinstance(value, bool):
        value = str(value)  # AIME's answers
    if not isinstance(value, str) or not value.strip() or not _encodes(value):
        got = "nothing" if value is None else reprlib.repr(value)
        raise TaskError(f"{where}: {' or '.join(names)}: expected a text, got {got}")
    return value.strip()


def _encodes(text: str) -> bool:
    """JSON can spell halves of surrogate pairs, which no tokenizer takes."""
    return not any("\ud800" <= character <= "\udfff" for character in text)


__all__ = ["Problems"]
