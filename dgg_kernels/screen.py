"""The lm_head's weight in few bits, made once per update, and what a screen tells of itself."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

Screen = Literal["bf16", "int8", "fp8"]
_CODES = {"bf16": torch.bfloat16, "int8": torch.int8, "fp8": torch.float8_e4m3fn}


class ScreenStats(NamedTuple):
    """How good the screen was: tensors on the device, no gradient; reading them waits for it."""

    error_bound: Tensor  # [...] fp32, nats: |logp - exact logp| is below; 0 where computed exactly
    exact_rows: Tensor  # 0-dim: rows that the screen did not suit, computed without it
    refined: Tensor  # 0-dim: entries computed anew, over all rows
    rms_error: Tensor  # 0-dim, nats: of the screened logits of those entries
    missed: Tensor  # 0-dim: estimate of entries with p > grad_eps that were not kept, over all rows


class _Copy(NamedTuple):
    version: int
    address: int
    codes: list[Tensor]


# By identity: two weights that compare equal are two weights.
_copies: WeakIdKeyDictionary = WeakIdKeyDictionary()


@torch.library.custom_op("dgg::quantize_rows", mutates_args=())
def _quantize_rows(x: Tensor, kind: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if x.device.type == "cpu":
        return torch.ops.dgg.quantize_rows_cpu(x, kind == "int8")
    module = importlib.import_module(f"{__package__}.lm_head_screen")  # needs triton
    return module.quantize_rows(x, _CODES[kind])


@_quantize_rows.register_fake
def _(x, kind):
    rows = [x.new_empty(x.shape[0], dtype=torch.float32) for _ in range(3)]
    return x.new_empty(x.shape, dtype=_CODES[kind]), *rows


def codes_of(weight: Tensor, kind: Screen) -> list[Tensor]:
    """Codes of a weight [V, D]: codes [V, D], scale [V], squared norms of rows and rounding [V].

    Kept until the weight is written to: any in-place operation counts, a step of an optimizer too.
    """
    if torch.compiler.is_compiling():
        return list(_quantize_rows(weight.detach(), kind))
    if weight not in _copies:
        _copies[weight] = {}
    of_weight: dict[str, _Copy] = _copies[weight]
    kept = of_weight.get(kind)
    if kept is None or (kept.version, kept.address) != (weight._version, weight.data_ptr()):
        of_weight.pop(kind, None)  # before the new copy takes memory
        codes = list(_quantize_rows(weight.detach(), kind))
        kept = of_weight[kind] = _Copy(weight._version, weight.data_ptr(), codes)
    return kept.codes


def check_screen(screen: str, hidden: Tensor, grad_eps: float) -> None:
    """Raise ValueError unless this screen is one, and can be had on this device."""
    device = hidden.device.type
    if screen not in get_args(Screen):
        raise ValueError(f"screen: expected one of {get_args(Screen)} or None, got {screen!r}")
    if device not in ("cpu", "cuda"):
        raise ValueError(f"screen: expected None on a device of type {device!r}, got {screen!r}")
    if grad_eps == 0:
        raise ValueError(f"screen: needs grad_eps > 0, got grad_eps=0.0 with screen={screen!r}")
    if screen == "bf16" and hidden.dtype != torch.float32:
        raise ValueError(f"screen: 'bf16' screens float32 weights, got {hidden.dtype}")
    if screen == "fp8" and device == "cpu":
        raise ValueError("screen: 'fp8' needs a GPU; 'int8' runs on a CPU")
    if screen == "fp8" and torch.version.hip is None:
        capability = torch.cuda.get_device_capability(hidden.device)
        if capability < (8, 9):
            raise ValueError(f"screen: 'fp8' needs sm_89 or later, got sm_{capability[0]}"
                             f"{capability[1]}; 'int8' runs here")  # fmt: skip


def stats(report: Tensor, shape: Sequence[int]) -> ScreenStats:
    """What the op's report [N, 4] (bound, refined entries, squared error, missed) says."""
    bound, refined, error_sq, missed = report.unbind(1)
    total = refined.sum()
    return ScreenStats(
        bound.clamp(min=0.0).reshape(tuple(shape)),
        (bound < 0).sum(),
        total,
        (error_sq.sum() / total.clamp(min=1.0)).sqrt(),
        missed.sum(),
    )
