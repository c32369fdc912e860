"""Which optimizers can skip a step on the device, and how the gate's flag reaches them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from functools import wraps
from types import MethodType
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD, Adagrad, Adam, AdamW, Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

_CAN_SKIP = (Adam, AdamW, SGD, Adagrad)
# Their step does nothing: lomo_optim's, and what transformers puts in place of GaLore by layers.
_IN_THE_BACKWARD = {"Lomo", "AdaLomo", "LayerWiseDummyOptimizer"}
_REMEDY = (
    "use torch.optim.Adam, AdamW, SGD or Adagrad with fused=True, whose kernels read the flag on "
    "the device, or attach(..., host_gate=True), which waits for the device once per update"
)


class AttachedOptimizer(ExitStack):
    """An optimizer that reads the gate's flag; `close()` takes flag, clip scale and hooks away."""

    def __init__(self, optimizer: Optimizer, on_host: bool) -> None:
        super().__init__()
        self.optimizer, self.on_host = optimizer, on_host  # on_host: its step is not called
        self.has_decision = False  # of the gate, for its next step


def attach_optimizer(
    optimizer: Any,
    found_inf: Tensor,
    grad_scale: Tensor | None,
    steps: Callable[[AttachedOptimizer], bool],
    shut_on_host: Callable[[], bool] | None = None,
) -> AttachedOptimizer:
    """Make `optimizer.step()` read `found_inf` (skip) and `grad_scale` (divide the gradient by it).

    Both are 0-dim fp32 tensors on the parameters' device, read by torch's fused kernels: at
    found_inf == 1.0 parameters, moments and step counters keep their bits. Zeroing gradients would
    not do: AdamW then still moves the weights by momentum and decay.

    `steps` is called before every step, compiled ones included, or after its closure. If it raises,
    the step does not happen; if it says no, it happens as if there were no gate. With
    `shut_on_host` the optimizer's step is not called when that says so, whatever it is; it takes no
    closure then, whose gradient nobody would have seen.
    """
    while _is_accelerates(optimizer):  # on the wrapper the attributes would do nothing
        if shut_on_host is not None and optimizer.scaler is not None:
            # It calls the step that it found when it was made.
            raise ValueError(
                "optimizer: expected Accelerate's wrapper without a loss scaler (fp16) with "
                "host_gate=True: it would step past the gate; bf16 needs none"
            )
        optimizer = optimizer.optimizer
    if getattr(optimizer, "_dgg_attached", False):
        raise ValueError(
            f"optimizer: {_name(optimizer)} is attached to a gate already: detach that one first"
        )
    if type(optimizer).__name__ in _IN_THE_BACKWARD:
        raise TypeError(
            f"optimizer: expected one that waits for its step, got {_name(optimizer)}, which "
            "updates the weights in the backward, before a gate can see the gradient"
        )
    attached = AttachedOptimizer(optimizer, on_host=shut_on_host is not None)
    if shut_on_host is not None:
        _skip_on_host(attached, grad_scale, steps, shut_on_host)
    else:
        # A subclass's own step may read no flag.
        if _step_of(type(optimizer)) not in map(_step_of, _CAN_SKIP):
            raise TypeError(
                f"optimizer: {_name(optimizer)} cannot skip a step on the device; {_REMEDY}"
            )
        _check_can_skip(optimizer)
        _skip_on_device(attached, found_inf, grad_scale, steps)
    optimizer._dgg_attached = True  # pyright: ignore[reportAttributeAccessIssue]
    attached.callback(delattr, optimizer, "_dgg_attached")
    return attached


def _check_can_skip(optimizer: Optimizer) -> None:
    if not all(group.get("fused") for group in optimizer.param_groups):
        raise TypeError(
            f"optimizer: {_name(optimizer)} was built without fused=True, or has loaded the state "
            f"of one that was; {_REMEDY}"
        )
    _create_momentum(optimizer)


def _skip_on_device(
    attached: AttachedOptimizer,
    found_inf: Tensor,
    grad_scale: Tensor | None,
    steps: Callable[[AttachedOptimizer], bool],
) -> None:
    def set_flag(optimizer: Any) -> None:
        _check_can_skip(optimizer)  # load_state_dict may have changed it
        # Set at every step: a GradScaler puts its own here and deletes both afterwards.
        theirs = getattr(optimizer, "found_inf", None)
        scale = getattr(optimizer, "grad_scale", None)
        if scale is not None and scale is not grad_scale:
            raise RuntimeError(
                "optimizer: the gradient is still multiplied by the loss scale: call "
                "scaler.unscale_(optimizer) before gate.decide()"
            )
        if not steps(attached):
            optimizer.found_inf = None if theirs is found_inf else theirs
            optimizer.grad_scale = None
            return
        optimizer.found_inf = found_inf
        if theirs is not None and theirs is not found_inf:
            optimizer.found_inf = torch.maximum(found_inf, (theirs.to(found_inf) != 0).float())
        optimizer.grad_scale = grad_scale

    @torch.compiler.disable
    def before(optimizer: Any, args: Any, kwargs: Any) -> Any:
        closure = args[1] if len(args) > 1 else kwargs.get("closure")
        if closure is None:
            set_flag(optimizer)
            return None

        def decided() -> Any:  # in the closure, perhaps
            loss = closure()
            set_flag(optimizer)
            return loss

        return (optimizer,), {"closure": decided}

    @torch.compiler.disable
    def after(*_: Any) -> None:
        attached.has_decision = False  # not before: a step that raised may be repeated

    of: Any = attached.optimizer
    for name in ("found_inf", "grad_scale"):
        attached.callback(vars(of).pop, name, None)
    attached.callback(of.register_step_pre_hook(before).remove)
    attached.callback(of.register_step_post_hook(after).remove)


