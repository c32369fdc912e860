"""The transformers integration against transformers itself: models, generate, Trainer.

A docstring of a test is a line of the compatibility table (test_integration_table.py).
"""

from __future__ import annotations

import copy
import functools
import inspect
import json
import math

import pytest
import torch
import transformers
from tiny_models import MODELS, SHAPE, V, build

from dgg_kernels import GateConfig, GradientGate, replay
from dgg_kernels.integrations import transformers as integration
from dgg_kernels.integrations.transformers import CausalHead, DGGCallback, patch_lm_head
from dgg_kernels.replay_log import read_energies

K = 4


def batch():
    """Two sequences, the first padded on the left; some labels are ignored."""
    tokens = torch.randint(1, V, (2, 9), generator=torch.Generator().manual_seed(1))
    attention = torch.ones_like(tokens)
    attention[0, :3] = 0
    labels = tokens.masked_fill(attention == 0, -100)
    labels[1, 4] = -100
    return {"input_ids": tokens, "attention_mask": attention}, labels


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(got, expected):
    assert got.keys() == expected.keys() and got
    for name in got:
        torch.testing.assert_close(got[name], expected[name], rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("name", sorted(MODELS))
def test_a_models_log_probs_loss_and_gradients_without_its_logits(name):
    """Log-probs, entropy, loss and all gradients of Llama, SmolLM, Qwen, Mistral, Gemma (softcap),
    Phi (bias), Granite, Cohere; tied and untied.
    """
    model, (inputs, labels) = build(name), batch()
    assert CausalHead(model).tied == (model.lm_head.weight is model.get_input_embeddings().weight)
    theirs = model(**inputs, labels=labels)
    theirs.loss.backward()
    expected = gradients(model)
    model.zero_grad()
    patch_lm_head(model, grad_eps=0.0)
    # What would have to make logits must not be called.
    model.lm_head.register_forward_pre_hook(lambda *_: pytest.fail("logits were made"))
    ours = model(**inputs, labels=labels)
    ours.loss.backward()
    torch.testing.assert_close(ours.loss, theirs.loss, rtol=1e-5, atol=1e-6)
    assert_same(gradients(model), expected)
    distribution = torch.distributions.Categorical(logits=theirs.logits[:, :-1].detach())
    kept = labels[:, 1:] != -100
    logp = distribution.log_prob(labels[:, 1:].clamp_min(0)) * kept
    torch.testing.assert_close(ours.log_probs.detach(), logp, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        ours.entropy.detach(), distribution.entropy() * kept, rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("name", ["Llama", "Gemma2"])
def test_generate_is_untouched_and_the_patch_can_be_undone(name):
    """`generate` gives the same tokens; the patch can be undone."""
    model, (inputs, labels) = build(name), batch()
    signature = inspect.signature(model.forward)
    generate = dict(**inputs, max_new_tokens=5, do_sample=False)
    tokens, own = model.generate(**generate), model(**inputs, labels=labels)
    with patch_lm_head(model, temperature=0.7) as patched:
        assert inspect.signature(model.forward) == signature
        assert model.generate(**generate).equal(tokens)
        assert model(**inputs).logits.equal(own.logits)
        assert "logits" not in model(**inputs, labels=labels)
        ours = model.forward
        model.forward = lambda *_: None
        with pytest.raises(RuntimeError, match="model: its forward was replaced after"):
            patched.remove()
        model.forward = ours
    assert "forward" not in vars(model)
    assert model(**inputs, labels=labels).logits.equal(own.logits)


def test_temperature_and_num_items_in_batch():
    model, (inputs, labels) = build("Qwen2"), batch()
    scaled = (model(**inputs).logits[:, :-1] / 0.7).log_softmax(-1)
    patch_lm_head(model, temperature=0.7)
    out = model(**inputs, labels=labels, num_items_in_batch=50)
    expected = scaled.gather(-1, labels[:, 1:, None].clamp_min(0))[..., 0] * (labels[:, 1:] != -100)
    torch.testing.assert_close(out.log_probs, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(out.loss, -expected.sum() / 50, rtol=1e-4, atol=1e-5)


def test_a_use_gives_the_head_the_log_sum_exps_of_the_last_one(monkeypatch):
    """`lse_ref` for the head, from the last use's output."""
    given, own = [], integration.linear_logprob

    def noted(*args, lse_ref=None, **options):
        given.append(lse_ref)
        return own(*args, lse_ref=lse_ref, **options)

    model, (inputs, labels) = build("Phi3"), batch()
    expected = model(**inputs).logits[:, :-1].logsumexp(-1) * (labels[:, 1:] != -100)
    monkeypatch.setattr(integration, "linear_logprob", noted)
    patch_lm_head(model)
    first = model(**inputs, labels=labels)
    again = model(**inputs, labels=labels, lse_ref=first.lse)
    torch.testing.assert_close(first.lse, expected, rtol=1e-4, atol=1e-5)
    assert not first.lse.requires_grad and given[:2] == [None, None]
    assert given[2].shape == labels.shape and given[2][:, :-1].equal(first.lse)
    assert again.log_probs.equal(first.log_probs)


def test_the_head_in_float32_under_autocast():
    """A float32 head under bf16 autocast."""
    model, (inputs, labels) = build("Llama"), batch()
    patched = {}
    for float32 in (True, False):
        with patch_lm_head(model, float32=float32), torch.autocast("cpu", torch.bfloat16):
            hidden = model.base_model(**inputs).last_hidden_state
            patched[float32] = model(**inputs, labels=labels).log_probs
    exact = torch.nn.functional.linear(hidden.float(), model.lm_head.weight)[:, :-1].log_softmax(-1)
    exact = exact.gather(-1, labels[:, 1:, None].clamp_min(0))[..., 0] * (labels[:, 1:] != -100)
    assert (patched[True] - exact).abs().max() < 1e-5 < (patched[False] - exact).abs().max()


def test_a_copy_of_a_patched_model_has_its_own_weights():
    model, (inputs, labels) = build("Llama"), batch()
    patch_lm_head(model)
    other = copy.deepcopy(model)
    before = model(**inputs, labels=labels).loss.detach()
    with torch.no_grad():
        model.lm_head.weight.zero_()
    assert other(**inputs, labels=labels).loss.equal(before)
    assert model(**inputs, labels=labels).loss.item() == pytest.approx(math.log(V))
    assert not other(**inputs).logits.equal(model(**inputs).logits)


def test_dropout_is_off_while_the_head_is_checked_and_on_again_afterwards():
    model = build("Llama", attention_dropout=0.9).train()
    model.lm_head.eval()
    patch_lm_head(model)
    assert model.training and model.model.layers[0].training and not model.lm_head.training


def test_a_head_that_does_more_than_we_know_is_refused():
    """A head that computes anything else is refused when it is patched."""
    model = build("Llama")
    hook = model.lm_head.register_forward_hook(lambda module, inputs, logits: 2 * logits)
    with pytest.raises(ValueError, match="model: expected a head whose logits are weight, bias"):
        patch_lm_head(model)
    assert "forward" not in vars(model)
    hook.remove()
    with pytest.raises(ValueError, match="gate: expected the weight it was built for"):
        patch_lm_head(model, gate=GradientGate(GateConfig(), torch.zeros(3, 16)))
    model.config.output_router_logits = True
    with pytest.raises(ValueError, match="output_router_logits: expected False"):
        patch_lm_head(model)
    model.set_output_embeddings(torch.nn.Sequential(torch.nn.Linear(16, V)))
    with pytest.raises(ValueError, match="model: expected a linear head, got Sequential"):
        patch_lm_head(model)


def test_a_loss_that_is_not_of_the_log_probs_alone_is_refused():
    """A loss that is not the mean of the log-probs (a router's, a z-loss) is refused, where the
    patched model is to return one.
    """
    model, (inputs, labels) = build("Llama"), batch()
    model.loss_function = lambda logits, labels, vocab_size, **_: logits.square().mean()
    with pytest.raises(ValueError, match="expected a loss of its own that is the mean of the nega"):
        patch_lm_head(model)
    patch_lm_head(model, when_asked=True)
    assert model(**inputs, labels=labels, fused_lm_head=True).log_probs.shape == (2, 8)
    model = build("Llama")
    patch_lm_head(model)
    with pytest.raises(ValueError, match="model: expected one that is not patched"):
        patch_lm_head(model)
    with pytest.raises(ValueError, match="shift_labels: expected None on a patched model"):
        model(**inputs, labels=labels, shift_labels=labels)
    with pytest.raises(ValueError, match="output_router_logits: expected False"):
        model(**inputs, labels=labels, output_router_logits=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rounded_logits_are_taken_for_what_they_are(dtype):
    """Models whose own logits are rounded: large ones in bf16, and by TF32."""
    model = build("Llama").to(dtype)
    with torch.no_grad():
        model.lm_head.weight.mul_(40 if dtype == torch.bfloat16 else 4)
        if dtype == torch.float32:
            own = model.lm_head.forward
            kept = lambda t: (t.view(torch.int32) + 2**12 & -(2**13)).view(torch.float32)  # noqa: E731
            rounded = torch.nn.Parameter(kept(model.lm_head.weight))
            model.lm_head.forward = lambda x: torch.nn.functional.linear(kept(x), rounded)
            hidden = torch.randn(3, 16)
            assert (own(hidden) - model.lm_head(hidden)).abs().max() > 1e-3
    logits = model(torch.arange(8)[None]).logits.abs().max()
    assert logits > (64 if dtype == torch.bfloat16 else 4)
    patch_lm_head(model)


@pytest.mark.parametrize("kind", ["hook", "partial", "compiled"])
def test_a_forward_that_is_bound_already_stays_what_it_was(kind):
    """A model whose forward is bound already, as by Accelerate's hooks; its copies."""
    accelerate = pytest.importorskip("accelerate")
    model, (inputs, labels) = build("Llama"), batch()
    tokens = inputs["input_ids"]
    expected, sampled = model(**inputs, labels=labels), model.generate(tokens, max_new_tokens=3)
    if kind == "hook":
        accelerate.dispatch_model(model, {"model": "cpu", "lm_head": "cpu"}, force_hooks=True)
    elif kind == "partial":
        model.forward = functools.partial(model.forward)
    else:
        model.forward = torch.compile(model.forward, backend="eager")
    with patch_lm_head(model, grad_eps=0.0):
        torch.testing.assert_close(model(**inputs, labels=labels).loss, expected.loss)
        torch.testing.assert_close(model(tokens, inputs["attention_mask"]).logits, expected.logits)
        assert model.generate(tokens, max_new_tokens=3).equal(sampled)
        other = copy.deepcopy(model)
        with torch.no_grad():
            other.lm_head.weight.zero_()
        assert kind == "compiled" or not other(**inputs).logits.any()  # the copy's own weights
    torch.testing.assert_close(model(**inputs).logits, expected.logits)
    if kind != "compiled":  # a patch of the copy's own takes the place of the one that it came with
        own = patch_lm_head(other, temperature=2.0)
        assert other(**inputs, labels=labels).log_probs.shape == (2, 8)
        own.remove()
        assert not [name for name in vars(other) if name.startswith("_own_forward")]
        assert not other(**inputs, labels=labels).logits.any()


def test_a_copy_is_not_gated():
    model, (inputs, labels) = build("Llama"), batch()
    gate = GradientGate(GateConfig(), model.lm_head.weight)
    patch_lm_head(model, gate=gate)
    other = copy.deepcopy(model)
    gate.new_batch()
    other(**inputs, labels=labels).loss.backward()
    with pytest.raises(RuntimeError, match="decide: no backward through linear_logprob"):
        gate.decide()
    gate.decide(energy=torch.tensor(math.nan))
    assert gate.is_shut() and other(**inputs, labels=labels).loss > 0.1


def test_a_copy_that_cannot_be_patched_anew_stays_as_it_came():
    model, (inputs, labels) = build("Llama"), batch()
    patch_lm_head(model)
    other = copy.deepcopy(model)
    other.lm_head.register_forward_hook(lambda module, args, logits: 2 * logits)
    with pytest.raises(ValueError, match="model: expected a head whose logits are"):
        patch_lm_head(other)
    assert other(**inputs, labels=labels).log_probs.shape == (2, 8)
    hooks = pytest.importorskip("accelerate").hooks
    hooked = copy.deepcopy(model)
    hooks.add_hook_to_module(hooked, hooks.ModelHook())  # which would be gone with the patch
    with pytest.raises(ValueError, match="model: expected one that is not patched"):
        patch_lm_head(hooked)
    assert hooked(**inputs, labels=labels).log_probs.shape == (2, 8)


def test_accelerate_does_not_unwrap_the_patch():
    accelerate = pytest.importorskip("accelerate")
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)  # an earlier test's
    model, (inputs, labels) = build("Llama"), batch()
    patch = patch_lm_head(model)
    accelerator = accelerate.Accelerator(mixed_precision="bf16", cpu=True)
    bare = accelerator.unwrap_model(accelerator.prepare(model), keep_fp32_wrapper=False)
    assert bare(**inputs, labels=labels).log_probs.shape == (2, 8)
    patch.remove()
    assert bare(**inputs, labels=labels).logits.shape == (2, 9, V)
    prepared = accelerator.prepare(build("Llama"))
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    with pytest.raises(ValueError, match="one that Accelerate has not prepared: patch it before"):
        patch_lm_head(prepared)


def test_a_model_that_names_no_base_is_read_by_its_decoder():
    kind = transformers.Llama4TextConfig
    config = kind(**{**SHAPE, "intermediate_size_mlp": 32, "num_local_experts": 2,
                     "num_experts_per_tok": 1, "use_qk_norm": False})  # fmt: skip
    model, (inputs, labels) = transformers.Llama4ForCausalLM(config).eval(), batch()
    expected = model(**inputs, labels=labels).loss
    patch_lm_head(model, grad_eps=0.0)
    torch.testing.assert_close(model(**inputs, labels=labels).loss, expected)


def test_lora_trains_alike_and_the_gate_sees_the_frozen_head():
    """LoRA through PEFT; the gate sees the frozen head."""
    peft = pytest.importorskip("peft")
    targets = ["q_proj", "v_proj"]
    config = peft.LoraConfig(r=2, target_modules=targets, init_lora_weights=False)
    model, (inputs, labels) = peft.get_peft_model(build("Qwen2, tied"), config), batch()
    model(**inputs, labels=labels).loss.backward()
    expected = gradients(model)
    model.zero_grad()
    base = model.get_base_model()
    gate = GradientGate(GateConfig(), base.lm_head.weight)
    patch_lm_head(model, grad_eps=0.0, gate=gate)
    gate.new_batch()
    model(**inputs, labels=labels).loss.backward()
    gate.decide()
    assert_same(gradients(model), expected)
    assert all("lora_" in name for name in expected)
    # What the frozen head's gradient would have been.
    hidden = base.model(**inputs).last_hidden_state.detach()[:, :-1]
    weight = base.lm_head.weight.detach().clone().requires_grad_()
    dense = torch.nn.functional.cross_entropy(
        (hidden @ weight.T).flatten(0, 1), labels[:, 1:].flatten()
    )
    dense.backward()
    assert float(gate.metrics()["gate/energy"]) == pytest.approx(
        float(weight.grad.norm()), rel=1e-4
    )

    head_too = peft.LoraConfig(r=2, target_modules=[*targets, "lm_head"])
    with pytest.raises(ValueError, match=r"expected a linear head, got Linear of peft\."):
        patch_lm_head(peft.get_peft_model(build("Llama"), head_too))


# -- Trainer --------------------------------------------------------------------------------------


class Reuse(transformers.Trainer):
    """Every batch of the data set K times; the gate's batches are these."""

    gate: GradientGate | None = None

    def _get_train_sampler(self, dataset=None):
        return [i for first in range(0, 24, 4) for _ in range(K) for i in range(first, first + 4)]

    def get_batch_samples(self, *args):
        if self.gate is not None and self.state.global_step % K == 0:
            self.gate.new_batch()
        return super().get_batch_samples(*args)

    loss = 0.0  # of this update so far

    def compute_loss(self, model, *args, **kwargs):
        loss = super().compute_loss(model, *args, **kwargs)
        if self.gate is None or self.gate.config.energy != "loss" or not model.training:
            return loss
        self.loss = self.loss + loss.detach()
        if self.accelerator.sync_gradients:
            self.gate.foresee(self.loss)
            self.loss = 0.0
        return loss


class Applied(transformers.TrainerCallback):
    """Whether each update changed the weights, and the learning rate it was made with."""

    def __init__(self):
        self.changed, self.rates = [], []

    def on_pre_optimizer_step(self, args, state, control, model=None, optimizer=None, **_):
        self.before = copy.deepcopy(model.state_dict())
        self.rates.append(optimizer.param_groups[0]["lr"])

    def on_optimizer_step(self, args, state, control, model=None, **_):
        now = model.state_dict()
        self.changed.append(any(not now[name].equal(old) for name, old in self.before.items()))


def trainer(out, threshold=None, energy="head", **options):
    """Six batches of four sequences, each used K times; no gate without a threshold."""
    model = build("Llama")
    generator = torch.Generator().manual_seed(2)
    data = [
        {"input_ids": t, "labels": t} for t in torch.randint(1, V, (24, 6), generator=generator)
    ]
    arguments = dict(
        per_device_train_batch_size=4, num_train_epochs=1, learning_rate=3e-2, max_grad_norm=0.5,
        logging_steps=1, save_steps=9, report_to="none", use_cpu=True, disable_tqdm=True,
        optim="adamw_torch_fused", lr_scheduler_type="linear", weight_decay=0.1,
    )  # fmt: skip
    args = transformers.TrainingArguments(str(out), **{**arguments, **options})
    applied = Applied()
    made = Reuse(model, args, train_dataset=data, callbacks=[applied])
    made.applied = applied
    if threshold is not None:
        config = GateConfig(threshold=threshold, window=3, max_reuse=K, energy=energy)
        made.gate = GradientGate(config, model.lm_head.weight)
        patch_lm_head(model, gate=made.gate, grad_eps=0.0)
        callbacks = made.callback_handler.callbacks
        callbacks.insert(0, DGGCallback(made.gate, host_gate="fused" not in args.optim))
    return made


def rows(made):
    return [row for row in made.state.log_history if "loss" in row]


@pytest.mark.parametrize(
    "options", [{}, {"gradient_accumulation_steps": 2}, {"optim": "adamw_torch"}]
)
def test_trainer_with_a_gate_that_never_shuts_is_the_stock_trainer(options, tmp_path):
    """Trainer with a gate that never shuts: the stock losses, norms and weights; gradient
    accumulation; fused AdamW, or any optimizer with `host_gate`.
    """
    options = {"learning_rate": 1e-3, **options}
    stock, ours = trainer(tmp_path, **options), trainer(tmp_path, math.inf, **options)
    stock.train()
    ours.train()
    assert len(rows(stock)) == len(rows(ours)) >= 12
    assert not hasattr(ours.optimizer.optimizer, "_dgg_attached")  # it is the Trainer's again
    for theirs, mine in zip(rows(stock), rows(ours), strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
        assert mine["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-4)
        assert mine["grad_norm"] > 0.5  # clipped
        assert mine["learning_rate"] == pytest.approx(theirs["learning_rate"])
    expected = dict(stock.model.named_parameters())
    for name, parameter in ours.model.named_parameters():
        torch.testing.assert_close(parameter, expected[name], rtol=1e-4, atol=2e-5)
    assert ours.args.max_grad_norm == 0.5  # given back
    # What the gate scores is the head's gradient before clipping.
    assert all(0.5 < row["gate/energy"] <= row["grad_norm"] for row in rows(ours))


@pytest.mark.parametrize(("optim", "energy"), [
    ("adamw_torch_fused", "head"), ("adamw_torch", "head"), ("adamw_torch_fused", "loss"),
    ("adamw_torch", "loss"),
])  # fmt: skip
def test_trainer_skips_what_the_gate_shuts_and_its_schedule_waits(optim, energy, tmp_path):
    """Trainer skips what the gate, on the head's gradient or on the loss, shuts, as `replay` says;
    its schedule counts applied updates; metrics in the logs.
    """
    made = trainer(tmp_path, 0.0, energy, optim=optim)
    seen = []

    class Reporter(transformers.TrainerCallback):
        def on_log(self, args, state, control, logs=None, **_):
            seen.append(dict(logs))

    made.add_callback(Reporter())
    made.train()
    log = rows(made)
    assert [row["gate/energy"] for row in log] == [s["gate/energy"] for s in seen if "loss" in s]
    # As replay says, from the log as anyone would read it from a file.
    file = tmp_path / "log.jsonl"
    file.write_text("\n".join(map(json.dumps, made.state.log_history)))
    signal = "loss" if energy == "loss" else "gate/energy"
    decisions = [d for b in replay(read_energies(file, 1, signal), made.gate.config) for d in b]
    shut = [d.shut for d in decisions]
    assert shut == [bool(row["gate/shut"]) for row in log] and 3 < sum(shut) < len(shut) - 3
    assert made.applied.changed == [not s for s in shut]
    # The schedule is at the number of updates applied so far.
    for n, rate in enumerate(made.applied.rates):
        assert rate == pytest.approx(3e-2 * (1 - shut[:n].count(False) / len(log)))
    assert log[-1]["updates_applied"] == shut.count(False)
    assert log[-1]["updates_attempted"] == len(log) == 24


def test_trainer_resumes_with_the_gates_state(tmp_path):
    """Trainer resumes from a checkpoint with the same bits."""
    whole = trainer(tmp_path, 0.0)
    whole.train()
    resumed = trainer(tmp_path / "again", 0.0)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-9"))
    assert [r["gate/energy"] for r in rows(resumed)] == [r["gate/energy"] for r in rows(whole)]
    assert any(row["gate/shut"] for row in rows(resumed)[9:])
    for mine, theirs in zip(resumed.model.parameters(), whole.model.parameters(), strict=True):
        assert mine.equal(theirs)

    refused = trainer(tmp_path / "c", 0.0, restore_callback_states_from_checkpoint=True)
    with pytest.raises(ValueError, match="restore_callback_states_from_checkpoint: expected False"):
        refused.train()


def test_trainer_can_go_on_after_a_train_that_raised(tmp_path):
    made = trainer(tmp_path, math.inf, save_strategy="no")

    class Raises(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            raise KeyboardInterrupt

    raises = Raises()
    made.add_callback(raises)
    with pytest.raises(KeyboardInterrupt):
        made.train()
    assert made.args.max_grad_norm == 0.5
    made.remove_callback(raises)
    hook = made.model.model.register_forward_hook(lambda *_: 1 / 0)  # in the midst of an update
    with pytest.raises(ZeroDivisionError):
        made.train()
    hook.remove()
    assert made.args.max_grad_norm == 0.0
    made.train()
    assert made.args.max_grad_norm == 0.5 and rows(made)[0]["grad_norm"] > 0.5


def test_a_stop_in_the_midst_of_an_update_leaves_the_arguments_as_they_were(tmp_path):
    class Stop(transformers.TrainerCallback):
        def on_substep_end(self, args, state, control, **_):
            control.should_training_stop = True

    options = {"gradient_accumulation_steps": 2, "save_strategy": "epoch"}
    made = trainer(tmp_path, threshold=math.inf, **options)
    made.add_callback(Stop())
    made.train()
    assert made.args.max_grad_norm == 0.5
    (saved,) = tmp_path.glob("checkpoint-*/training_args.bin")
    assert torch.load(saved, weights_only=False).max_grad_norm == 0.5


def test_replicas_are_refused(tmp_path):
    """nn.DataParallel, in which a Trainer wraps a model that sees several GPUs, is refused."""
    made = trainer(tmp_path, threshold=math.inf)
    made.args._n_gpu = 2
    callback = next(c for c in made.callback_handler.callbacks if isinstance(c, DGGCallback))
    with pytest.raises(ValueError, match="args: expected a GPU a process, got 2 in DataParallel"):
        callback.on_train_begin(made.args, made.state, made.control, optimizer=None)
