"""TRL: GRPOTrainer with this package's head, whose re-use of rollouts the gate ends."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from trl import GRPOTrainer  # pyright: ignore[reportPrivateImportUsage]

from dgg_kernels import GateConfig, GradientGate

from . import warn_of_single_use
from .transformers import CausalHead, DGGCallback, patch_lm_head


class DGGTrainer(GRPOTrainer):
    """GRPOTrainer that uses a batch of rollouts up to `num_iterations` times, if the gate lets it.

    When the gate shuts, the update is discarded, and the next one is made of fresh prompts. An
    epoch is one pass over the prompts: it may take fewer updates than planned. With `max_steps` as
    many passes are made as it takes.

    Args:
        args, kwargs: of GRPOTrainer. `num_iterations` is the gate's `max_reuse`.
        gate: threshold, window, statistic, energy; `max_reuse`, `mini_batches` and `accumulate`
            follow from the GRPOConfig. A threshold of `math.inf` never shuts. With `energy="loss"`
            the gate decides by TRL's loss, before the last backward that an update needs.
        host_gate: as in `GradientGate.attach`: accept an optimizer that cannot skip by itself.
        head_options: of `linear_logprob`: grad_eps, screen.

    Raises:
        ValueError: FSDP, DeepSpeed or a router's loss, none of which is covered;
            `steps_per_generation` is no multiple of `gradient_accumulation_steps`; the model's head
            is one that `patch_lm_head` refuses.
    """

    def __init__(
        self,
        *args: Any,
        gate: GateConfig | None = None,
        host_gate: bool = False,
        head_options: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        config: Any = self.args
        accumulated = config.gradient_accumulation_steps
        gate = gate or GateConfig()
        warn_of_single_use(self.num_iterations, gate, "num_iterations", "TRL")
        if config.steps_per_generation % accumulated:
            raise ValueError(
                "steps_per_generation: expected a multiple of gradient_accumulation_steps "
                f"({accumulated}), got {config.steps_per_generation}"
            )
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            raise ValueError("args: expected one process or DDP, got FSDP or DeepSpeed")
        if self.aux_loss_enabled:
            raise ValueError(
                f"router_aux_loss_coef: expected 0.0, got {self.router_aux_loss_coef}: "
                "the router's loss is not computed"
            )
        head = CausalHead(self.model)
        weight = head.linear.weight
        # Where .grad is not the sum of this head's gradients, the gate keeps that itself.
        several = accumulated > 1 or self.accelerator.num_processes > 1
        self.gate = GradientGate(
            replace(
                gate,
                max_reuse=self.num_iterations,
                mini_batches=config.steps_per_generation // accumulated,
                accumulate=several and (head.tied or not weight.requires_grad),
            ),
            weight,
        )
        options: dict[str, Any] = {
            "temperature": self.temperature,
            "float32": config.cast_lm_head_to_fp32,
            "when_asked": True,
            **(head_options or {}),
        }
        patch_lm_head(self.model, gate=self.gate, **options)
        if self.ref_model is not None:
            patch_lm_head(self.accelerator.unwrap_model(self.ref_model), **options)
        self._gate_callback = DGGCallback(self.gate, host_gate=host_gate)
        self.callback_handler.callbacks.insert(0, self._gate_callback)  # before those that report
        self._loader: Any = None  # of this train(); the next one has its own
        self._saved: dict[str, Any] | None = None  # what a checkpoint has brought
        self._prompts: Any = None  # of the rollouts in use; None when all are used up
        self._drawn = self._end = 0  # batches of prompts; the step at which these are used up
        self._brought = False  # are the rollouts in use a checkpoint's?
        self._loss: Any = 0.0  # of this update so far
        self._lse_ref: Any = None  # for the next log-probs
        self._found_lse: list[Any] = []  # of each set of log-probs since it was cleared

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """TRL's; what it raises leaves the arguments as they were."""
        self._saved = None  # of a resume that was refused
        try:
            return super().train(*args, **kwargs)
        finally:
            self._gate_callback.restore(self.args)

    @property
    def _generate_every(self) -> int:
        """Steps of one batch of rollouts, if all its uses are made."""
        config: Any = self.args
        return config.steps_per_generation * self.num_iterations

    def _batches(self, loader: Any) -> Iterator[Any]:
        """Every batch of prompts once, pass after pass. TRL's loader repeats it for each step."""
        config: Any = self.args
        repeats = self._generate_every

        def passes() -> Iterator[Any]:
            for number in itertools.count():
                if hasattr(loader, "set_epoch"):
                    loader.set_epoch(number)
                batch = None
                for batch in itertools.islice(loader, 0, None, repeats):
                    yield batch
                if batch is None:
                    return

        if config.max_steps > 0:
            return passes()
        return itertools.islice(
            passes(), math.ceil(config.num_train_epochs * len(loader) / repeats)
        )

    def _begin(self, loader: Any) -> None:
        self._loader, saved, self._saved = loader, self._saved, None
        self._source = self._batches(loader)
        self._step = self._drawn = self._end = 0
        self._buffered_inputs, self._loss = None, 0.0
        self._brought = saved is not None and saved["rollouts"] is not None
        if saved is not None:
            self._step, self._drawn, self._end = saved["step"], saved["drawn"], saved["end"]
            self._buffered_inputs = saved["rollouts"]
            # A pass that begins draws from torch's generator, which the checkpoint restores.
            with torch.random.fork_rng(devices=[]):
                for _ in range(self._drawn):
                    self._prompts = next(self._source, None)

    def _advance(self) -> None:
        """Fresh prompts, where these rollouts are used up or the gate has ended their re-use.

        Waits for the gate: ranks that learned of it at different steps would part. The Trainer
        has waited for the device before, to look at the loss.
        """
        if self._loader is not self.callback_handler.train_dataloader:
            self._begin(self.callback_handler.train_dataloader)
        if self._step < self._end and not self.gate.is_shut(wait=True):
            return
        self._prompts = next(self._source, None)
        if self._prompts is None:
            return
        self._step += -self._step % self._generate_every  # TRL generates at its multiples
        self._end = self._step + self._generate_every
        self._drawn += 1
        self._brought = False
        self.gate.new_batch()

    def get_batch_samples(
        self, epoch_iterator: Any, num_batches: int, device: torch.device
    ) -> tuple[list[Any], None]:
        """The prompts of the rollouts in use, for each step of one update."""
        self._advance()
        if self._prompts is None:
            self.control.should_training_stop = True
            self.control.should_save |= self.args.save_strategy == "steps" and self._drawn > 0
            return [], None
        return [self._prompts] * num_batches, None

    def _prepare_inputs(self, generation_batch: Any) -> Any:
        """TRL's, which would generate at a batch's first step, though a checkpoint brought it."""
        model: Any = self.model
        first = self._step % self._generate_every == 0
        if model.training and first and self._brought and self._buffered_inputs:
            return self._buffered_inputs[0]
        return super()._prepare_inputs(generation_batch)

    # -- each use hands the head's log-sum-exps to the next one, and its loss to the gate

    def _get_per_token_logps_and_entropies(self, model: Any, *args: Any, **kwargs: Any) -> Any:
        """TRL's, which makes the head's inputs itself; notes the log-sum-exps."""
        found = []

        def noting(**inputs: Any) -> Any:
            with self.accelerator.autocast():  # the patch of a reference lies above Accelerate's
                outputs = model(**inputs, lse_ref=self._lse_ref)
            found.append(outputs.lse)
            return outputs

        result = super()._get_per_token_logps_and_entropies(noting, *args, **kwargs)
        self._found_lse.append(torch.cat(found))
        return result

    def _generate_and_score_completions(self, inputs: Any) -> dict[str, Any]:
        """TRL's, with the log-sum-exps of the old log-probs, if it takes any: they come first."""
        self._lse_ref = None
        self._found_lse.clear()
        output = super()._generate_and_score_completions(inputs)
        if "old_per_token_logps" in output:
            output["lse"] = self._found_lse[0]
        return output

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """TRL's; without a gradient, if the gate has decided by it to discard the update."""
        self._lse_ref = inputs.get("lse")
        self._found_lse.clear()
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        inputs["lse"] = self._found_lse[0]
        if self.gate.config.energy != "loss" or not model.training:
            return loss
        self._loss = self._loss + loss.detach()
        if self.accelerator.sync_gradients:
            self.gate.foresee(self._loss.to(self.gate.found_inf.device))
            self._loss = 0.0
            # A loss scaler wants to see a gradient at every step.
            if self.accelerator.scaler is None and self.gate.is_shut(wait=True):
                return loss.detach().requires_grad_()
        return loss

    # -- checkpoints hold the rollouts in use, so that a resumed run goes on in their midst

    def _position(self) -> dict[str, int]:
        """The settings in whose units a place among rollouts is counted."""
        config: Any = self.args
        names = ("num_iterations", "steps_per_generation", "gradient_accumulation_steps",
                 "per_device_train_batch_size", "num_generations")  # fmt: skip
        return {
            **{name: getattr(config, name) for name in names},
            "num_processes": self.accelerator.num_processes,
        }

    def _rollouts_file(self, checkpoint: str | Path) -> Path:
        return Path(checkpoint) / f"dgg_batch_{self.accelerator.process_index}.pt"

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        self._advance()  # now: what it draws from torch's generator is then in the checkpoint
        super()._save_checkpoint(model, trial)
        folder = Path(self._get_output_dir(trial=trial))
        accumulated: Any = self.args.gradient_accumulation_steps
        sampled = self._step % self._generate_every != 0
        saved = {
            "settings": self._position(),
            # Where this update began.
            "step": self._step - self._step % accumulated,
            "drawn": self._drawn,
            "end": self._end,
            "rollouts": self._buffered_inputs if sampled else None,
        }
        checkpoint = folder / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        # With save_only_model nobody has made it but rank 0.
        checkpoint.mkdir(parents=True, exist_ok=True)
        torch.save(saved, self._rollouts_file(checkpoint))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            file = self._rollouts_file(checkpoint)
            if not file.is_file():
                raise ValueError(
                    "checkpoint: expected one of DGGTrainer, of as many processes as now "
                    f"({self.accelerator.num_processes}): {file} is missing"
                )
            saved = torch.load(file, map_location=self.args.device, weights_only=True)
            for name, now in self._position().items():
                if (then := saved["settings"][name]) != now:
                    raise ValueError(f"{name}: expected {then}, as in the checkpoint, got {now}")
            self._saved = saved
        super()._load_optimizer_and_scheduler(checkpoint)
