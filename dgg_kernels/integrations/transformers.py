"""transformers: log-probs in place of a causal LM's logits, and the gate in its Trainer."""

from __future__ import annotations

import contextlib
import inspect
import types
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState
from transformers.utils.generic import ModelOutput

from dgg_kernels import GradientGate, LogprobOutput, linear_logprob

from . import last_decision

IGNORE = -100  # the label that transformers leaves out of a loss


class CausalHead:
    """What a transformers causal LM does between its hidden states and its logits.

    Modules are looked up at every call, since PEFT and FSDP replace them in place.

    Args:
        model: the causal LM, or the PEFT model around it.

    Raises:
        ValueError: its head is not one `nn.Linear` (an adapter on it, for instance).
    """

    def __init__(self, model: Any) -> None:
        self.model = model.get_base_model() if hasattr(model, "get_base_model") else model
        config = self.model.config.get_text_config()
        self.softcap: float | None = getattr(config, "final_logit_softcapping", None)
        # Granite divides its logits, Cohere multiplies them: both are a temperature.
        divisor = getattr(config, "logits_scaling", None) or 1.0
        self.scale: float = divisor / (getattr(config, "logit_scale", None) or 1.0)
        if type(self.linear) is not nn.Linear:
            kind = type(self.linear)
            raise ValueError(
                f"model: expected a linear head, got {kind.__name__} of {kind.__module__}"
            )

    @property
    def linear(self) -> nn.Linear:
        """The lm_head: weight [V, D], and bias [V] or None."""
        return self.model.get_output_embeddings()

    @property
    def tied(self) -> bool:
        """Is the head's weight the embedding's?"""
        return self.linear.weight is self.model.get_input_embeddings().weight

    @property
    def decoder(self) -> Any:
        """The stack below the head. PEFT replaces layers in it, and leaves it in its place."""
        base = self.model.base_model
        # Llama 4's and Mllama's text models name no part as their base.
        return base if base is not self.model else self.model.model

    def logprob(
        self, hidden: Tensor, target: Tensor, *, temperature: float = 1.0, **options: Any
    ) -> LogprobOutput:
        """`linear_logprob` of hidden [..., D] and target [...] with this head, and its options."""
        return linear_logprob(
            hidden,
            self.linear.weight,
            target,
            bias=self.linear.bias,
            temperature=temperature * self.scale,
            softcap=self.softcap,
            **options,
        )


@torch.no_grad()
def check_logprobs(
    model: Any, logprobs: Callable[[Tensor], Tensor], *, with_loss: bool = False
) -> None:
    """Raise ValueError unless these log-probs are those of the model's own logits.

    A head that does something of its own (a scale, a norm, an adapter) would be trained wrongly.

    Args:
        model: called for its logits, with dropout off.
        logprobs: tokens [1, T] -> log-probs [1, T - 1] of the tokens from the second on.
        with_loss: the model's own loss has to be their negative mean, too.
    """
    modes = {module: module.training for module in model.modules()}
    weight = model.get_output_embeddings().weight
    tokens = torch.arange(8, device=weight.device)[None] % weight.shape[0]
    inputs = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    try:
        model.eval()
        # Not in the autocast that Accelerate has put around it.
        forward = getattr(model, "_original_forward", model)
        out = forward(**inputs, labels=tokens) if with_loss else forward(**inputs)
        got = logprobs(tokens)
    finally:
        for module, mode in modes.items():
            module.training = mode
    expected = out.logits[:, :-1].float().log_softmax(-1).gather(-1, tokens[:, 1:, None])[..., 0]
    # So far logits are off themselves: in fp32 as TF32 leaves them, in 16 bits as they are rounded.
    full = weight.dtype == torch.float32
    floor, eps = (1e-2, 2**-10) if full else (0.25, torch.finfo(weight.dtype).eps)
    tolerance = max(floor, eps * float(out.logits.abs().max()))
    difference = float((got - expected).abs().max())
    if not difference <= tolerance:
        raise ValueError(
            "model: expected a head whose logits are weight, bias, scale and softcap, got "
            f"log-probs that differ from its own by {difference:.3g}"
        )
    if with_loss and not abs(loss := float(out.loss) - float(-expected.mean())) <= tolerance:
        raise ValueError(
            "model: expected a loss of its own that is the mean of the negative log-probs, got "
            f"one that differs by {loss:.3g}; with when_asked=True log-probs alone are taken"
        )


