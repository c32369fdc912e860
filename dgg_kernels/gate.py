"""The gate: scores the lm_head gradient of each update and skips the harmful ones on the device.

The transition itself is csrc/gate.h, shared by the CPU op, that `replay` runs, and the CUDA kernel;
this file holds its configuration, its place in a training loop and its checkpoint.
"""

from __future__ import annotations

import itertools
import math
import weakref
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from enum import IntEnum
from numbers import Real
from typing import Any, Literal, NamedTuple, get_args, get_type_hints

import numpy as np
import torch
from torch import Tensor
from torch.amp.grad_scaler import OptState

from . import _library
from .monitor import norm
from .optim import AttachedOptimizer, attach_optimizer, by_kind

Slot = IntEnum(
    "Slot",
    "THRESHOLD WINDOW_SIZE MAX_REUSE STATISTIC AVERAGE EMA_DECAY INCLUDE_SHUT MINI_BATCHES SQUARED "
    "BATCHES ATTEMPTED APPLIED POSITION LATCH REUSE ENERGY INCREMENT_VALUE Z SHUT GRAD_NORM "
    "HEADER_SIZE",
    start=0,
)
"""Where a value lies in the state; DGG_SLOTS of csrc/gate.h tells what each is."""

# A library older than this file may have no such op.
if getattr(torch.ops.dgg, "gate_layout", str)().split() != [*Slot.__members__]:
    raise ImportError(
        f"dgg_kernels: {_library.OPS_FILE} was built from other sources: its gate's state has "
        "another layout; install the package again with `pip install .` (or `-e .`)"
    )
_CODES = {"increment": 0, "level": 1, "either": 2, "window": 0, "ema": 1}


@dataclass(frozen=True)
class GateConfig:
    """What the gate observes and when it shuts.

    Attributes:
        threshold: tau; the gate shuts when z > threshold (one-sided; 0.1 to 0.5 recommended by the
            paper; `math.inf` never shuts, except for a NaN or Inf energy, which always does).
        window: number of past values that mean and standard deviation are taken over. The gate
            acts only once so many were seen.
        max_reuse: K, the largest number of uses (updates) of one rollout batch.
        statistic: "increment" scores g_k - g_(k-1) of the same mini-batch (k >= 2); "level" scores
            g_k; "either" shuts when one of the two does.
        average: "window" is a first-in first-out window; "ema" an exponential running mean and
            variance.
        ema_decay: weight of the past under `average="ema"`.
        squared: score g squared in place of g (`gate/energy` stays g).
        include_shut: whether values that shut the gate enter the window too.
        mini_batches: mini-batches per pass over the rollout batch, one optimizer step each. An
            increment compares a mini-batch with its own previous use.
        energy: what is scored. "head" is the norm of the lm_head's own gradient dL/dW; "parameter"
            the norm of `weight.grad`, which for tied embeddings also holds the embedding's
            gradient; "loss" what `foresee()` is given, the loss or another signal of the forward:
            the loss's increment is what the last update failed to gain. `gate/energy` is then the
            head's norm all the same, NaN where the backward was left out.
        accumulate: keep the head's own gradient between the backward passes of one update, [V, D]
            of memory. Needed for the norm of it, scored or only logged, when several passes or
            several ranks make one update and `weight.grad` is not their sum: a frozen weight, which
            is refused without, or tied embeddings, whose gradient is then in the norm.
    """

    threshold: float = 0.5
    window: int = 32
    max_reuse: int = 4
    statistic: Literal["increment", "level", "either"] = "increment"
    average: Literal["window", "ema"] = "window"
    ema_decay: float = 0.97
    squared: bool = False
    include_shut: bool = False
    mini_batches: int = 1
    energy: Literal["head", "parameter", "loss"] = "head"
    accumulate: bool = False

    def __post_init__(self) -> None:
        _require(isinstance(self.threshold, int | float) and not math.isnan(self.threshold),
                 "threshold", "a number, or inf", self.threshold)  # fmt: skip
        for name, least in (("window", 2), ("max_reuse", 1), ("mini_batches", 1)):
            value = getattr(self, name)
            ok = isinstance(value, int) and not isinstance(value, bool) and least <= value <= 2**20
            _require(ok, name, f"an integer from {least} to {2**20}", value)
        _require(isinstance(self.ema_decay, float) and 0 < self.ema_decay < 1,
                 "ema_decay", "a number between 0 and 1", self.ema_decay)  # fmt: skip
        for name in ("squared", "include_shut", "accumulate"):
            _require(isinstance(getattr(self, name), bool), name, "a bool", getattr(self, name))
        hints = get_type_hints(GateConfig)
        for name in ("statistic", "average", "energy"):
            known = get_args(hints[name])
            _require(getattr(self, name) in known, name, f"one of {known}", getattr(self, name))


