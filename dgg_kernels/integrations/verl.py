"""verl: the gate in its FSDP2 engine, and this package's head in the place of its fused one.

Importing this module registers the engine and the worker, as verl's own modules do with theirs.
"""

# verl pins another transformers than this project: its environment is one of its own.
# pyright: reportMissingImports=false

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from verl.single_controller.base.decorator import make_nd_compute_dataproto_dispatch_fn, register
from verl.utils import tensordict_utils as tu
from verl.utils.device import get_device_name, get_vendor
from verl.utils.metric.utils import Metric
from verl.workers.config import FSDPEngineConfig
from verl.workers.engine import EngineRegistry
from verl.workers.engine.fsdp.transformer_impl import FSDPEngineWithLMHead
from verl.workers.engine_workers import ActorRolloutRefWorker, TrainingWorker

from dgg_kernels import GateConfig, GradientGate
from dgg_kernels.monitor import norm

from . import last_decision, warn_of_single_use
from .verl_head import use_linear_cross_entropy

GATE_FILE = "dgg_gate.pt"  # beside verl's own files in a checkpoint
_DERIVED = ("max_reuse", "mini_batches", "accumulate")
_HEAD = ("grad_eps", "screen")


# -- configuration --------------------------------------------------------------------------------


@dataclass
class DGGEngineConfig(FSDPEngineConfig):
    """verl's FSDPEngineConfig, and the gate's: `actor.fsdp_config._target_` names this class.

    Attributes:
        gate: fields of GateConfig; None: no gate. `max_reuse` is verl's ppo_epochs,
            `mini_batches` its mini-batches per epoch, and `accumulate` follows from the model.
        head: options of `linear_logprob` where verl's fused Triton head would run: grad_eps,
            screen; None: its defaults.
        host_gate: as in `GradientGate.attach`: accept an optimizer that cannot skip by itself.

    Raises:
        TypeError, ValueError: no field of GateConfig, not a value of it, or one that follows; no
            option of the head.
    """

    gate: dict[str, Any] | None = field(default_factory=dict)
    head: dict[str, Any] | None = field(default_factory=dict)
    host_gate: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        gate = self.gate or {}
        if derived := sorted(set(gate).intersection(_DERIVED)):
            raise ValueError(f"gate: expected no {', '.join(derived)}: verl's own settings say it")
        if unknown := sorted(set(self.head or {}).difference(_HEAD)):
            raise TypeError(f"head: expected {' and '.join(_HEAD)} alone, got {', '.join(unknown)}")
        GateConfig(**gate)


# -- engine ---------------------------------------------------------------------------------------


