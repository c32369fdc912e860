"""`linear_logprob`: log-probs of targets from hidden states, with logits never materialised.

Layers, in this order: device implementations of the two ops -> their registration -> the op with
autograd -> the public function.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from functools import wraps
from numbers import Real
from typing import TYPE_CHECKING, Any, NamedTuple, ParamSpec

import torch
from torch import Tensor

from . import lm_head_chunked
from .screen import Screen, ScreenStats, check_screen, codes_of, stats

if TYPE_CHECKING:
    from .gate import GradientGate

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# Below V = 0.5 / grad_eps a row may keep most of its entries: dense products are then faster.
_WORTH_DRAWING = 0.5


class LogprobOutput(NamedTuple):
    """What `linear_logprob` returns; tensors have the target's shape, fp32, 0 where ignored."""

    logp: Tensor  # log-prob of the target, differentiable
    entropy: Tensor  # of the whole distribution, nats, differentiable
    lse: Tensor  # log-sum-exp of the (scaled) logits, no gradient
    sum_p2: Tensor  # sum over the vocabulary of p^2, no gradient
    screen_stats: ScreenStats | None = None  # with a screen: its error bound, and what it did


# -- registration: C++ on the CPU (csrc/cpu), Triton on CUDA and ROCm, plain PyTorch elsewhere -----


def _triton(op: str) -> Callable[..., Any]:
    def call(*args: Any) -> Any:
        # At the first call: importing the package must not need triton.
        if importlib.util.find_spec("triton") is None:
            if torch.version.hip:
                return getattr(lm_head_chunked, op)(*args)
            raise ImportError("linear_logprob on a CUDA device needs triton: pip install triton")
        return getattr(importlib.import_module(f"{__package__}.{op}"), op)(*args)

    return lm_head_chunked.without_autocast(call)


for _op in ("lm_head_forward", "lm_head_backward"):
    torch.library.register_kernel(f"dgg::{_op}", "cuda", _triton(_op))
    for _device in ("mps", "xpu"):
        torch.library.register_kernel(f"dgg::{_op}", _device, getattr(lm_head_chunked, _op))


def _check_matrices(hidden: Tensor, weight: Tensor) -> None:
    """Of a fake kernel's arguments, those whose shapes it reads; the real ones check them all."""
    for name, t in {"hidden": hidden, "weight": weight}.items():
        if t is None or t.dim() != 2:
            raise RuntimeError(f"{name}: expected a matrix, got {None if t is None else _shape(t)}")


@torch.library.register_fake("dgg::lm_head_forward")
def _(hidden: Tensor, weight: Tensor, *others: Any) -> tuple[Tensor, ...]:
    seed, screen = others[-2:]
    _check_matrices(hidden, weight)
    N = hidden.shape[0]
    rows = [hidden.new_empty(N, dtype=torch.float32) for _ in range(4)]
    size = 0 if seed is None else torch.library.get_ctx().new_dynamic_size()
    report = hidden.new_empty((N if screen else 0, 4), dtype=torch.float32)
    return (*rows, hidden.new_empty(size, dtype=torch.int32), report)


