"""Fused lm_head log-probs, the norm of their gradient taken as it is written, and its gate.

Public names: `linear_logprob`, `linear_cross_entropy`, `GradientGate`, `GateConfig`,
`GatedScheduler`, `replay`; `dgg_kernels.monitor` for weight divergence and the chi-square bound;
`python -m dgg_kernels.info` tells what was built.
"""

from importlib.metadata import version

from . import _library as _library  # loads the compiled ops before anything uses them
from .cross_entropy import linear_cross_entropy
from .gate import Decision, GateConfig, GradientGate, replay
from .lm_head import LogprobOutput, linear_logprob
from .optim import GatedScheduler

__version__ = version("dgg-kernels")
__all__ = [
    "Decision",
    "GateConfig",
    "GatedScheduler",
    "GradientGate",
    "LogprobOutput",
    "linear_cross_entropy",
    "linear_logprob",
    "replay",
]
