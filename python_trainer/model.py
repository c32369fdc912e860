"""The embedded policy: a character tokenizer and a small Llama with an untied head.

Shape suffixes, here and everywhere in the trainer: B sequences, P prompts, G completions per
prompt, T = prompt + completion tokens, C completion tokens, D hidden width, V vocabulary.
"""

from __future__ import annotations

import string
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .config import ConfigError, TrainConfig

CHARACTERS = string.digits + string.ascii_letters + string.punctuation + " \n"


class CharTokenizer:
    """One token per character of printable ASCII; ids from 0: pad, eos, then the characters.

    The vocabulary is padded to `vocab_size`, as real ones are: the head has columns for ids that
    never occur, and the policy must learn not to sample them. They decode to U+FFFD.
    """

    pad = 0
    eos = 1

    def __init__(self, vocab_size: int) -> None:
        needed = 2 + len(CHARACTERS)
        if vocab_size < needed:
            raise ConfigError(f"vocab_size: expected at least {needed}, got {vocab_size}")
        self.vocab_size = vocab_size
        self._id = {c: i for i, c in enumerate(CHARACTERS, start=2)}
        self._char = {i: c for c, i in self._id.items()}

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, without eos.

        Raises:
            ValueError: a character is outside printable ASCII.
        """
        try:
            return [self._id[c] for c in text]
        except KeyError as error:
            raise ValueError(
                f"text: expected printable ASCII, got {error.args[0]!r} in {text!r}"
            ) from None

    def decode(self, ids: Sequence[int]) -> str:
        """Text up to the first eos; pad is nothing."""
        text = []
        for i in ids:
            if i == self.eos:
                break
            if i != self.pad:
                text.append(self._char.get(i, "\ufffd"))
        return "".join(text)


def build_model(config: TrainConfig) -> Any:
    """A transformers `LlamaForCausalLM` with random weights (seed it with `torch.manual_seed`)."""
    from transformers import LlamaConfig, LlamaForCausalLM

    model: Any = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            intermediate_size=2 * config.hidden_size,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_heads,
            num_key_value_heads=config.num_heads,
            tie_word_embeddings=False,  # so that lm_head.weight.grad is the head's gradient alone
            pad_token_id=None,
            bos_token_id=None,
            eos_token_id=None,
        )
    )
    return model.to(config.device)


def check_device(name: str) -> None:
    """Raise ConfigError unless tensors can be made on device `name`."""
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:  # torch raises the latter without CUDA
        reason = str(error).splitlines()[0]
        raise ConfigError(
            f"device: expected one that torch has here, got {name!r} ({reason})"
        ) from error


def head_weight(model: Any) -> Tensor:
    """The lm_head parameter [V, D]."""
    return model.lm_head.weight


def middle_weight(model: Any) -> Tensor:
    """A weight half-way up the stack, to compare the head's divergence with."""
    layers = model.model.layers
    return layers[len(layers) // 2].mlp.down_proj.weight


def hidden_states(model: Any, tokens_BT: Tensor, attention_BT: Tensor) -> Tensor:
    """Final hidden states [B, T, D] (after the last norm): the lm_head's input."""
    return model.model(
        input_ids=tokens_BT,
        attention_mask=attention_BT,
        position_ids=positions(attention_BT),
        use_cache=False,
    ).last_hidden_state


def positions(attention_BT: Tensor) -> Tensor:
    """Position of each token in its own sequence, so that left padding does not shift a prompt."""
    return (attention_BT.cumsum(dim=-1) - 1).clamp_min(0)
