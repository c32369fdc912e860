"""Text to ids and back, for a model trained here from scratch and for chat models."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any, Protocol

from .config import ConfigError, one_line

CHARACTERS = string.digits + string.ascii_letters + string.punctuation + " \n"
TURN = "(a turn)"  # of an assistant, in no template
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
            self.eos = self._end_of_turn()

    def _end_of_turn(self) -> int:
        """What the template writes behind the assistant's turn: not eos with every model."""
        special = {i for i, token in self.tokenizer.added_tokens_decoder.items() if token.special}
        special.add(self.tokenizer.eos_token_id)
        after = self._after_turn("y")
        for i in after:
            if i in special:
                return i
        raise ConfigError(
            "model: expected a chat template with a special token behind the assistant's turn, got "
            f"{one_line(self.tokenizer.decode(after))!r} there"
        )

    def _after_turn(self, text: str) -> list[int]:
        """All that follows what the assistant said when `text` is the answer to it."""
        chat = self._rendered(("user", "x"), ("assistant", TURN), ("user", text))
        return self._ids(chat.partition(TURN)[2])

    def _rendered(self, *messages: tuple[str, str]) -> str:
        chat = [{"role": role, "content": text} for role, text in messages]
        return self.tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def prompt(self, text: str) -> list[int]:
        if self.tokenizer.chat_template is None:
            return self._ids(text + "\n")
        return self._ids(self._rendered(("user", text)))

    def observation(self, text: str) -> list[int]:
        if self.tokenizer.chat_template is None:
            return self._ids("\n" + text + "\n")
        after = self._after_turn(text)  # a newline or so behind eos belongs to it
        return after[after.index(self.eos) + 1 :]

    def turn(self, text: str) -> list[int]:
        return [*self._ids(text), self.eos]

    def decode(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(list(ids), skip_special_tokens=True)

    show = decode