@torch.library.register_fake("dgg::lm_head_backward")
def _(
    grad_logp: Tensor, grad_entropy: Tensor | None, grad_lse: Tensor | None, hidden: Tensor,
    weight: Tensor, target: Tensor, bias: Tensor | None, *others: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    need_hidden, need_weight, need_bias, need_row_sq = others[-4:]
    _check_matrices(hidden, weight)
    return (
        hidden.new_empty(hidden.shape if need_hidden else 0),
        weight.new_empty(weight.shape if need_weight else 0),
        bias.new_empty(bias.shape) if need_bias and bias is not None else hidden.new_empty(0),
        hidden.new_empty(weight.shape[0] if need_row_sq else 0, dtype=torch.float32),
    )


# -- autograd -------------------------------------------------------------------------------------


@torch.library.custom_op("dgg::linear_logprob", mutates_args=())
def _linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    temperature: float,
    softcap: float,
    grad_eps: float,
    lse_ref: Tensor | None,
    seed: Tensor | None,
    screen: list[Tensor],
    gate_row_sq: Tensor | None,
    gate_id: int,
    gate_accumulates: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    return torch.ops.dgg.lm_head_forward(
        hidden, weight, target, bias, temperature, softcap, grad_eps, lse_ref, seed, screen
    )


@_linear_logprob.register_fake
def _(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, *others: Any
) -> tuple[Tensor, ...]:
    *options, _, _, _ = others  # the last three are the gate's
    return torch.ops.dgg.lm_head_forward(hidden, weight, target, bias, *options)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden, weight, bias, target, temperature, softcap, grad_eps, _, seed = inputs[:9]
    screen, row_sq, *gate = inputs[9:]
    _, entropy, lse, sum_p2, active, report = output
    ctx.save_for_backward(hidden, weight, bias, target, lse, entropy, active, seed)
    # Not saved: the backward writes there, and a hook may hand back a copy of what was saved.
    ctx.gate_row_sq = row_sq
    ctx.scalars = (temperature, softcap, grad_eps, bool(screen))
    ctx.gate = tuple(gate)
    ctx.mark_non_differentiable(sum_p2, active, report)
    ctx.screens = len(screen)
    ctx.set_materialize_grads(False)


def _backward(
    ctx: Any,
    grad_logp: Tensor | None,
    grad_entropy: Tensor | None,
    grad_lse: Tensor | None,
    *_: None,
) -> tuple[Any, ...]:
    if torch.is_grad_enabled():
        raise RuntimeError("linear_logprob: it has no second derivative (create_graph=True)")
    hidden, weight, bias, target, lse, entropy, active, seed = ctx.saved_tensors
    gate_id, gate_accumulates = ctx.gate
    gated = ctx.gate_row_sq is not None
    wanted = ctx.needs_input_grad[:3]
    need = (wanted[0], wanted[1] or gate_accumulates, wanted[2])
    d_hidden, d_weight, d_bias, row_sq = torch.ops.dgg.lm_head_backward(
        torch.zeros_like(lse) if grad_logp is None else grad_logp, grad_entropy, grad_lse,
        hidden, weight, target, bias, lse, entropy, active, seed, *ctx.scalars, *need, gated,
    )  # fmt: skip
    if gated:
        torch.ops.dgg.gate_record(ctx.gate_row_sq, row_sq, d_weight, gate_id)
    d_inputs = zip((d_hidden, d_weight, d_bias), wanted, strict=True)
    none = [None] * 6
    return (
        *(d if needed else None for d, needed in d_inputs),
        *none,
        [None] * ctx.screens,
        *[None] * 3,
    )


_linear_logprob.register_autograd(_backward, setup_context=_setup_context)


# -- public ---------------------------------------------------------------------------------------

P = ParamSpec("P")


def _without_gradient_of_lse(function: Callable[P, LogprobOutput]) -> Callable[P, LogprobOutput]:
    """What callers keep an lse for, the next pass, would keep this pass's graph."""

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> LogprobOutput:
        out = function(*args, **kwargs)
        # Not _replace, which torch 2.11 cannot compile.
        return LogprobOutput(out.logp, out.entropy, out.lse.detach(), out.sum_p2, out.screen_stats)

    return call


@_without_gradient_of_lse
def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    grad_eps: float = 2**-12,
    lse_ref: Tensor | None = None,
    screen: Screen | None = None,
    gate: GradientGate | None = None,
) -> LogprobOutput:
    """Per-token log-probs and entropies of a language-model head, without its logits.

    With z_v = cap(h . W_v + b_v) / T: logp = z_y - lse, lse = log sum_v exp z_v. Any loss is a few
    lines of PyTorch over these; its gradient reaches `hidden`, `weight` and `bias`.

    Args:
        hidden: [..., D], bf16, fp16 or fp32.
        weight: [V, D] of the same dtype and device.
        target: [...], int64, in [0, V), or `ignore_index`.
        bias: [V] or None.
        temperature: T > 0.
        softcap: s > 0 for logits s tanh(x / s) (Gemma), applied before the temperature.
        ignore_index: rows with this target do no work and give zeros.
        grad_eps: probability below which an entry of the gradient is drawn at random, with
            probability p / grad_eps and weight grad_eps / p: unbiased. 0.0 keeps every entry, and
            so does a vocabulary of no more than 0.5 / grad_eps.
        lse_ref: [...], any estimate of lse, such as that of the previous pass. Steers only which
            entries are drawn; may be left out.
        screen: take all logits in this arithmetic, and at full precision only those that matter
            (docs/screening.md). The log-probs then have an error, bounded by
            `screen_stats.error_bound`. "int8" and "fp8" (GPU) hold one scale per row; "bf16"
            screens fp32 weights. A copy of the weight in it is kept until the weight changes.
            Without effect on a vocabulary of no more than 0.5 / grad_eps.
        gate: the `GradientGate` that shall see the norm of this head's gradient. While it is shut
            every row counts as ignored: an update that will be discarded costs next to nothing.

    Returns:
        LogprobOutput of logp, entropy, lse, sum_p2, each [...] fp32, and the screen's statistics.

    Raises:
        TypeError, ValueError: an argument's type, dtype, shape, device or range; names it, what was
            expected and what came. On a GPU, or when compiled, a target outside [0, V) is not
            looked at by the host: its row's outputs and gradients are NaN, which shuts the gate.
        RuntimeError: a backward with `create_graph=True`: there is no second derivative.
    """
    parameter = weight
    hidden, weight, bias = autocast(hidden, weight, bias)
    check_tensors(hidden, weight, target, bias, lse_ref)
    _check_scalars(temperature, softcap, grad_eps, ignore_index)
    if screen is not None:
        check_screen(screen, hidden, grad_eps)
    vocabulary, shape = weight.shape[0], target.shape
    target = target.reshape(-1)
    ignored = target == ignore_index
    if gate is not None:
        if not hasattr(gate, "check_weight"):  # its class is not imported here
            raise TypeError(f"gate: expected a GradientGate, got {type(gate).__name__}")
        gate.check_weight(weight)
        ignored = ignored | (gate.found_inf != 0)
    outside = ~ignored & ((target < 0) | (target >= vocabulary))
    if target.device.type == "cpu" and not torch.compiler.is_compiling():
        _check_targets(target, outside, vocabulary)
    rows = torch.where(ignored, -1, target.where(~outside, 0))
    tracked = [t for t in (hidden, weight, bias) if t is not None and t.requires_grad]
    draws = grad_eps * vocabulary > _WORTH_DRAWING
    codes = codes_of(weight, screen, parameter) if screen is not None and draws else []
    seed = None
    if draws and (codes or (tracked and torch.is_grad_enabled())):
        # From the default generator: manual_seed reproduces it, checkpointing restores it.
        seed = torch.randint(2**31 - 1, (1,), device=hidden.device)
    logp, entropy, lse, sum_p2, _, report = _linear_logprob(
        hidden.reshape(-1, hidden.shape[-1]),
        weight,
        bias,
        rows,
        float(temperature),
        float(softcap or 0.0),
        float(grad_eps),
        None if lse_ref is None else lse_ref.detach().reshape(-1).float(),
        seed,
        codes,
        None if gate is None else gate.row_sq,
        -1 if gate is None else gate.id,
        gate is not None and gate.config.accumulate,
    )
    if target.device.type != "cpu" or torch.compiler.is_compiling():
        # NaN, forward and backward; fp32 whatever torch's default is.
        mark = torch.where(outside, torch.nan, 1.0).float()
        logp, entropy, lse, sum_p2 = (o * mark for o in (logp, entropy, lse, sum_p2))
    screen_stats = stats(report, shape) if codes else None
    if len(shape) != 1:  # of one dimension already: FSDP2 warns of outputs that are views
        logp, entropy, lse, sum_p2 = (o.reshape(shape) for o in (logp, entropy, lse, sum_p2))
    return LogprobOutput(logp, entropy, lse, sum_p2, screen_stats)