def _require(ok: bool, field: str, expected: str, got: object) -> None:
    if not ok:
        raise ValueError(f"GateConfig.{field}: expected {expected}, got {got!r}")


# The op's backward knows its gate by number: an op takes no Python object, and a compiled graph
# runs it without this module's frame.
_ids = itertools.count()
_gates: weakref.WeakValueDictionary[int, GradientGate] = weakref.WeakValueDictionary()


# Not for CUDA graphs that torch.compile makes: their replay would not call it.
@torch.library.custom_op(
    "dgg::gate_record", mutates_args=("buffer",), tags=(torch.Tag.cudagraph_unsafe,)
)
def _gate_record(buffer: Tensor, row_sq: Tensor, d_weight: Tensor, gate_id: int) -> None:
    gate = _gates.get(gate_id)
    if gate is None:
        raise RuntimeError("gate: it was gone when the backward of linear_logprob(gate=gate) ran")
    gate.record(d_weight)
    buffer.copy_(row_sq)


class Decision(NamedTuple):
    """One decision of `replay`: whether the update is discarded, its score z, and its energy."""

    shut: bool
    z: float  # NaN where no score was formed: first use, window not populated, already shut
    energy: float


def _write_config(state: np.ndarray, config: GateConfig) -> None:
    state[Slot.THRESHOLD] = config.threshold
    state[Slot.WINDOW_SIZE] = config.window
    state[Slot.MAX_REUSE] = config.max_reuse
    state[Slot.STATISTIC] = _CODES[config.statistic]
    state[Slot.AVERAGE] = _CODES[config.average]
    state[Slot.EMA_DECAY] = config.ema_decay
    state[Slot.INCLUDE_SHUT] = config.include_shut
    state[Slot.MINI_BATCHES] = config.mini_batches
    state[Slot.SQUARED] = config.squared


def _initial_state(config: GateConfig) -> np.ndarray:
    state = np.zeros(torch.ops.dgg.gate_state_size(config.window, config.mini_batches))
    _write_config(state, config)
    state[[Slot.ENERGY, Slot.INCREMENT_VALUE, Slot.Z, Slot.GRAD_NORM]] = np.nan
    return state


def _check_counters(state: np.ndarray, config: GateConfig) -> None:
    """Raise ValueError unless the state's counters are some that a gate can come to.

    The transition finds its place in memory by them: a damaged one would have it write elsewhere.
    """
    most = 2**53  # beyond, fp64 skips integers
    ranges = {slot.name: (state[slot], most) for slot in (Slot.BATCHES, Slot.ATTEMPTED,
              Slot.APPLIED, Slot.POSITION, Slot.REUSE)}  # fmt: skip
    ranges |= {slot.name: (state[slot], 1) for slot in (Slot.LATCH, Slot.SHUT)}
    trackers = state[Slot.HEADER_SIZE + config.mini_batches :].reshape(2, -1)
    filled = most if config.average == "ema" else config.window
    for name, (count, following) in zip(("increments", "levels"), trackers[:, :2], strict=True):
        ranges[f"{name}: count"] = (count, filled)
        ranges[f"{name}: next"] = (following, config.window - 1)
    for name, (value, top) in ranges.items():
        if not (0 <= value <= top and value == int(value)):
            raise ValueError(f"state: {name}: expected an integer from 0 to {top}, got {value}")


