"""The one tolerance rule for kernels.

A kernel's error against the fp64 reference may be at most twice the error that plain PyTorch makes
in the same dtype on the same inputs, plus a floor for the cases where plain PyTorch happens to be
exact. Errors are relative to the reference's own scale: ||a - b|| / ||b||.
"""

from __future__ import annotations

import torch

# A few roundings of the output dtype: an exact-by-luck reference must not demand luck of a kernel.
FLOOR = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3, torch.float64: 1e-12}


def error(got: torch.Tensor, exact: torch.Tensor) -> float:
    """||got - exact|| / ||exact||; NaN where got holds NaN, so that no comparison passes."""
    got, exact = got.detach().double(), exact.detach().double()
    scale = exact.norm()
    return float((got - exact).norm() / (scale if scale > 0 else 1.0))


def assert_as_good_as_torch(
    got: torch.Tensor,
    torch_same_dtype: torch.Tensor,
    exact: torch.Tensor,
    what: str,
    magnitude: float = 0.0,
) -> None:
    """The rule; `what` names the quantity in the failure.

    A log-sum-exp of `magnitude` (nats) is known to magnitude x 2^-24 in fp32, and its exponential
    has that relative error: added to the floor where a test makes logits large on purpose.
    """
    mine, theirs = error(got, exact), error(torch_same_dtype, exact)
    allowed = 2 * theirs + FLOOR[torch_same_dtype.dtype] + magnitude * 2**-24
    assert mine <= allowed, f"{what}: error {mine:.2e}, allowed {allowed:.2e} (torch {theirs:.2e})"
