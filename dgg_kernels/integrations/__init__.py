"""One file per library, imported by name: `import dgg_kernels` imports none of them."""

from __future__ import annotations

import math
import warnings

from dgg_kernels import GateConfig


def warn_of_single_use(uses: int, config: GateConfig, setting: str, library: str) -> None:
    """Warn of a gate that has nothing to decide: of a batch's first use it only refuses NaN."""
    if uses == 1 and config.threshold < math.inf:
        warnings.warn(
            f"{setting}: 1, {library}'s default, uses each rollout once, which leaves the gate "
            "nothing to decide (but a gradient that is not finite): expected 2 or more",
            stacklevel=3,
        )