def replay(energies: Sequence[Sequence[float]], config: GateConfig) -> list[list[Decision]]:
    """What the gate would have decided on a recorded log.

    Args:
        energies: one inner sequence per rollout batch, the energies of its updates in order. A
            decision after the gate has shut is reported as shut: a run would not have reached it.
        config: the gate to try.

    Returns:
        One list of decisions per batch, of the same lengths.
    """
    state = torch.from_numpy(_initial_state(config))
    seen = state.numpy()
    found_inf, grad_scale = torch.from_numpy(np.zeros((2, 1), np.float32))
    decisions = []
    for batch in energies:
        torch.ops.dgg.gate_new_batch(state, found_inf)
        decisions.append([])
        for signal in torch.from_numpy(np.array(batch, np.float64)).unbind():
            torch.ops.dgg.gate_decide(state, signal, False, None, 1.0, found_inf, grad_scale, None)
            shut, z = bool(seen[Slot.SHUT]), float(seen[Slot.Z])
            decisions[-1].append(Decision(shut, z, float(seen[Slot.ENERGY])))
    return decisions


def _described(value: object) -> str:
    """A tensor by shape, dtype and device, for an error: its values may be on a device."""
    if not isinstance(value, Tensor):
        return repr(value)
    return f"{tuple(value.shape)} {value.dtype} on {value.device}"


# Kept for good: a kernel under way, or a graph, writes there even when its gate is gone.
_headers: list[Tensor] = []


def gate_devices() -> tuple[str, ...]:
    """Types of device that the gate's ops were built for."""
    return ("cpu",) if torch.ops.dgg.build()[1] == "none" else ("cpu", "cuda")


def _world() -> int:
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    return torch.distributed.get_world_size() if distributed else 1


def _makes_state(optimizer: torch.optim.Optimizer) -> bool:
    """Whether it steps as torch.distributed.checkpoint lets it: of zeros, at a rate of zero."""
    groups = optimizer.param_groups
    if optimizer.state or not all(group.get("lr", 1.0) == 0 for group in groups):
        return False
    grads = [p.grad for group in groups for p in group["params"]]
    return any(g is not None for g in grads) and not any(g is not None and g.any() for g in grads)


def _full(norm: Tensor) -> Tensor:
    """A norm over DTensor shards as the plain tensor that every rank holds."""
    # Not by its class: torch.distributed.tensor would double the time that importing this takes.
    return getattr(norm, "full_tensor", lambda: norm)()


def _same_on_all_ranks(value: Tensor) -> Tensor:
    """The mean over the ranks: the same bits everywhere; NaN everywhere if it is NaN anywhere."""
    if _world() == 1:
        return value
    value = value.clone()
    torch.distributed.all_reduce(value)
    return value / _world()


