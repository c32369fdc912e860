"""Per-token log-probs of a language-model head, each implementation as its authors set it up.

Where a setting decides the time, more than one is here: chunks of two sizes, each of CCE's
implementations. Nothing was searched for beyond that (of torch.compile its default mode alone).

A peer is a function (hidden [N, D], weight [V, D], target [N]) -> logp [N] that autograd can go
back through; one that knows Gemma's softcap takes it as an argument. `available(device)` lists
those that run here and names those that are missing.
To add one: write its function, and name it in PEERS.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
import types
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from dgg_kernels import linear_logprob

Peer = Callable[..., Tensor]


def ours(
    hidden: Tensor, weight: Tensor, target: Tensor, softcap: float | None = None, **options: Any
) -> Tensor:
    return linear_logprob(hidden, weight, target, softcap=softcap, **options).logp


def _logits(hidden: Tensor, weight: Tensor, softcap: float | None) -> Tensor:
    logits = hidden @ weight.T
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def torch_eager(
    hidden: Tensor, weight: Tensor, target: Tensor, softcap: float | None = None
) -> Tensor:
    """cross_entropy over fp32 logits: faster than log_softmax and gather."""
    return -F.cross_entropy(_logits(hidden, weight, softcap).float(), target, reduction="none")


def _eager_16_bit_logits(
    hidden: Tensor, weight: Tensor, target: Tensor, softcap: float | None = None
) -> Tensor:
    return -F.cross_entropy(_logits(hidden, weight, softcap), target, reduction="none").float()


torch_compiled: Peer = torch.compile(torch_eager)


def _torch_chunked(rows: int | None) -> Peer:
    """torch >= 2.13; None: chunks as torch chooses them, for memory's sake."""

    def function(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        chunks: dict[str, Any] = {"chunking_method": None, "batch_chunk_size": rows}
        options = torch.nn.LinearCrossEntropyOptions(**chunks if rows else {})
        return -F.linear_cross_entropy(hidden, weight, target, reduction="none", options=options)

    return function


def _trl(chunk: int) -> Peer:
    def function(
        hidden: Tensor, weight: Tensor, target: Tensor, softcap: float | None = None
    ) -> Tensor:
        from trl.kernels.chunked_logprob import ChunkedLogProbFunction

        no_outputs = (softcap, 1.0, ())
        return ChunkedLogProbFunction.apply(hidden, weight, None, target, 1.0, chunk, *no_outputs)[
            0
        ]

    return function


def liger(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    """Scaled cross-entropy: SM90 kernel on Hopper, its chunked PyTorch elsewhere."""
    from liger_kernel.ops import fused_linear_scaled_cross_entropy as module

    return -module.LigerFusedLinearScaledCrossEntropyFunction.apply(hidden, weight, target)


def _cut_cross_entropy(impl: str) -> Peer:
    def function(
        hidden: Tensor, weight: Tensor, target: Tensor, softcap: float | None = None
    ) -> Tensor:
        from cut_cross_entropy import linear_cross_entropy

        options: dict[str, Any] = {"reduction": "none", "softcap": softcap, "impl": impl}
        return -linear_cross_entropy(hidden, weight, target, **options)

    return function


def quack(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    """QuACK's cross-entropy behind a linear layer: its chunked head has no loss per token."""
    from quack.linear_cross_entropy import linear_cross_entropy_func

    return -linear_cross_entropy_func(hidden, weight, None, target, reduction="none")


def verl(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    """verl's Triton head."""
    linear_cross_entropy = importlib.import_module(_VERL).linear_cross_entropy
    return linear_cross_entropy(hidden, weight, target, 1.0, "none")[0]


_VERL = "verl.utils.kernel.linear_cross_entropy"


def import_peer(module: str) -> None:
    """Import a peer's module; of verl the head alone, for its package wants ray and tensordict."""
    if module == _VERL and "verl" not in sys.modules and (spec := importlib.util.find_spec("verl")):
        for name, folders in (
            ("verl", list(spec.submodule_search_locations or ())),
            ("verl.utils", [f"{f}/utils" for f in spec.submodule_search_locations or ()]),
        ):
            package = types.ModuleType(name)
            package.__path__ = folders
            sys.modules[name] = package
    importlib.import_module(module)


# name -> (function, module it needs, devices)
PEERS: dict[str, tuple[Peer, str, tuple[str, ...]]] = {
    "ours": (ours, "dgg_kernels", ("cpu", "cuda")),
    "ours, grad_eps=0": (partial(ours, grad_eps=0.0), "dgg_kernels", ("cpu", "cuda")),
    "torch eager": (torch_eager, "torch", ("cpu", "cuda")),
    "torch eager, 16-bit logits": (_eager_16_bit_logits, "torch", ("cuda",)),
    "torch.compile": (torch_compiled, "torch", ("cpu", "cuda")),
    "torch linear_cross_entropy": (_torch_chunked(None), "torch", ("cpu", "cuda")),
    "torch linear_cross_entropy, 512 rows": (_torch_chunked(512), "torch", ("cpu", "cuda")),
    "TRL chunked head, 8192": (_trl(8192), "trl.kernels.chunked_logprob", ("cpu", "cuda")),
    "TRL chunked head, 32768": (_trl(32768), "trl.kernels.chunked_logprob", ("cpu", "cuda")),
    "Liger scaled cross-entropy": (
        liger, "liger_kernel.ops.fused_linear_scaled_cross_entropy", ("cpu", "cuda"),
    ),
    "Cut Cross-Entropy, torch_compile": (
        _cut_cross_entropy("torch_compile"), "cut_cross_entropy", ("cpu", "cuda"),
    ),
    "Cut Cross-Entropy": (_cut_cross_entropy("cce"), "cut_cross_entropy", ("cuda",)),
    "QuACK": (quack, "quack.linear_cross_entropy", ("cuda",)),
    "verl": (verl, _VERL, ("cuda",)),
}  # fmt: skip


def available(device: str, softcap: float | None = None) -> tuple[dict[str, Peer], dict[str, str]]:
    """Peers that run on this device, with that softcap, and the reason for each that does not."""
    found, missing = {}, {}
    for name, (function, module, devices) in PEERS.items():
        if device not in devices:
            continue
        try:
            import_peer(module)
        except Exception as error:  # a broken peer must not break the benchmark
            missing[name] = reason(error)
            continue
        chunked = name.startswith("torch linear_cross_entropy")
        if chunked and not hasattr(torch.nn, "LinearCrossEntropyOptions"):
            missing[name] = f"needs torch >= 2.13, this is {torch.__version__}"
        elif softcap is not None and "softcap" not in inspect.signature(function).parameters:
            missing[name] = "has no softcap"
        else:
            found[name] = function if softcap is None else partial(function, softcap=softcap)
    return found, missing


def reason(error: Exception) -> str:
    """Why a peer did not run, in one line."""
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:120]}"