@dataclass
class LogprobModelOutput(ModelOutput):
    """What a patched model returns when it is given labels; positions as its own loss has them.

    Attributes:
        loss: negative log-likelihood, summed and divided by `num_items_in_batch`, or the mean.
        log_probs: [B, T - 1] fp32, of the labels from the second on; 0 where the label is -100.
        entropy: [B, T - 1] fp32, of the whole distribution, in nats.
        lse: [B, T - 1] fp32, log-sum-exps without gradient: `lse_ref` of the batch's next use. 0
            where the label is -100, and everywhere while the gate is shut.
    """

    loss: Tensor | None = None
    log_probs: Tensor | None = None
    entropy: Tensor | None = None
    lse: Tensor | None = None


class PatchedHead:
    """A patched model: `remove()`, or the end of a `with` block, gives its old forward back."""

    def __init__(self, model: Any, forward: Callable[..., Any], keep_as: str) -> None:
        self._model = model
        # On the model: a copy of it gets a copy, which is bound to the copy.
        self._kept_as = keep_as
        setattr(model, keep_as, model.forward)
        self._forward = model.forward = types.MethodType(forward, model)

    def remove(self) -> None:
        """Undo the patch.

        Raises:
            RuntimeError: something else has replaced the forward since then.
        """
        if self._model.__dict__.get("forward") != self._forward:  # Accelerate binds it anew
            raise RuntimeError("model: its forward was replaced after patch_lm_head: undo that")
        _unpatch(self._model, self._kept_as)

    def __enter__(self) -> PatchedHead:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()


def _unpatch(model: Any, kept_as: str) -> None:
    before = model.__dict__.pop(kept_as)
    del model.forward
    if before != model.forward:  # it was not the class's
        model.forward = before