def _skip_on_host(
    attached: AttachedOptimizer,
    grad_scale: Tensor | None,
    steps: Callable[[AttachedOptimizer], bool],
    shut: Callable[[], bool],
) -> None:
    optimizer = attached.optimizer
    step = optimizer.step
    wrapped = "step" in vars(optimizer)  # by a learning-rate schedule
    released = False

    @torch.compiler.disable  # it asks the gate at every call
    @wraps(step)  # with what a schedule marks its own wrapper by
    def gated_step(_: Optimizer, *args: Any, **kwargs: Any) -> Any:
        if released:  # and kept by a schedule that was built since
            return step(*args, **kwargs)
        if (args and args[0] is not None) or kwargs.get("closure") is not None:
            raise TypeError("closure: expected None with host_gate=True, which decides before it")
        if not steps(attached):
            return step(*args, **kwargs)
        if shut():
            attached.has_decision = False
            return None
        if grad_scale is not None:
            groups = optimizer.param_groups
            for part in by_kind(p.grad for group in groups for p in group["params"]):
                scale = grad_scale.to(part[0].device)
                torch._foreach_div_(part, scale)  # pyright: ignore[reportPrivateImportUsage, reportPrivateUsage]
        attached.has_decision = False  # its gradient is clipped: once
        return step(*args, **kwargs)

    # A bound method, as a schedule that wraps it in its turn wants it.
    ours = optimizer.step = MethodType(gated_step, optimizer)  # type: ignore[method-assign]

    def release() -> None:
        nonlocal released
        released = True
        if vars(optimizer)["step"] is not ours:
            return
        if wrapped:
            optimizer.step = step  # type: ignore[method-assign]
        else:
            delattr(optimizer, "step")

    attached.callback(release)


def by_kind(grads: Iterable[Tensor | None]) -> list[list[Tensor]]:
    """Those that are there, by device, plain tensors and DTensors apart: one list for torch."""
    kinds: dict[Any, list[Tensor]] = {}
    for grad in grads:
        if grad is not None:
            kinds.setdefault((hasattr(grad, "full_tensor"), grad.device), []).append(grad)
    return [*kinds.values()]


class GatedScheduler:
    """Steps a learning-rate schedule once per applied update, instead of once per attempt.

    Call `step()` after `optimizer.step()`, as the scheduler's own. The number of applied updates is
    what the host knows of it (`GradientGate.applied_updates`): on one GPU the schedule may follow
    late, but it never counts a skipped update. Restore gate and schedule from a checkpoint before
    this is built; or after it, if the schedule has counted from the gate's first update on.

    Raises:
        TypeError: the schedule does not count its steps (`last_epoch`).
    """

    def __init__(self, scheduler: LRScheduler, applied_updates: Callable[[], int]) -> None:
        counts = isinstance(getattr(scheduler, "last_epoch", None), int)
        if not counts or isinstance(scheduler, ReduceLROnPlateau):
            raise TypeError("scheduler: expected one that counts its steps in `last_epoch`, "
                            f"got {type(scheduler).__name__}")  # fmt: skip
        self.scheduler = scheduler
        self._applied_updates = applied_updates
        self._ahead = scheduler.last_epoch - applied_updates()

    def step(self) -> None:
        """Advance the schedule by the updates that were applied since the last call."""
        for _ in range(self._applied_updates() + self._ahead - self.scheduler.last_epoch):
            self.scheduler.step()


def _step_of(kind: type[Optimizer]) -> Callable[..., Any]:
    """Its step without what torch itself wraps around it."""
    hooks = Optimizer.zero_grad.__code__.co_filename
    return inspect.unwrap(kind.step, stop=lambda f: f.__code__.co_filename != hooks)


def _name(optimizer: Optimizer) -> str:
    return f"{type(optimizer).__module__}.{type(optimizer).__qualname__}"


def _is_accelerates(optimizer: Any) -> bool:
    """Is it Accelerate's wrapper? Another one steps in a way of its own."""
    return any(c.__module__ == "accelerate.optimizer" for c in type(optimizer).__mro__)


def _create_momentum(optimizer: Optimizer) -> None:
    # A skipped first step would leave fused SGD with an uninitialised buffer. From zeros, the first
    # taken step gives the same buffer as torch's own, unless dampening is used.
    if not isinstance(optimizer, SGD):
        return
    for group in optimizer.param_groups:
        if group["momentum"] and group["dampening"]:
            raise TypeError("optimizer: SGD with momentum and dampening cannot skip its first step")
        for p in group["params"] if group["momentum"] else ():
            if optimizer.state[p].get("momentum_buffer") is None:
                optimizer.state[p]["momentum_buffer"] = torch.zeros_like(p)