class GradientGate:
    """Scores the lm_head gradient before the optimizer sees it; shut, the update does not happen.

    Per rollout batch: `new_batch()`, then for each use backward, `decide()`, `optimizer.step()`,
    and stop when `is_shut()`. Once shut the gate stays shut until `new_batch()`, so a host that
    looks late wastes a step but never applies a harmful one. Nothing here makes the host wait for
    the device, except `is_shut(wait=True)`, `state_dict()` and whoever reads `metrics()`. Over
    several ranks `is_shut()` and `applied_updates()` always wait, so that all hear the same.

    Args:
        config: what to score and when to shut.
        weight: the lm_head parameter [V, D] that is passed to `linear_logprob(..., gate=self)`. Its
            device is the gate's; to a GPU, the gate follows it at the first `attach()`.

    Raises:
        TypeError, ValueError: an argument is not what it should be; names it.
        RuntimeError: the weight is on a device for which the gate's ops were not built.
    """

    def __init__(self, config: GateConfig, weight: Tensor) -> None:
        if not isinstance(config, GateConfig):
            raise TypeError(f"config: expected a GateConfig, got {type(config).__name__}")
        if not isinstance(weight, Tensor) or weight.dim() != 2 or not weight.is_floating_point():
            raise ValueError(
                f"weight: expected the lm_head's [V, D] floating tensor, got {_described(weight)}"
            )
        self.config = config
        self.weight = weight
        self._place(torch.from_numpy(_initial_state(config)))
        self.max_grad_norm: float | None = None
        self._optimizers: list[AttachedOptimizer] = []
        self.id = next(_ids)
        _gates[self.id] = self
        self._backwards = 0
        self._grad_was_empty = False
        self._scaler: torch.amp.GradScaler | None = None
        self._batches = 0  # calls of new_batch()
        self._foreseen = False
        self._captured = False  # a decide(), in a CUDA graph
        self._seen_shut = False

    def _place(self, state: Tensor) -> None:
        """Put the state, and what else the ops read and write, on the weight's device."""
        device = self.weight.device
        if device.type not in (*gate_devices(), "meta"):
            raise RuntimeError(
                f"weight: expected one on a device that the gate has ops for, got {device}: see "
                "`python -m dgg_kernels.info`"
            )
        self._state = state.to(device)
        # Read by torch's fused optimizers: exactly 0.0 or 1.0, and the divisor that clips.
        self.found_inf = state[Slot.LATCH].to(device, torch.float32)
        self.grad_scale = torch.ones((), dtype=torch.float32, device=device)
        # Written by the backward of linear_logprob: squared norms of the gradient's rows as stored.
        self.row_sq = torch.zeros(len(self.weight), dtype=torch.float32, device=device)
        self._head_grad: Tensor | None = None  # sum of this update's head gradients, if kept
        self._pinned: Tensor | None = None  # the state's header, as the last decision left it
        if device.type == "cuda":
            self._pinned = torch.zeros(
                Slot.HEADER_SIZE, dtype=torch.float64, device="cpu", pin_memory=True
            )
            self._pinned.copy_(state[: Slot.HEADER_SIZE])
            _headers.append(self._pinned)
            # External: inside a captured graph it is recorded anew by every replay.
            self._copied = torch.cuda.Event(external=torch.version.hip is None)

    # -- in the loop ------------------------------------------------------------------------------

    def attach(
        self,
        optimizer: torch.optim.Optimizer,
        max_grad_norm: float | None = None,
        *,
        scaler: torch.amp.GradScaler | None = None,
        host_gate: bool = False,
    ) -> None:
        """Let `optimizer.step()` be skipped, and its gradient clipped, on the device.

        Works through `found_inf` and `grad_scale` of torch's own fused Adam, AdamW, SGD and
        Adagrad. Call it once per optimizer; the clipped norm is the one over all of them.

        Args:
            optimizer: built with `fused=True` (or Accelerate's wrapper of one that was).
            max_grad_norm: clip the global gradient norm to this, as `clip_grad_norm_` would.
            scaler: the GradScaler that steps this optimizer. Call `scaler.unscale_(optimizer)`
                before `decide()`; the step is skipped when the gate is shut or the scaler found an
                Inf, and only the latter lowers the loss scale.
            host_gate: accept any optimizer, by not calling its step when the gate is shut. **The
                host then waits for the device once per update.**

        Raises:
            TypeError: the optimizer cannot skip on the device; names it, and the remedy.
            ValueError: `max_grad_norm` is not positive, or differs from an earlier `attach`.
        """
        if max_grad_norm is not None and not (
            isinstance(max_grad_norm, Real) and max_grad_norm > 0
        ):
            raise ValueError(f"max_grad_norm: expected a positive number, got {max_grad_norm!r}")
        if self._optimizers and max_grad_norm != self.max_grad_norm:
            raise ValueError(
                f"max_grad_norm: expected {self.max_grad_norm!r}, as at the first attach(), "
                f"got {max_grad_norm!r}"
            )
        moved = self.weight.is_cuda and self.weight.device != self._state.device
        if moved and not self._optimizers:
            state = self._state
            if state.is_meta:  # of a weight that had no values yet
                state = torch.from_numpy(_initial_state(self.config))
            self._place(state)
        attached = attach_optimizer(
            optimizer,
            self.found_inf,
            self.grad_scale if max_grad_norm is not None else None,
            self._steps,
            shut_on_host=(lambda: self.is_shut(wait=True)) if host_gate else None,
        )
        self.max_grad_norm = max_grad_norm
        if scaler is not None and scaler.is_enabled():
            self._scaler = scaler
        self._optimizers.append(attached)

    def detach(self) -> None:
        """Undo every `attach`: the optimizers step as if they had never met the gate."""
        for attached in self._optimizers:
            attached.close()
        self._optimizers.clear()
        self.max_grad_norm = self._scaler = None
        self._captured = False
        self._let_step(False)

    def new_batch(self) -> None:
        """Open the gate for fresh rollouts: clears use counter, references and latch."""
        torch.ops.dgg.gate_new_batch(self._state, self.found_inf)
        self._batches += 1
        self._forget_backward()
        self._let_step(False)
        self._foreseen = self._seen_shut = False

    def foresee(self, signal: Tensor) -> None:
        """Score this update before its backward is paid for: `GateConfig(energy="loss")`.

        Enqueued on the device, like `decide()`, which is still to be called after the backward: it
        takes the clip scale, and shuts on a NaN or Inf gradient. Where `is_shut()` says so,
        `backward()` may be left out, and `decide()` and `step()`, too; with a GradScaler all of
        them, `scaler.step()` and `scaler.update()` as well, or none.

        Args:
            signal: a 0-dim tensor of this update's forward, of which high is bad, as of the loss;
                over several ranks their mean counts.

        Raises:
            RuntimeError: the gate scores a gradient; no `new_batch()` yet, a second time for one
                update that the gate let pass, or the optimizer has not stepped since the last
                `decide()`.
            ValueError: `signal` is not one floating value on the gate's device.
        """
        if self.config.energy != "loss":
            raise RuntimeError(
                "foresee: expected a gate with GateConfig(energy='loss'), which scores what it is "
                f"given here, got energy={self.config.energy!r}"
            )
        self._check_turn("foresee")
        if self._foreseen and not self.is_shut(wait=True):
            raise RuntimeError("foresee: called twice without decide() in between")
        self._check_scalar("signal", signal)
        value = _same_on_all_ranks(signal.detach().to(torch.float64).reshape(1))
        self._decide(value, False, None, phase=1)
        self._foreseen = True

    def decide(self, energy: Tensor | None = None, *, grad_norm: Tensor | None = None) -> None:
        """Score this update. Enqueued on the device: energy, z, flag and clip scale.

        Call it when the gradient is finished (accumulated, reduced over ranks, unscaled), before
        clipping and before `optimizer.step()`. What one backward alone has made is scored as the
        kernel wrote it: divide the loss by the number of tokens, not `weight.grad`.

        Args:
            energy: a 0-dim tensor to score in place of the lm_head gradient's norm, for instance
                the global gradient norm. Of a foreseen update it is the energy that is logged.
            grad_norm: a 0-dim tensor to clip by in place of the norm over the attached optimizers:
                the global norm where ranks hold different parts as plain tensors, which the gate
                cannot tell from copies (`distributed.sharded_norm`). The clipping to
                `max_grad_norm` is still done by the optimizer's step.

        Raises:
            RuntimeError: no `new_batch()` yet, no backward through `linear_logprob(gate=...)` since
                the last decision, or the optimizer has not stepped since then; the gate scores the
                loss and has not been told it.
            ValueError: `energy` or `grad_norm` is not one floating value on the gate's device, or
                `grad_norm` came without a `max_grad_norm` at `attach`.
        """
        self._check_turn("decide")
        if self.config.energy == "loss" and not self._foreseen:
            raise RuntimeError("decide: call foresee(loss) first: GateConfig.energy is 'loss'")
        self._check_scalar("energy", energy)
        self._check_scalar("grad_norm", grad_norm)
        if self._scaler is not None:
            states = self._scaler._per_optimizer_states  # pyright: ignore[reportPrivateUsage]
            by_host = [id(a.optimizer) for a in self._optimizers if a.on_host]
            # A fused one sees it at its step.
            if any(states[of]["stage"] is OptState.READY for of in by_host):
                raise RuntimeError("decide: call scaler.unscale_(optimizer) first: its gradient is "
                                   "still multiplied by the loss scale")  # fmt: skip
        limit = self.max_grad_norm
        if limit is None and grad_norm is not None:
            raise ValueError(
                "grad_norm: expected None, as attach() was given no max_grad_norm to clip to, "
                f"got {_described(grad_norm)}"
            )
        # Foreseen and shut, an update may come without its backward: there is nothing to add then.
        # (A GradScaler has to see a gradient at every step: there it is missed as ever.)
        left_out = self._foreseen and not self._backwards and energy is None
        if not (left_out and self._scaler is None and self.is_shut(wait=True)):
            if energy is None:
                signal, squares = self._own_signal()
            else:
                signal = _same_on_all_ranks(energy.detach().to(torch.float64).reshape(1))
                squares = False
            total_norm = None
            # With a scaler, too: it leaves out the step of a gradient that is not finite.
            if limit is not None or self._scaler is not None:
                total_norm = self.total_grad_norm() if grad_norm is None else grad_norm.detach()
                total_norm = _same_on_all_ranks(total_norm.to(torch.float32).reshape(()))
            self._decide(signal, squares, total_norm, phase=2 if self._foreseen else 0)
        self._foreseen = False
        self._forget_backward()
        self._let_step(True)
        self._captured |= self._state.is_cuda and torch.cuda.is_current_stream_capturing()

    def _check_turn(self, name: str) -> None:
        if self._batches == 0:
            raise RuntimeError(f"{name}: call new_batch() when a batch of rollouts begins")
        if self._awaits_step():
            raise RuntimeError(f"{name}: optimizer.step() was not called since the last decide()")

    def _decide(self, signal: Tensor, squares: bool, total_norm: Tensor | None, phase: int) -> None:
        torch.ops.dgg.gate_decide(
            self._state, signal, squares, total_norm, self.max_grad_norm or 1.0, self.found_inf,
            self.grad_scale, self._pinned, phase,
        )  # fmt: skip
        if self._pinned is not None:
            # The current device may be another one than the gate's.
            self._copied.record(torch.cuda.current_stream(self._state.device))

    def is_shut(self, wait: bool = False) -> bool:
        """Whether re-use of this batch has ended, as far as the host knows.

        Args:
            wait: wait for the last decision. Without it the answer on a GPU is that of the last
                decision that the device has come to. Over several ranks it always waits: they
                must not hear of it at different uses.
        """
        seen = self._header(wait)
        # The device may not have come to this batch yet. It writes the batch's number last.
        if seen[Slot.BATCHES] == self._batches:
            self._seen_shut = bool(seen[Slot.LATCH])
        return self._seen_shut

    def applied_updates(self, wait: bool = False) -> int:
        """Updates applied over the gate's life, as far as the host knows (as in `is_shut`)."""
        return int(self._header(wait)[Slot.APPLIED])

    def _header(self, wait: bool) -> np.ndarray:
        """The state's header as the host knows it: the device writes it at every decision."""
        if self._pinned is None:
            return self._state.numpy()
        if wait or _world() > 1:
            self._copied.synchronize()
        return self._pinned.numpy()

    def metrics(self) -> dict[str, Tensor]:
        """The last decision as 0-dim float64 tensors on the device; reading them may wait.

        `gate/energy`, `gate/increment`, `gate/z` (NaN where no score was formed), `gate/shut`,
        `gate/reuse` (1 for the first use), `grad_norm` (global, before clipping; NaN without
        `max_grad_norm` and scaler), `updates_attempted`, `updates_applied`, `rollout_batches`.
        """
        state = self._state.clone()
        names = {
            "gate/energy": Slot.ENERGY,
            "gate/increment": Slot.INCREMENT_VALUE,
            "gate/z": Slot.Z,
            "gate/shut": Slot.SHUT,
            "gate/reuse": Slot.REUSE,
            "grad_norm": Slot.GRAD_NORM,
            "updates_attempted": Slot.ATTEMPTED,
            "updates_applied": Slot.APPLIED,
            "rollout_batches": Slot.BATCHES,
        }
        return {name: state[int(slot)] for name, slot in names.items()}

    # -- checkpoint -------------------------------------------------------------------------------

    def __reduce__(self) -> Any:
        raise TypeError(
            "GradientGate: expected not to be copied or pickled, as a backward finds it by number: "
            "build another for the other weight, and hand over state_dict()"
        )

    def state_dict(self) -> dict[str, Any]:
        """Configuration and state, on the CPU: window, references, counters, latch."""
        return {"config": asdict(self.config), "state": self._state.cpu().clone()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where `state_dict()` was taken, on any device.

        `threshold` and `max_reuse` are those of this gate; every other field must agree.

        Raises:
            ValueError: a field differs, or the state is not one of this gate's. Nothing changed.
        """
        if not isinstance(state_dict, dict):
            raise ValueError(f"state_dict: expected a dict, got {type(state_dict).__name__}")
        saved, state = state_dict.get("config"), state_dict.get("state")
        if not isinstance(saved, dict) or not isinstance(state, Tensor):
            got = {name: type(value).__name__ for name, value in state_dict.items()}
            raise ValueError(
                f"state_dict: expected {{'config': 'dict', 'state': 'Tensor'}} as saved, got {got}"
            )
        for field in fields(GateConfig):
            mine, theirs = getattr(self.config, field.name), saved.get(field.name)
            if field.name not in ("threshold", "max_reuse") and mine != theirs:
                raise ValueError(
                    f"GateConfig.{field.name}: expected {mine!r}, the state_dict has {theirs!r}"
                )
        like = state.shape == self._state.shape and state.dtype == self._state.dtype
        if not like or state.is_meta:
            raise ValueError(
                f"state: expected {tuple(self._state.shape)} {self._state.dtype}, "
                f"got {_described(state)}"
            )
        restored = state.cpu().numpy().copy()
        _write_config(restored, self.config)
        _check_counters(restored, self.config)
        self._state.copy_(torch.from_numpy(restored))
        self.found_inf.fill_(float(restored[Slot.LATCH]))
        self._batches = int(restored[Slot.BATCHES])
        self._seen_shut = bool(restored[Slot.LATCH])
        if self._pinned is not None:
            self._pinned.copy_(torch.from_numpy(restored[: Slot.HEADER_SIZE]))
        self._forget_backward()
        self._let_step(False)
        self._foreseen = False

    # -- what the op and the optimizer tell the gate ----------------------------------------------

    def check_weight(self, weight: Tensor) -> None:
        """Raise ValueError unless `weight` can be the gate's: same shape and device."""
        if weight.shape != self.weight.shape or weight.device != self._state.device:
            raise ValueError(
                f"gate: expected the weight it was built for, {tuple(self.weight.shape)} on "
                f"{self._state.device}, got {tuple(weight.shape)} on {weight.device}"
            )

    def record(self, d_weight: Tensor) -> None:
        """Take note that a backward of `linear_logprob` is writing `row_sq`.

        Args:
            d_weight: the gradient that `row_sq` belongs to; empty for a frozen weight, unless the
                gate accumulates.
        """
        if self._awaits_step():
            raise RuntimeError("gate: a backward ran between decide() and optimizer.step()")
        self._backwards += 1
        # Held from an earlier micro-batch, .grad is added to: row_sq is then not its norm.
        self._grad_was_empty = self.weight.grad is None
        if self.config.accumulate:
            if self._head_grad is None:
                self._head_grad = torch.zeros(
                    d_weight.shape, dtype=torch.float32, device=d_weight.device
                )
            self._head_grad += d_weight

    def total_grad_norm(self) -> Tensor:
        """Norm of all gradients of the attached optimizers, 0-dim fp32, on the device.

        DTensors are summed over their shards; of a plain tensor this rank's part alone counts.
        """
        parameters = {
            id(p): p  # once, though two optimizers may have it
            for attached in self._optimizers
            for group in attached.optimizer.param_groups
            for p in group["params"]
        }
        parts = by_kind(p.grad for p in parameters.values())
        norms = [_full(torch.nn.utils.get_total_norm(part)) for part in parts]
        norms = [part.to(self._state.device, torch.float32) for part in norms]
        if len(norms) == 1:
            return norms[0]
        return torch.stack([*norms, torch.zeros_like(self.grad_scale)]).norm()

    def _own_signal(self) -> tuple[Tensor, bool]:
        """The energy's partial squares and True, or the energy itself and False."""
        if self._backwards == 0:
            raise RuntimeError(
                "decide: no backward through linear_logprob(..., gate=gate) since the last decision"
            )
        head, frozen = self.config.energy != "parameter", not self.weight.requires_grad
        if head and self._head_grad is not None:
            gradient, scaled = self._head_grad, True
        elif head and self._backwards * _world() == 1 and (self._grad_was_empty or frozen):
            scale = self._loss_scale()
            return self.row_sq if scale is None else self.row_sq / scale.square(), True
        elif frozen:
            raise RuntimeError(
                f"decide: the weight is frozen and {self._backwards} backward passes (on "
                f"{_world()} ranks) make this update: GateConfig(accumulate=True) adds them up"
            )
        elif self.weight.grad is None:
            raise RuntimeError("decide: the gate's weight has no gradient")
        else:
            gradient, scaled = self.weight.grad, False
        if scaled and _world() > 1:
            torch.distributed.all_reduce(gradient)
            gradient /= _world()  # DDP and FSDP average, too
        energy = _full(norm(gradient))
        if scaled and (scale := self._loss_scale()) is not None:
            energy = energy / scale
        return _same_on_all_ranks(energy).reshape(1), False

    def _loss_scale(self) -> Tensor | None:
        """What the kernel's gradient is still multiplied by: it was written before unscale_()."""
        # get_scale() would wait for the device.
        scale = self._scaler and self._scaler._get_scale_async()  # pyright: ignore[reportPrivateUsage]
        return None if scale is None else scale.to(self._state.device)

    def _check_scalar(self, name: str, value: Tensor | None) -> None:
        if value is None:
            return
        ok = isinstance(value, Tensor) and value.numel() == 1 and value.is_floating_point()
        if not ok or value.device != self._state.device:
            raise ValueError(
                f"{name}: expected one floating value on {self._state.device}, "
                f"got {_described(value)}"
            )

    def _let_step(self, decided: bool) -> None:
        """After a decision every optimizer may step once."""
        for attached in self._optimizers:
            attached.has_decision = decided

    def _awaits_step(self) -> bool:
        """Whether no optimizer has stepped since the decision. One has to: a scaler may not."""
        steps = [attached.has_decision for attached in self._optimizers]
        return bool(steps) and all(steps) and self._scaler is None

    def _steps(self, attached: AttachedOptimizer) -> bool:
        """What an attached optimizer calls before its step: is there a decision for it?"""
        # A replay of a captured decide() is not heard of here.
        if (attached.has_decision or self._captured) and not self._backwards:
            return True
        if _makes_state(attached.optimizer):
            return False
        if self._backwards:
            raise RuntimeError(
                "optimizer: step() came after a backward through linear_logprob(..., gate=gate) "
                "without gate.decide() in between"
            )
        raise RuntimeError(
            "optimizer: step() came without a gate.decide() of its own since new_batch(): flag and "
            "clip scale would be another update's; detach() lets it step without the gate"
        )

    def _forget_backward(self) -> None:
        self._backwards, self._grad_was_empty = 0, False
        if self._head_grad is not None:
            self._head_grad.zero_()