def patch_lm_head(
    model: Any,
    *,
    temperature: float = 1.0,
    float32: bool = False,
    when_asked: bool = False,
    **options: Any,
) -> PatchedHead:
    """Let `model(..., labels=labels)` return per-token log-probs, without making logits.

    Without labels the forward is the one it was, so that `generate` is untouched. With them it
    returns a `LogprobModelOutput`; a loss is its own, or a few lines over `log_probs`. With
    `lse_ref=` of the batch's last use, too, a GPU's head goes over the vocabulary once less.

    Args:
        model: a transformers causal LM, or the PEFT model around one.
        temperature: divides the logits.
        float32: run a float32 head in float32 even under autocast.
        when_asked: leave calls with labels as they were, too, but those with `fused_lm_head=True`,
            as TRL's trainers make them.
        options: of `linear_logprob`: grad_eps, screen, gate. The gate sees passes with gradient of
            this model, and of no copy of it.

    Raises:
        ValueError: the model is patched already, or prepared by Accelerate; the head is not
            linear; the log-probs are not those of the model's logits, or its loss is not theirs
            (compared once, on 8 tokens). By a call: it asks for a router's loss, or gives
            `shift_labels`.
    """
    model = CausalHead(model).model
    original = weakref.ref(model)
    gate: GradientGate | None = options.pop("gate", None)
    if gate is not None:
        gate.check_weight(CausalHead(model).linear.weight)
    _check_call(model, {})
    undo = contextlib.ExitStack()  # if it is refused
    if patch := getattr(model.forward, "patch", None):
        patched, kept_as = patch
        # Accelerate's hooks copy the attribute.
        if patched() is model or not isinstance(model.forward, types.MethodType):
            raise ValueError(
                "model: expected one that is not patched: .remove() what the first "
                "patch_lm_head() returned"
            )
        # A copy, whose patch nobody can remove.
        undo.callback(vars(model).update, {k: vars(model)[k] for k in ("forward", kept_as)})
        _unpatch(model, kept_as)
    if "_original_forward" in vars(model) and not when_asked:
        raise ValueError("model: expected one that Accelerate has not prepared: patch it before")
    # Others may lie between, as of a trainer that had the model before.
    own_forward = f"_own_forward_{sum(name.startswith('_own_forward_') for name in vars(model))}"

    def log_probs(
        model: Any, labels: Tensor, lse_ref: Tensor | None, scale: float, *args: Any, **inputs: Any
    ) -> tuple[Tensor, ...]:
        head = CausalHead(model)
        inputs |= {"use_cache": False, "return_dict": True}
        hidden = head.decoder(*args, **inputs).last_hidden_state
        # A model may lie on several devices: here all goes to its head's.
        weight = head.linear.weight
        # Position t predicts token t + 1, and the last one nothing that is known.
        target = nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORE).to(weight.device)
        if lse_ref is not None:
            lse_ref = nn.functional.pad(lse_ref, (0, 1)).to(weight.device)
        autocast = torch.autocast(weight.device.type, enabled=False)
        with autocast if float32 else contextlib.nullcontext():
            out = head.logprob(
                hidden.to(weight.device, weight.dtype),
                target,
                temperature=scale,
                ignore_index=IGNORE,
                lse_ref=lse_ref,
                gate=gate if torch.is_grad_enabled() and model is original() else None,
                **options,
            )
        there = (out.logp, out.entropy, out.lse)
        return tuple(values.to(labels.device) for values in there)

    def forward(
        self: Any,
        *args: Any,
        labels: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        fused_lm_head: bool = not when_asked,  # TRL's word for what labels mean here
        lse_ref: Tensor | None = None,
        **inputs: Any,
    ) -> Any:
        if labels is None:
            return getattr(self, own_forward)(*args, **inputs)
        if not fused_lm_head:
            if num_items_in_batch is not None:
                inputs["num_items_in_batch"] = num_items_in_batch
            return getattr(self, own_forward)(*args, labels=labels, **inputs)
        _check_call(self, inputs)
        logp, entropy, lse = log_probs(self, labels, lse_ref, temperature, *args, **inputs)
        count = num_items_in_batch
        if count is None:
            count = (labels[:, 1:] != IGNORE).sum()
        mean = -logp.sum() / count
        return LogprobModelOutput(mean, logp[:, :-1], entropy[:, :-1], lse[:, :-1])

    forward.patch = (original, own_forward)  # pyright: ignore[reportFunctionMemberAccess]
    # generate() looks the arguments up there. Not by functools.wraps: Accelerate would unwrap it.
    forward.__signature__ = inspect.signature(type(model).forward)  # pyright: ignore[reportFunctionMemberAccess]

    def checked(tokens: Tensor) -> Tensor:
        return log_probs(model, tokens, None, 1.0, tokens)[0][:, :-1]

    with undo:
        check_logprobs(model, checked, with_loss=not when_asked)
        undo.pop_all()
    return PatchedHead(model, forward, own_forward)


def _check_call(model: Any, inputs: dict[str, Any]) -> None:
    """Refuse what a model's own loss would heed."""
    if inputs.get("shift_labels") is not None:
        raise ValueError("shift_labels: expected None on a patched model, which shifts the labels")
    asked = inputs.get("output_router_logits")
    config = model.config.get_text_config()
    if asked or (asked is None and getattr(config, "output_router_logits", False)):
        raise ValueError("output_router_logits: expected False: the router's loss is not computed")


