"""One file per library, imported by name: `import dgg_kernels` imports none of them."""

from __future__ import annotations

import math
import warnings

import torch

from dgg_kernels import GateConfig, GradientGate


def warn_of_single_use(uses: int, config: GateConfig, setting: str, library: str) -> None:
    """Warn of a gate that has nothing to decide: of a batch's first use it only refuses NaN."""
    if uses == 1 and config.threshold < math.inf:
        warnings.warn(
            f"{setting}: 1, {library}'s default, uses each rollout once, which leaves the gate "
            "nothing to decide (but a gradient that is not finite): expected 2 or more",
            stacklevel=3,
        )


def last_decision(gate: GradientGate) -> dict[str, float]:
    """The gate's metrics on the host, which waits for them; a NaN energy alone is a finding."""
    metrics = gate.metrics()
    values = torch.stack(list(metrics.values())).tolist()
    found = zip(metrics, values, strict=True)
    return {name: v for name, v in found if name == "gate/energy" or not math.isnan(v)}
