"""The lm_head's weight in few bits, made once per update, and what a screen tells of itself."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook
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


class Codes(NamedTuple):
    """Rows in few bits: row i is about scale[i] * codes[i]."""

    codes: Tensor  # [R, D] int8, float8_e4m3fn or bfloat16
    scale: Tensor  # [R] fp32
    norm_sq: Tensor  # [R] fp32, of the rows themselves
    residual_sq: Tensor  # [R] fp32, of what the codes leave out

    @classmethod
    def empty(cls, x: Tensor, dtype: torch.dtype) -> Codes:
        """Room for those of x [R, D]."""
        rows = (x.new_empty(len(x), dtype=torch.float32) for _ in range(3))
        return cls(x.new_empty(x.shape, dtype=dtype), *rows)


@dataclass
class _Copy:
    version: int
    address: int
    codes: list[Tensor]
    # 0-dim fp32: 1.0 while every optimizer that stepped since the codes were made skipped its step.
    unchanged: Tensor | None


# By identity: two weights that compare equal are two weights.
_copies: WeakIdKeyDictionary = WeakIdKeyDictionary()
_SPOT_CHECKS = 64  # rows


@torch.library.custom_op(
    "dgg::quantize_rows", mutates_args=("codes", "scale", "norm_sq", "residual_sq")
)
def _quantize_rows(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    norm_sq: Tensor,
    residual_sq: Tensor,
    unchanged: Tensor | None,
) -> None:
    if x.device.type == "cpu":
        torch.ops.dgg.quantize_rows_cpu(x, codes, scale, norm_sq, residual_sq, unchanged)
        return
    module = importlib.import_module(f"{__package__}.lm_head_screen")  # needs triton
    with torch.cuda.device_of(x):
        module.quantize_rows_into(x, Codes(codes, scale, norm_sq, residual_sq), unchanged)


@_quantize_rows.register_fake
def _(*_: Any) -> None:
    return None


def _quantized(weight: Tensor, kind: Screen) -> list[Tensor]:
    codes = Codes.empty(weight, _CODES[kind])
    _quantize_rows(weight, *codes, None)
    return [*codes]


def codes_of(weight: Tensor, kind: Screen, owner: Tensor) -> list[Tensor]:
    """`Codes` of a weight [V, D] that is `owner`, or what autocast has just made of it.

    Kept until the owner is written to, which its version counter does not always tell: it stands
    still under torch's fused optimizers, FSDP's all-gather and writes through `.data`. So any step
    of any optimizer counts as a write, unless its `found_inf` made it an empty one, and some rows
    are compared at every call: the device decides then whether to make the codes anew. A write
    through `.data` to other rows is not noticed.
    Compiled or captured calls, whose repetition asks nobody, always do; and once an optimizer's
    step was captured, all calls.
    """
    data = weight.detach()
    repeated = torch.compiler.is_compiling() or _steps_are_captured or _capturing()
    if repeated or owner.is_inference():  # the latter does not count its writes
        return _quantized(data, kind)
    if owner not in _copies:
        _copies[owner] = {}
    of_weight: dict[str, _Copy] = _copies[owner]
    kept = of_weight.get(kind)
    if kept is None or (kept.version, kept.address) != (owner._version, owner.data_ptr()):
        of_weight.pop(kind, None)  # before the new copy takes memory
        codes = _quantized(data, kind)
        kept = of_weight[kind] = _Copy(owner._version, owner.data_ptr(), codes, None)
    else:
        same = _spot_check(data, kept.codes, kind)
        unchanged = same if kept.unchanged is None else same * kept.unchanged
        _quantize_rows(data, *kept.codes, unchanged)
        kept.unchanged = None
    return kept.codes


def _spot_check(weight: Tensor, codes: list[Tensor], kind: Screen) -> Tensor:
    """1.0 if some rows' squared norms and rounding errors are what they were, to the bit."""
    every = max(1, len(weight) // _SPOT_CHECKS)
    fresh = torch.stack(_quantized(weight[::every], kind)[2:])
    return (fresh == torch.stack([squares[::every] for squares in codes[2:]])).all().float()


def _capturing() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


_steps_are_captured = False  # then weights change by replays, of which nothing here is told


def _count_step(optimizer: Optimizer, *_: object) -> None:
    """After any optimizer's step: what has been written, as far as the host can know."""
    global _steps_are_captured
    _steps_are_captured = _steps_are_captured or _capturing()
    if _steps_are_captured:
        _copies.clear()
        return
    skipped = getattr(optimizer, "found_inf", None)
    if not all(group.get("fused") for group in optimizer.param_groups):
        skipped = None  # who reads it, and when, is not known
    for of_weight in list(_copies.data.values()):  # at once: another thread may add one
        for kind, kept in list(of_weight.items()):
            if skipped is None or skipped.device != kept.codes[0].device:
                of_weight.pop(kind, None)  # unless another thread has
            else:
                now = (skipped == 1.0).float()
                kept.unchanged = now if kept.unchanged is None else now * kept.unchanged


register_optimizer_step_post_hook(_count_step)


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