class DGGCallback(TrainerCallback, ExportableState):
    """The gate in a transformers Trainer: shut, an update changes nothing.

    It decides on every update, takes over the clipping to `max_grad_norm` (the gate must see the
    gradient unclipped), lets the learning-rate schedule count applied updates, adds the gate's
    metrics to the logs, and keeps the gate's state in the checkpoints. When a batch of rollouts
    begins and ends is the trainer's to say: `gate.new_batch()`, `gate.is_shut(wait=True)`; and
    where the gate scores the loss, so is `gate.foresee(loss)`, in training and once an update.
    While an update is computed `args.max_grad_norm` reads 0, and after one that raised until
    training goes on (`restore(args)`).

    Put it before the callbacks that report, which are called in their order:
    `trainer.callback_handler.callbacks.insert(0, DGGCallback(gate))`.

    Args:
        gate: the one given to `patch_lm_head`.
        host_gate: as in `GradientGate.attach`: accept an optimizer that cannot skip by itself.
    """

    def __init__(self, gate: GradientGate, *, host_gate: bool = False) -> None:
        self.gate, self.host_gate = gate, host_gate
        self._max_grad_norm: float | None = None  # what the arguments said, while they say 0

    def state(self) -> dict[str, Any]:
        """What transformers keeps for a callback in trainer_state.json."""
        saved = self.gate.state_dict()
        return {"args": {}, "attributes": {**saved, "state": saved["state"].tolist()}}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Restore the gate, and attach it to the optimizer inside Accelerate's wrapper."""
        if args.restore_callback_states_from_checkpoint:
            raise ValueError(
                "restore_callback_states_from_checkpoint: expected False with DGGCallback, which "
                "restores its gate in any case, got True"
            )
        if getattr(args, "enable_jit_checkpoint", False):
            # It saves between decide() and step(): a refused update would be in the checkpoint.
            raise ValueError("enable_jit_checkpoint: expected False with DGGCallback, got True")
        if args.n_gpu > 1:  # its replicas would call the forward of the first
            raise ValueError(f"args: expected a GPU a process, got {args.n_gpu} in DataParallel")
        optimizer = kwargs["optimizer"]
        # Without a checkpoint this is the gate's own state, as the train() that begins found it.
        kept = state.stateful_callbacks.get(type(self).__name__)
        if kept is not None:  # the checkpoint may be of a run without a gate
            saved = kept["attributes"]
            values = torch.tensor(saved["state"], dtype=torch.float64)
            self.gate.load_state_dict({**saved, "state": values})
        self.gate.detach()  # what a train() that raised has left
        self.restore(args)
        self.gate.attach(
            optimizer,
            args.max_grad_norm or None,
            scaler=optimizer.scaler,
            host_gate=self.host_gate,
        )

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Let the Trainer not clip, which the optimizer's step does: until it has not done it."""
        self._max_grad_norm, args.max_grad_norm = args.max_grad_norm, 0.0

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Decide: the gradient is accumulated, reduced and unscaled."""
        self.restore(args)
        self.gate.decide()

    def restore(self, args: Any) -> None:
        """Give the arguments their `max_grad_norm` back, if an update was broken off."""
        if self._max_grad_norm is not None:
            args.max_grad_norm, self._max_grad_norm = self._max_grad_norm, None

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Give back what an update holds that was broken off, before a checkpoint is written."""
        self.restore(args)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Tell Accelerate of a skipped step, as its loss scaler does: the schedule waits."""
        optimizer = kwargs["optimizer"]
        overflow = optimizer.scaler is not None and optimizer.step_was_skipped
        optimizer._is_overflow = overflow or self.gate.is_shut(wait=True)

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any
    ) -> None:
        """Add the last decision to a training step's logs."""
        if logs is None or "loss" not in logs:
            return
        found = last_decision(self.gate)
        logs.update(found)
        state.log_history[-1].update(found)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Leave optimizer and arguments as they were, also in the midst of an update."""
        self.restore(args)
        self.gate.detach()
