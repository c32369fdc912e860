"""Which optimizers can skip a step on the device, and how the gate's flag reaches them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim import SGD, Adagrad, Adam, AdamW, Optimizer

_CAN_SKIP = (Adam, AdamW, SGD, Adagrad)
_REMEDY = (
    "use torch.optim.Adam, AdamW, SGD or Adagrad with fused=True, whose kernels read the flag on "
    "the device"
)


@dataclass
class AttachedOptimizer:
    """An optimizer that reads the gate's flag, and how to let it go."""

    optimizer: Optimizer
    hook: torch.utils.hooks.RemovableHandle

    def release(self) -> None:
        """Take the flag, the clip scale and the hook away again."""
        self.hook.remove()
        for name in ("found_inf", "grad_scale"):
            if hasattr(self.optimizer, name):
                delattr(self.optimizer, name)


def attach_optimizer(
    optimizer: Optimizer, found_inf: Tensor, grad_scale: Tensor | None, stepped: Callable[[], None]
) -> AttachedOptimizer:
    """Make `optimizer.step()` read `found_inf` (skip) and `grad_scale` (divide the gradient by it).

    Both are 0-dim fp32 tensors on the parameters' device, read by torch's fused kernels: at
    found_inf == 1.0 parameters, moments and step counters keep their bits. Zeroing gradients would
    not do: AdamW then still moves the weights by momentum and decay.
    """
    optimizer = _inner(optimizer)
    name = f"{type(optimizer).__module__}.{type(optimizer).__qualname__}"
    if not isinstance(optimizer, _CAN_SKIP):
        raise TypeError(f"optimizer: {name} cannot skip a step on the device; {_REMEDY}")
    if not all(group.get("fused") for group in optimizer.param_groups):
        raise TypeError(f"optimizer: {name} was built without fused=True; {_REMEDY}")
    if getattr(optimizer, "found_inf", None) is not None:
        raise ValueError(f"optimizer: {name} already has a found_inf: detach its other gate first")
    for group in optimizer.param_groups:
        if isinstance(optimizer, SGD) and group["momentum"]:
            _create_momentum(optimizer, group)
    optimizer.found_inf = found_inf  # pyright: ignore[reportAttributeAccessIssue]
    if grad_scale is not None:
        optimizer.grad_scale = grad_scale  # pyright: ignore[reportAttributeAccessIssue]
    hook = optimizer.register_step_post_hook(lambda *_: stepped())
    return AttachedOptimizer(optimizer, hook)


def _inner(optimizer: Optimizer) -> Optimizer:
    """The optimizer inside Accelerate's wrapper, on which the attributes would do nothing."""
    inner = getattr(optimizer, "optimizer", None)
    return _inner(inner) if isinstance(inner, Optimizer) else optimizer


def _create_momentum(optimizer: SGD, group: dict) -> None:
    # A skipped first step would leave fused SGD with an uninitialised buffer. From zeros, the first
    # taken step gives the same buffer as torch's own, unless dampening is used.
    if group["dampening"]:
        raise TypeError("optimizer: SGD with momentum and dampening cannot skip its first step")
    for p in group["params"]:
        if "momentum_buffer" not in optimizer.state[p]:
            optimizer.state[p]["momentum_buffer"] = torch.zeros_like(p)