# With an lse that has a gradient, too: logp + lse is then the target's logit.
logprob_with_lse: Callable[..., LogprobOutput] = linear_logprob.__wrapped__  # pyright: ignore


def autocast(
    hidden: Tensor, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Under torch.autocast the head runs in the autocast dtype, as torch's own linear does."""
    if not all(isinstance(t, Tensor) for t in (hidden, weight)):
        return hidden, weight, bias
    device = hidden.device.type
    # Not torch.amp.is_autocast_available, which torch 2.11 cannot compile.
    if device not in ("cpu", "cuda", "mps", "xpu") or not torch.is_autocast_enabled(device):
        return hidden, weight, bias
    dtype = torch.get_autocast_dtype(device)
    return hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)


def check_tensors(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    lse_ref: Tensor | None = None,
    names: tuple[str, str, str] = ("hidden", "weight", "bias"),
) -> None:
    """Raise TypeError or ValueError unless they fit together; `names` are the caller's."""
    h, w, b = names
    tensors = {h: hidden, w: weight, "target": target}
    optional = {b: bias, "lse_ref": lse_ref}
    tensors |= {name: t for name, t in optional.items() if t is not None}
    for name, t in tensors.items():
        if not isinstance(t, Tensor):
            raise TypeError(f"{name}: expected a Tensor, got {type(t).__name__}")
        if t.device != hidden.device:
            raise ValueError(f"{name}: expected device {hidden.device} like {h}, got {t.device}")
        if t.layout != torch.strided:
            raise TypeError(f"{name}: expected a dense Tensor, got {t.layout}")
        if hasattr(t, "full_tensor"):  # its class would take long to import
            raise TypeError(
                f"{name}: expected a plain Tensor, got a DTensor: call this inside the forward of "
                "the FSDP2 module that holds it, or gather it first"
            )
    if hidden.dtype not in _DTYPES:
        raise TypeError(f"{h}: expected bfloat16, float16 or float32, got {hidden.dtype}")
    if weight.dtype != hidden.dtype:
        raise TypeError(f"{w}: expected {hidden.dtype} like {h}, got {weight.dtype}")
    if target.dtype != torch.int64:
        raise TypeError(f"target: expected int64, got {target.dtype}")
    if weight.dim() != 2 or weight.shape[0] == 0:
        raise ValueError(f"{w}: expected [V, D] with V > 0, got {_shape(weight)}")
    if hidden.dim() < 1 or hidden.shape[-1] != weight.shape[1]:
        raise ValueError(f"{h}: expected [..., D] with D = {weight.shape[1]} "
                         f"as in {w}, got {_shape(hidden)}")  # fmt: skip
    leading = hidden.shape[:-1]
    if target.shape != leading:
        raise ValueError(f"target: expected {_shape(leading)} like {h}, got {_shape(target)}")
    if lse_ref is not None and lse_ref.shape != leading:
        raise ValueError(f"lse_ref: expected {_shape(leading)} like target, got {_shape(lse_ref)}")
    if lse_ref is not None and not lse_ref.is_floating_point():
        raise TypeError(f"lse_ref: expected floating values, got {lse_ref.dtype}")
    if bias is not None and bias.dtype not in _DTYPES:
        raise TypeError(f"{b}: expected bfloat16, float16 or float32, got {bias.dtype}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"{b}: expected [{weight.shape[0]}] as in {w}, got {_shape(bias)}")


def _check_scalars(
    temperature: float, softcap: float | None, grad_eps: float, ignore_index: int
) -> None:
    numbers = {"temperature": temperature, "grad_eps": grad_eps}
    for name, value in (numbers if softcap is None else numbers | {"softcap": softcap}).items():
        if not isinstance(value, Real) or isinstance(value, bool):
            raise TypeError(f"{name}: expected a number, got {value!r}")
    if not 0 < temperature < float("inf"):
        raise ValueError(f"temperature: expected a positive number, got {temperature!r}")
    if softcap is not None and not 0 < softcap < float("inf"):
        raise ValueError(f"softcap: expected a positive number or None, got {softcap!r}")
    if not 0 <= grad_eps < 1:
        raise ValueError(f"grad_eps: expected a number in [0, 1), got {grad_eps!r}")
    if not isinstance(ignore_index, int) or isinstance(ignore_index, bool):
        raise TypeError(f"ignore_index: expected an integer, got {ignore_index!r}")
    if not -(2**63) <= ignore_index < 2**63:
        raise ValueError(f"ignore_index: expected an int64, got {ignore_index!r}")


def _shape(of: Tensor | torch.Size) -> list[int]:
    return list(of.shape if isinstance(of, Tensor) else of)


def _check_targets(target: Tensor, outside: Tensor, vocabulary: int) -> None:
    bad = outside.numpy()
    if bad.any():
        got = target.numpy()[bad][0]
        raise ValueError(f"target: expected values in [0, {vocabulary}) or ignore_index, got {got}")
