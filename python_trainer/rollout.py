"""Sampling, log-probabilities of completions, and the exact evaluation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dgg_kernels import GradientGate, linear_logprob

from .config import TaskError, TrainConfig
from .model import CharTokenizer, head_weight, hidden_states, positions
from .tasks import Example, Task, score

IGNORE = -100


@dataclass
class Sequences:
    """Prompts (padded on the left) and completions (padded on the right)."""

    tokens_BT: Tensor  # int64
    attention_BT: Tensor  # int64; 1 at prompt tokens and at completion tokens up to eos
    mask_BC: Tensor  # bool; completion tokens that count: all up to eos, eos included

    @property
    def targets_BC(self) -> Tensor:
        """Completion ids, IGNORE where masked."""
        completion_BC = self.tokens_BT[:, -self.mask_BC.shape[1] :]
        return completion_BC.masked_fill(~self.mask_BC, IGNORE)


@dataclass
class Rollout:
    """One rollout batch of B = P * G sequences; the G completions of a prompt are neighbours."""

    sequences: Sequences
    old_logp_BC: Tensor  # log-probs under the policy that sampled them, at `temperature`
    lse_BC: Tensor  # its log-sum-exp: a reference for the re-uses
    reward_B: Tensor
    completions: list[str]


def pad_prompts(tokenizer: CharTokenizer, examples: Sequence[Example]) -> tuple[Tensor, Tensor]:
    """Left-padded prompt ids and attention, both int64 [B, longest prompt]."""
    ids = [tokenizer.encode(example.prompt) for example in examples]
    width = max(len(row) for row in ids)
    tokens = torch.tensor([[tokenizer.pad] * (width - len(row)) + row for row in ids])
    attention = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in ids])
    return tokens, attention


def with_answers(
    tokenizer: CharTokenizer, examples: Sequence[Example], device: str = "cpu"
) -> Sequences:
    """Prompts followed by their reference answers and eos, for warm-up and evaluation."""
    answers = []
    for example in examples:
        if example.answer is None:
            raise TaskError(f"example {example.prompt!r}: expected a reference answer, got None")
        answers.append([*tokenizer.encode(example.answer), tokenizer.eos])
    width = max(len(row) for row in answers)
    answer_BC = torch.tensor([row + [tokenizer.pad] * (width - len(row)) for row in answers])
    length_B = torch.tensor([len(row) for row in answers])
    mask_BC = torch.arange(width) < length_B[:, None]
    prompt_BP, attention_BP = pad_prompts(tokenizer, examples)
    return Sequences(
        torch.cat([prompt_BP, answer_BC], dim=1).to(device),
        torch.cat([attention_BP, mask_BC.long()], dim=1).to(device),
        mask_BC.to(device),
    )


def completion_logprobs(
    model: Any,
    sequences: Sequences,
    config: TrainConfig,
    *,
    lse_ref_BC: Tensor | None = None,
    gate: GradientGate | None = None,
) -> tuple[Any, Tensor]:
    """`linear_logprob`'s output over [B, C], and the hidden states [B, C, D] that it read.

    Position t predicts token t + 1, so the hidden states are taken one to the left.
    """
    width = sequences.mask_BC.shape[1]
    hidden_BTD = hidden_states(model, sequences.tokens_BT, sequences.attention_BT)
    hidden_BCD = hidden_BTD[:, -width - 1 : -1]
    out = linear_logprob(
        hidden_BCD,
        head_weight(model),
        sequences.targets_BC,
        temperature=config.temperature,
        ignore_index=IGNORE,
        grad_eps=config.grad_eps,
        screen=config.screen,  # pyright: ignore[reportArgumentType]  # a known one: the config checks
        lse_ref=lse_ref_BC,
        gate=gate,
    )
    return out, hidden_BCD


@torch.no_grad()
def generate(
    model: Any,
    prompt_BP: Tensor,
    attention_BP: Tensor,
    config: TrainConfig,
    generator: torch.Generator,
) -> Sequences:
    """Sample completions with a KV cache until eos or `max_completion_length` tokens."""
    from transformers import DynamicCache

    eos, pad = CharTokenizer.eos, CharTokenizer.pad
    cache = DynamicCache(config=model.config)
    tokens_BT, attention_BT = prompt_BP, attention_BP
    step_tokens, step_positions = prompt_BP, positions(attention_BP)
    alive_B = torch.ones(len(prompt_BP), dtype=torch.bool, device=prompt_BP.device)
    masks = []
    for _ in range(config.max_completion_length):
        hidden = model.model(
            input_ids=step_tokens,
            attention_mask=attention_BT,
            position_ids=step_positions,
            past_key_values=cache,
            use_cache=True,
        ).last_hidden_state
        logits_BV = model.lm_head(hidden[:, -1]).float() / config.temperature
        token_B1 = torch.multinomial(logits_BV.softmax(dim=-1), 1, generator=generator)
        token_B1 = token_B1.masked_fill(~alive_B[:, None], pad)
        masks.append(alive_B)
        tokens_BT = torch.cat([tokens_BT, token_B1], dim=1)
        attention_BT = torch.cat([attention_BT, alive_B[:, None].long()], dim=1)
        alive_B = alive_B & (token_B1[:, 0] != eos)
        if not alive_B.any():
            break
        step_tokens, step_positions = token_B1, positions(attention_BT)[:, -1:]
    return Sequences(tokens_BT, attention_BT, torch.stack(masks, dim=1))


@torch.no_grad()
def rollout(
    model: Any,
    tokenizer: CharTokenizer,
    task: Task,
    examples: Sequence[Example],
    config: TrainConfig,
    generator: torch.Generator,
) -> Rollout:
    """`num_generations` completions of each example, with rewards and log-probabilities.

    The log-probabilities come from the same call as the updates', not from sampling (whose cached
    attention rounds differently), so that the first update's importance ratio is exactly 1.

    Raises:
        TaskError: the task's verifier failed.
    """
    group = config.num_generations
    prompt_PT, attention_PT = pad_prompts(tokenizer, examples)
    sequences = generate(
        model,
        prompt_PT.repeat_interleave(group, dim=0).to(config.device),
        attention_PT.repeat_interleave(group, dim=0).to(config.device),
        config,
        generator,
    )
    completion_BC = sequences.tokens_BT[:, -sequences.mask_BC.shape[1] :]
    completions = [tokenizer.decode(row) for row in completion_BC.tolist()]
    repeated = [example for example in examples for _ in range(group)]
    reward_B = torch.tensor(score(task, repeated, completions), device=config.device)
    out, _ = completion_logprobs(model, sequences, config)
    return Rollout(sequences, out.logp, out.lse, reward_B, completions)


@torch.no_grad()
def expected_accuracy(model: Any, sequences: Sequences, config: TrainConfig) -> float:
    """Mean probability of sampling exactly the reference answer, eos included.

    This is the expectation of the strict reward, by teacher forcing: no sampling noise. `sequences`
    come from `with_answers`.
    """
    out, _ = completion_logprobs(model, sequences, config)
    return float(out.logp.double().sum(dim=1).exp().mean())  # masked positions are exactly 0