@EngineRegistry.register(
    model_type="language_model",
    backend=["fsdp", "fsdp2"],
    device=get_device_name(),
    vendor=get_vendor(),  # found before verl's own engine, which names no vendor
)
class DGGEngine(FSDPEngineWithLMHead):
    """verl's FSDP engine; with a DGGEngineConfig the gate decides on every optimizer step.

    Raises:
        ValueError: FSDP1, CPUOffloadPolicy, fp16 or quantization-aware training; a frozen head
            without the fused kernels. None of them is covered.
        TypeError: the optimizer cannot skip a step.
    """

    gate: GradientGate | None = None  # built at the first batch, whose epochs it needs to know
    _saved: dict[str, Any] | None = None  # a checkpoint's, until there is a gate to take it
    _decision: dict[str, float]
    _lse: dict[tuple[int, int], list[Tensor]] | None  # of each mini-batch's micro-batches
    _updates = _micro_batches = 0  # of this batch of rollouts; of this update
    _loss: Any = 0.0  # of this update, a tensor once there is a part of it

    @property
    def _config(self) -> DGGEngineConfig | None:
        config = self.engine_config
        return config if isinstance(config, DGGEngineConfig) else None

    @property
    def gated(self) -> bool:
        """Is there a gate to ask?"""
        config = self._config
        return config is not None and config.gate is not None and not config.forward_only

    @property
    def _fused(self) -> bool:
        """Does verl's forward call `linear_cross_entropy`?"""
        options = self.model_config.fused_kernel_options or {}
        return self.model_config.use_fused_kernels and options.get("impl_backend") == "triton"

    @property
    def _causal_model(self) -> Any:
        model: Any = self.module
        return model.get_base_model() if hasattr(model, "get_base_model") else model

    def _build_model_optimizer(self) -> None:
        config = self._config
        if config is None:
            return super()._build_model_optimizer()
        if config.strategy != "fsdp2":
            raise _not_covered("strategy", "fsdp2", config.strategy)
        if config.offload_policy and not config.forward_only:
            raise _not_covered("offload_policy", False, True)
        if config.qat.enable:
            raise _not_covered("qat.enable", False, True)
        super()._build_model_optimizer()
        if self.scaler is not None:
            raise _not_covered("mixed_precision.param_dtype", "bf16 or fp32", "fp16")
        head = self._causal_model.get_output_embeddings()
        if self.gated and not head.weight.requires_grad and not self._fused:
            raise ValueError(
                "use_fused_kernels: expected True with impl_backend=triton: the head is frozen, "
                "and its gradient is made by that kernel alone; got another head"
            )
        if self._fused and isinstance(head, FSDPModule):
            _unshard_with(self.module, head)

    def new_batch(
        self,
        epochs: int,
        mini_batches: int,
        disable_auto_offload: bool = False,
        same_order: bool = True,
    ) -> None:
        """Open the gate for fresh rollouts, on every rank.

        Args:
            epochs: the largest number of uses of each rollout.
            mini_batches: optimizer steps per epoch.
            disable_auto_offload: as in `train_mode`, if the gate is still to be built.
            same_order: each epoch brings the same tokens in the same order, so that the fused head
                may be told the log-sum-exps of their last use.

        Raises:
            ValueError: other numbers than at the first batch.
        """
        if self.gate is None:
            with self.train_mode(disable_auto_offload=disable_auto_offload):  # weights on device
                self.gate = self._built_gate(epochs, mini_batches)
        planned = (self.gate.config.max_reuse, self.gate.config.mini_batches)
        if planned != (epochs, mini_batches):
            raise ValueError(
                f"epochs, mini_batches: expected {planned}, as at the first batch, "
                f"got {(epochs, mini_batches)}"
            )
        self.gate.new_batch()
        self._lse = {} if same_order else None
        self._updates = 0
        self._begin_update()

    def _begin_update(self) -> None:
        self._micro_batches, self._loss = 0, 0.0

    def _built_gate(self, epochs: int, mini_batches: int) -> GradientGate:
        config: Any = self._config
        model, settings = self._causal_model, GateConfig(**config.gate)
        warn_of_single_use(epochs, settings, "ppo_epochs", "verl")
        weight = model.get_output_embeddings().weight
        tied = weight is model.get_input_embeddings().weight
        # Its .grad is not this head's gradient, of which a kernel sees a micro-batch's part.
        elsewhere = tied or not weight.requires_grad
        apart = self._fused and settings.energy != "parameter" and elsewhere
        follow = {"max_reuse": epochs, "mini_batches": mini_batches, "accumulate": apart}
        gate = GradientGate(replace(settings, **follow), weight)
        if self._saved is not None:
            gate.load_state_dict(self._saved)
        try:
            limit = self.optimizer_config.clip_grad
            gate.attach(self.optimizer, limit, host_gate=config.host_gate)
        except TypeError as error:
            raise TypeError(
                f"{error}. In verl: optim.override_optimizer_config={{fused: true}}, or "
                "fsdp_config.host_gate=true"
            ) from error
        return gate

    def forward_step(self, micro_batch: Any, loss_function: Any, forward_only: bool) -> Any:
        """verl's, with this package's head where its fused one would run."""
        if self._config is None:
            return super().forward_step(micro_batch, loss_function, forward_only)
        gate, lse = None if forward_only else self.gate, None
        if gate is not None and self._lse is not None:
            mini_batch = self._updates % gate.config.mini_batches
            lse = self._lse.setdefault((mini_batch, self._micro_batches), [])
        with use_linear_cross_entropy(gate=gate, lse=lse, **(self._config.head or {})):
            loss, output = super().forward_step(micro_batch, loss_function, forward_only)
        if gate is not None:
            self._micro_batches += 1
            self._loss = self._loss + loss.detach()
        return loss, output

    def optimizer_step(self) -> float:
        """Decide, clip, step; all of it, if the gate is shut, without effect.

        Returns:
            Global gradient norm before clipping.
        """
        if not self.gated:
            return super().optimizer_step()
        if self.gate is None:
            raise RuntimeError("optimizer_step: call new_batch() when a batch of rollouts begins")
        energy: Any = None  # the fused head has told the gate
        if not self._fused:
            grad: Any = self.gate.weight.grad
            sharded: Any = norm(grad)
            energy = sharded.full_tensor()
        if self.gate.config.energy == "loss":
            self.gate.foresee(self._loss)
        self.gate.decide(energy)
        self.optimizer.step()
        self._updates += 1
        self._begin_update()
        self._decision = last_decision(self.gate)  # verl waits for its gradient norm here, too
        return self._decision.get("grad_norm", math.nan)

    def train_batch(self, data: Any, loss_function: Any) -> dict[str, Any]:
        """verl's, and the decision among the metrics."""
        outputs = super().train_batch(data, loss_function)
        if self.gated:
            found = {k: v for k, v in self._decision.items() if k.startswith("gate/")}
            outputs["metrics"] |= Metric.from_dict(found, aggregation="mean")
        return outputs

    def save_checkpoint(self, local_path: str, *args: Any, **kwargs: Any) -> None:
        """verl's, and the gate's state."""
        super().save_checkpoint(local_path, *args, **kwargs)
        state = self._saved if self.gate is None else self.gate.state_dict()
        if state is not None and local_path is not None:
            if self.rank == 0:
                torch.save(state, Path(local_path) / GATE_FILE)
            dist.barrier()

    def load_checkpoint(self, local_path: str, *args: Any, **kwargs: Any) -> None:
        """verl's, and the gate's state, if the checkpoint is of a run with a gate."""
        super().load_checkpoint(local_path, *args, **kwargs)
        if not self.gated or local_path is None:
            return
        file = Path(local_path) / GATE_FILE
        # Another node may have another disk: all go on with what the first rank has found.
        found: list[Any] = [None]
        if self.rank == 0 and file.is_file():
            try:
                found = [torch.load(file, weights_only=True)]
            except Exception as error:  # the others wait to hear of it, too
                found = [ValueError(f"{file}: expected a gate's state ({error})")]
        dist.broadcast_object_list(found, src=0)
        saved = found[0]
        if isinstance(saved, ValueError):
            raise saved
        if saved is None:
            return
        self._saved = saved
        if self.gate is not None:
            self.gate.load_state_dict(saved)


