"""Text to ids and back, for a model trained here from scratch and for chat models."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any, Protocol

from .config import ConfigError

CHARACTERS = string.digits + string.ascii_letters + string.punctuation + " \n"
_PIECES = re.compile(r" ?[A-Za-z]+|.", re.DOTALL)


class Tokenizer(Protocol):
    """What the trainer asks of a tokenizer: an episode is a prompt, then turns and observations."""

    pad: int
    eos: int  # ends a turn of the policy

    def prompt(self, text: str) -> list[int]:
        """Ids of how an episode begins, up to where the policy's turn does."""
        ...

    def turn(self, text: str) -> list[int]:
        """Ids of a turn of the policy, eos included."""
        ...

    def observation(self, text: str) -> list[int]:
        """Ids of the environment's answer to a turn, up to where the next turn begins."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """Text of a turn, up to its eos."""
        ...

    def show(self, ids: Sequence[int]) -> str:
        """Any part of an episode, for a person to read."""
        ...


class FittedTokenizer:
    """Common words of some texts are a token each, everything else is spelled by character.

    A word is a run of letters with the space before it. Ids from 0: pad, eos, the mark where the
    policy's turn begins, printable ASCII, then words. The vocabulary is padded to `vocab_size`, as
    real ones are: the head has columns for ids that never occur, and the policy must learn not to
    sample them. They decode to U+FFFD, and so does what is not ASCII.
    """

    pad, eos, begin, unknown = 0, 1, 2, 3

    def __init__(self, vocab_size: int, words: Sequence[str] = ()) -> None:
        pieces = [*CHARACTERS, *words]
        needed = 4 + len(pieces)
        if vocab_size < needed:
            raise ConfigError(f"vocab_size: expected at least {needed}, got {vocab_size}")
        self.words = list(words)
        self._id = {piece: i for i, piece in enumerate(pieces, start=4)}
        self._piece = {i: piece for piece, i in self._id.items()}

    @classmethod
    def fit(cls, vocab_size: int, texts: Iterable[str]) -> FittedTokenizer:
        """As many words as there is room for, the most common first."""
        counts = Counter(piece for text in texts for piece in _PIECES.findall(text))
        words = [piece for piece in counts if len(piece) > 1]
        words.sort(key=lambda piece: (-counts[piece], piece))
        return cls(vocab_size, words[: max(0, vocab_size - 4 - len(CHARACTERS))])

    def encode(self, text: str) -> list[int]:
        """Ids of plain text."""
        ids = []
        for piece in _PIECES.findall(text):
            known = self._id.get(piece)
            ids += [known] if known is not None else [self._id.get(c, self.unknown) for c in piece]
        return ids

    def prompt(self, text: str) -> list[int]:
        return [*self.encode(text), self.begin]

    observation = prompt

    def turn(self, text: str) -> list[int]:
        return [*self.encode(text), self.eos]

    def decode(self, ids: Sequence[int]) -> str:
        text = []
        for i in ids:
            if i == self.eos:
                break
            if i != self.pad:
                text.append(self._piece.get(i, "\ufffd"))
        return "".join(text)

    def show(self, ids: Sequence[int]) -> str:
        return self.decode([i for i in ids if i not in (self.eos, self.begin)])


class ChatTokenizer:
    """A transformers tokenizer: prompts and observations are user messages, turns the assistant's.

    Without a chat template text is taken as it is, a line each.
    """

    def __init__(self, tokenizer: Any) -> None:
        if tokenizer.eos_token_id is None:
            raise ConfigError("model: expected a tokenizer with an eos token, got one without")
        self.tokenizer = tokenizer
        self.eos: int = tokenizer.eos_token_id
        self.pad: int = self.eos if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        if tokenizer.chat_template is not None:
            ended = self._messages([("user", "x"), ("assistant", "y")])
            # Templates write a newline or so behind eos: it belongs to what follows.
            self._before = ended[: len(ended) - ended[::-1].index(self.eos)]

    def _messages(self, messages: list[tuple[str, str]], begin: bool = False) -> list[int]:
        chat = [{"role": role, "content": text} for role, text in messages]
        text = self.tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=begin)
        return self._ids(text)

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def prompt(self, text: str) -> list[int]:
        if self.tokenizer.chat_template is None:
            return self._ids(text + "\n")
        return self._messages([("user", text)], begin=True)

    def observation(self, text: str) -> list[int]:
        if self.tokenizer.chat_template is None:
            return self._ids("\n" + text + "\n")
        whole = self._messages([("user", "x"), ("assistant", "y"), ("user", text)], begin=True)
        return whole[len(self._before) :]

    def turn(self, text: str) -> list[int]:
        return [*self._ids(text), self.eos]

    def decode(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(list(ids), skip_special_tokens=True)

    show = decode
