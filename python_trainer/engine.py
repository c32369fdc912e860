"""Who samples: `generate` of transformers, on the policy itself."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from .config import TrainConfig
from .model import Policy


class Engine(Protocol):
    """Continues prompts with the policy's current weights."""

    def refresh(self) -> None:
        """Before a rollout: the weights may have changed."""
        ...

    def generate(
        self, prompts: Sequence[list[int]], limits: Sequence[int], temperature: float, seed: int
    ) -> list[list[int]]:
        """New tokens of each prompt, up to and with eos, or as many as its limit."""
        ...


class TransformersEngine:
    """Samples with a KV cache; reproducible for a seed and the same prompts in a call.

    A sharded policy must be `distributed.gathered` meanwhile.
    """

    def __init__(self, policy: Policy) -> None:
        self.policy = policy

    def refresh(self) -> None:
        pass  # it is the policy itself

    @torch.no_grad()
    def generate(
        self, prompts: Sequence[list[int]], limits: Sequence[int], temperature: float, seed: int
    ) -> list[list[int]]:
        from transformers import GenerationConfig

        policy, tokenizer = self.policy, self.policy.tokenizer
        tokens_BT, attention_BT = pad_left(prompts, tokenizer.pad)
        device = policy.head.weight.device
        settings = GenerationConfig(
            do_sample=True, temperature=temperature, top_k=0, top_p=1.0, max_new_tokens=max(limits),
            eos_token_id=tokenizer.eos, pad_token_id=tokenizer.pad,
        )  # fmt: skip
        devices = [device] if device.type == "cuda" else []
        model: Any = policy.model
        with torch.random.fork_rng(devices), policy.autocast():
            torch.manual_seed(seed)
            sampled_BT = model.generate(
                tokens_BT.to(device), attention_mask=attention_BT.to(device),
                generation_config=settings,
                synced_gpus=False,  # ranks have different episodes; whole weights need no company
            )  # fmt: skip
        new_BC = sampled_BT[:, tokens_BT.shape[1] :].tolist()
        return [_until(row[:n], tokenizer.eos) for row, n in zip(new_BC, limits, strict=True)]


def make_engine(policy: Policy, config: TrainConfig) -> Engine:
    """Who samples for this run."""
    if config.vllm_url is not None:
        from .vllm_engine import VLLMEngine

        return VLLMEngine(policy, config.vllm_url)
    return TransformersEngine(policy)


def pad_left(rows: Sequence[list[int]], pad: int, at_least: int = 0) -> tuple[Tensor, Tensor]:
    """Ids and attention, both int64 [B, longest]."""
    width = max(at_least, *(len(row) for row in rows))
    tokens = torch.tensor([[pad] * (width - len(row)) + row for row in rows])
    attention = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    return tokens, attention


def _until(row: list[int], eos: int) -> list[int]:
    return row[: row.index(eos) + 1] if eos in row else row