def _not_covered(name: str, expected: object, got: object) -> ValueError:
    return ValueError(f"{name}: expected {expected!r} with DGGEngineConfig, got {got!r}")


def _unshard_with(model: Any, head: Any) -> None:
    """verl reads the head's weight without calling the head, which FSDP2 then leaves sharded."""

    def before(*_: Any) -> None:
        head.unshard()

    def after(*_: Any) -> None:
        if not torch.is_grad_enabled():  # otherwise the backward needs it, and reshards it
            head.reshard()

    model.register_forward_pre_hook(before)
    model.register_forward_hook(after)


# -- worker ---------------------------------------------------------------------------------------

_dispatched = register(make_nd_compute_dataproto_dispatch_fn(mesh_name="train"), blocking=False)


class DGGTrainingWorker(TrainingWorker):
    """verl's TrainingWorker, which leaves out what is planned for a batch after its gate shut.

    Raises:
        ValueError: a DGGEngineConfig, but an engine that would not read it (strategy=fsdp_turbo).
    """

    def __init__(self, config: Any) -> None:
        settings = config.engine_config
        if isinstance(settings, DGGEngineConfig):
            engine = EngineRegistry.get_engine_cls(config.model_type, settings.strategy)
            if not issubclass(engine, DGGEngine):
                raise ValueError(
                    "strategy: expected 'fsdp2' with DGGEngineConfig, for DGGEngine; got "
                    f"{settings.strategy!r}, for {engine.__name__}, which has no gate"
                )
        super().__init__(config)

    @_dispatched
    def train_mini_batch(self, data: Any) -> Any:
        """verl's, as one batch of the gate.

        Raises:
            ValueError: mini-batches shuffled anew in each epoch, which cannot be compared with
                their previous use.
        """
        engine: Any = self.engine
        if getattr(engine, "gated", False):
            size = tu.get(data, key="mini_batch_size", default=None)
            if size is None:
                mini_batches = tu.get(data, key="num_mini_batch")
            else:
                mini_batches = data.shape[0] * engine.get_data_parallel_size() // size
            options = tu.get(data, key="dataloader_kwargs", default={})
            shuffled = options.get("shuffle", False)
            if mini_batches > 1 and shuffled:
                raise ValueError("shuffle: expected False with several mini-batches, got True")
            engine.new_batch(
                tu.get(data, key="epochs", default=1),
                mini_batches,
                tu.get(data, key="disable_auto_offload", default=False),
                same_order=not shuffled,
            )
        return super().train_mini_batch(data)

    @_dispatched
    def train_batch(self, data: Any) -> Any:
        """verl's; nothing but the learning rate's step, if it is due, once the gate is shut."""
        gate = getattr(self.engine, "gate", None)
        # Waits: ranks that learned of it at different steps would part. verl has waited already.
        if gate is None or not gate.is_shut(wait=True):
            return super().train_batch(data)
        metrics = {}
        if tu.get(data, key="update_lr_scheduler", default=False):
            metrics["lr"] = self.engine.lr_scheduler_step()
        if not self.engine.is_mp_src_rank_with_outputs():
            return None
        return tu.get_tensordict(tensor_dict={}, non_tensor_dict={"metrics": metrics})


ActorRolloutRefWorker.actor_worker_cls = DGGTrainingWorker
