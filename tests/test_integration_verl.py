"""The gate in verl's FSDP engine and worker, on the CPU over gloo, with random tiny models.

A docstring of a test is a line of the compatibility table (test_integration_table.py).

verl wants an older transformers than this project does, and therefore an environment of its own
(skipped without it):

    python3.11 -m venv verl-env
    verl-env/bin/pip install -r tests/integrations/verl.txt
    verl-env/bin/pip install --no-deps --no-build-isolation -e .
    OMP_NUM_THREADS=1 verl-env/bin/python -m pytest tests/test_integration_verl.py

verl knows no CPU: a platform is put in its place that stands for one, and the functions for packing
rows that it has for NPUs in place of flash-attn's. Nothing else of it is replaced.
"""

from __future__ import annotations

import importlib
import math
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from dgg_kernels import GateConfig, replay

verl = pytest.importorskip("verl")

from verl.plugin.platform.platform_cuda import PlatformCUDA  # noqa: E402
from verl.plugin.platform.platform_manager import set_platform  # noqa: E402


class PlatformCPU(PlatformCUDA):
    device_name = vendor_name = "cpu"
    device_module = SimpleNamespace(
        is_available=lambda: False,
        empty_cache=lambda: None,
        get_device_name=lambda: "CPU",
        mem_get_info=lambda: (0, 0),
        get_rng_state=torch.get_rng_state,
        set_rng_state=torch.set_rng_state,
        **dict.fromkeys(
            ["memory_allocated", "memory_reserved", "max_memory_allocated", "max_memory_reserved"],
            lambda: 0,
        ),
    )

    def is_available(self):
        return True

    def current_device(self):
        return torch.device("cpu")

    def communication_backend_name(self):
        return "gloo"

    def empty_cache(self):
        pass


set_platform(PlatformCPU())

from tensordict import TensorDict  # noqa: E402
from transformers import Qwen2Config, Qwen2ForCausalLM  # noqa: E402
from verl.trainer.config import CheckpointConfig  # noqa: E402
from verl.utils import attention_utils, npu_flash_attn_utils  # noqa: E402
from verl.utils import tensordict_utils as tu  # noqa: E402
from verl.utils.torch_functional import entropy_from_logits, logprobs_from_logits  # noqa: E402
from verl.workers.config import (  # noqa: E402
    ActorConfig,
    FSDPEngineConfig,
    FSDPOptimizerConfig,
    HFModelConfig,
    TrainingWorkerConfig,
)
from verl.workers.engine.fsdp.transformer_impl import FSDPEngineWithLMHead  # noqa: E402
from verl.workers.engine_workers import ActorRolloutRefWorker, TrainingWorker  # noqa: E402
from verl.workers.utils.losses import ppo_loss  # noqa: E402
from verl.workers.utils.padding import left_right_2_no_padding  # noqa: E402

from dgg_kernels.integrations import verl_head  # noqa: E402
from dgg_kernels.integrations.verl import (  # noqa: E402
    DGGEngine,
    DGGEngineConfig,
    DGGTrainingWorker,
)
from dgg_kernels.integrations.verl_head import (  # noqa: E402
    linear_cross_entropy,
    use_linear_cross_entropy,
)

attention_utils._get_attention_functions = lambda: tuple(
    getattr(npu_flash_attn_utils, name)
    for name in ("index_first_axis", "pad_input", "rearrange", "unpad_input")
)

V, D = 40, 16
NEVER = {"threshold": math.inf, "window": 4}
EAGER = {"threshold": 0.0, "window": 4}  # acts after four increments; shuts every second time
GAIN = {**EAGER, "energy": "loss"}
AT_ONCE = {"use_no_sync_for_gradient_accumulation": False}  # the default of verl's command line
FP32 = {"param_dtype": "fp32", "reduce_dtype": "fp32", "buffer_dtype": "fp32"}
ENVIRONMENT = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"} | dict.fromkeys(
    ["RANK", "LOCAL_RANK"], "0"
)


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    """Folders of tiny models, tied and untied; one process that is a group of its own."""
    found = {tied: save_model(tmp_path_factory.mktemp("model"), tied) for tied in (True, False)}
    os.environ |= ENVIRONMENT | dict.fromkeys(["WORLD_SIZE", "LOCAL_WORLD_SIZE"], "1")
    store = tmp_path_factory.mktemp("store") / "store"
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    yield found
    dist.destroy_process_group()


@pytest.fixture(autouse=True)
def own_forward():
    """verl's fused kernels replace the forward of the model's class."""
    forward = Qwen2ForCausalLM.forward
    yield
    Qwen2ForCausalLM.forward = forward


def save_model(folder, tied):
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=V, hidden_size=D, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=64,
        tie_word_embeddings=tied, pad_token_id=0, bos_token_id=None, eos_token_id=1,
    )  # fmt: skip
    model = Qwen2ForCausalLM(config)
    torch.nn.init.normal_(model.lm_head.weight, std=0.05 if tied else 0.3)
    model.save_pretrained(folder)
    return folder


class Run:
    """A worker of verl's, and what its engine did: energies, shuts, bits around each step."""

    def __init__(
        self,
        path,
        gate=NEVER,
        *,
        fused=False,
        optimizer={"fused": True},  # noqa: B006
        micro=8,
        lora=0,
        stock=False,
        **options,
    ):
        model = HFModelConfig(
            path=str(path), load_tokenizer=False, enable_gradient_checkpointing=False,
            override_config={"attn_implementation": "sdpa"}, lora_rank=lora,
            use_fused_kernels=fused, fused_kernel_options={"impl_backend": "triton"},
        )  # fmt: skip
        if not stock:
            options = {"gate": gate, "head": {"grad_eps": 0.0}, **options}
        engine = (FSDPEngineConfig if stock else DGGEngineConfig)(**{
            "strategy": "fsdp2", "use_dynamic_bsz": False, "use_torch_compile": False,
            "micro_batch_size_per_gpu": micro, "infer_micro_batch_size_per_gpu": 8,
            "mixed_precision": FP32, **options,
        })  # fmt: skip
        self.worker = (TrainingWorker if stock else DGGTrainingWorker)(
            TrainingWorkerConfig(
                model_type="language_model",
                model_config=model,
                engine_config=engine,
                # Of gradients that are 0 but for rounding Adam would make whole steps.
                optimizer_config=FSDPOptimizerConfig(
                    lr=3e-3, weight_decay=0.1, clip_grad=0.1, lr_scheduler_type="cosine",
                    total_training_steps=20,
                    override_optimizer_config={"eps": 1e-3, **optimizer},
                ),
                checkpoint_config=CheckpointConfig(),
            )
        )  # fmt: skip
        self.engine = self.worker.engine
        self.worker.reset()
        config = ActorConfig(
            strategy="fsdp2", rollout_n=1, ppo_micro_batch_size_per_gpu=8, entropy_coeff=0.01
        )
        self.worker.set_loss_fn(partial(ppo_loss, config=config))
        self.steps = []
        step = self.engine.optimizer_step

        def noted():
            before = self.bits()
            norm = step()
            self.steps.append((before, self.bits()))
            return norm

        self.engine.optimizer_step = noted

    def bits(self):
        """Weights, moments and step counters, as this rank holds them."""
        state = self.engine.optimizer.state
        kept = [*self.engine.module.parameters(), *(t for s in state.values() for t in s.values())]
        return [getattr(t, "to_local", lambda t=t: t)().detach().clone() for t in kept]

    def weights(self):
        return {
            name: getattr(p, "full_tensor", lambda p=p: p)().detach().clone()
            for name, p in self.engine.module.named_parameters()
        }

    def train(self, batches, **options):
        """Metrics of each batch, for `batches` of them."""
        return [tu.get(self.worker.train_mini_batch(batch(i, **options)), "metrics")
                for i in batches]  # fmt: skip

    def log_probs(self):
        data = batch(99)
        tu.assign_non_tensor(data, compute_loss=False)
        return self.worker.infer_batch(data)["log_probs"].values()


def batch(seed, mini=8, epochs=4, **tensors):
    """Eight rollouts as verl's trainer hands them to the actor; of these, this rank's share."""
    generator = torch.Generator().manual_seed(seed)
    n, prompt, response = 8, 4, 6

    def tokens(length):
        return torch.randint(2, V, (n, length), generator=generator)

    lengths = torch.randint(2, response + 1, (n,), generator=generator)
    mask = (torch.arange(response) < lengths[:, None]).long()
    padding = torch.ones(n, prompt, dtype=torch.long)
    padding[::2, 0] = 0
    attention = torch.cat([padding, mask], 1)
    prompts, responses = tokens(prompt), tokens(response)
    data = {
        "prompts": prompts,
        "responses": responses,
        "input_ids": torch.cat([prompts, responses], 1),
        "attention_mask": attention,
        "position_ids": (attention.cumsum(1) - 1).clamp(min=0),
        "response_mask": mask,
        "old_log_probs": -3.7 + 0.1 * torch.randn(n, response, generator=generator),
        "advantages": torch.randn(n, 1, generator=generator).expand(n, response).clone(),
        **tensors,
    }
    share = n // dist.get_world_size()
    mine = slice(share * dist.get_rank(), share * (dist.get_rank() + 1))
    data = TensorDict({name: t[mine] for name, t in data.items()}, batch_size=share)
    data = left_right_2_no_padding(data)
    tu.assign_non_tensor(
        data, temperature=0.8, calculate_entropy=True, global_batch_size=mini,
        mini_batch_size=mini, epochs=epochs, seed=42, dataloader_kwargs={"shuffle": False},
        compute_loss=True,
    )  # fmt: skip
    return data


def same_bits(one, two):
    # Weights come first: before the first step there are no moments yet.
    return all(a.equal(b) for a, b in zip(one, two, strict=False))


def assert_close(ours, theirs, **tolerance):
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        torch.testing.assert_close(value, theirs[name], msg=lambda m, n=name: f"{n}: {m}",
                                   **(tolerance or {"rtol": 1e-4, "atol": 2e-6}))  # fmt: skip


@pytest.fixture
def stock(monkeypatch):
    """A run of verl's own engine, which the registry finds where no vendor is known."""

    def run(*args, **options):
        with monkeypatch.context() as patch:
            patch.setenv("VERL_ENGINE_DEVICE", "cuda")
            patch.setenv("VERL_ENGINE_VENDOR", "unknown")
            made = Run(*args, stock=True, **options)
        assert type(made.engine) is FSDPEngineWithLMHead
        return made

    return run


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_the_head_has_verls_signature(reduction):
    """`linear_cross_entropy`: log-probs, entropies and gradients of verl's own functions."""
    torch.manual_seed(0)
    hidden = torch.randn(1, 9, D, requires_grad=True)
    weight = torch.randn(V, D, requires_grad=True)
    labels = torch.randint(0, V, (1, 9))
    logits = (hidden @ weight.T)[0] / 0.7
    logp = logprobs_from_logits(logits, labels[0], inplace_backward=False)
    logp = logp if reduction == "none" else getattr(logp, reduction)()
    expected = [logp, entropy_from_logits(logits)]
    got = linear_cross_entropy(hidden, weight, labels, 0.7, reduction)
    grads = [torch.randn_like(e) for e in expected]
    torch.testing.assert_close(list(got), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        torch.autograd.grad(got, (hidden, weight), grads),
        torch.autograd.grad(expected, (hidden, weight), grads),
        rtol=1e-4,
        atol=1e-5,
    )
    with pytest.raises(ValueError, match="reduction: expected"):
        linear_cross_entropy(hidden, weight, labels, 0.7, "max")


def test_the_head_is_put_in_place_and_taken_out_again():
    """The head in place of verl's for callers of `verl.utils.kernel`, and undone."""
    theirs = importlib.import_module("verl.utils.kernel.linear_cross_entropy")
    before = theirs.linear_cross_entropy
    hidden, weight, labels = torch.randn(3, D), torch.randn(V, D), torch.arange(3)
    with use_linear_cross_entropy(grad_eps=0.0):
        logp, _ = theirs.linear_cross_entropy(hidden, weight, labels, 1.0, "none")
        assert logp.equal(linear_cross_entropy(hidden, weight, labels)[0])
    assert theirs.linear_cross_entropy is before
    use_linear_cross_entropy().close()
    assert theirs.linear_cross_entropy is before


@pytest.mark.parametrize(
    "tied, fused, micro, optimizer",
    [
        (False, False, 4, {"fused": True}),
        (True, False, 2, {"fused": True}),
        (False, True, 2, {"fused": True}),
        (True, True, 4, {"fused": True}),
        (False, False, 4, {}),
    ],
    ids=["untied", "tied-micro", "untied-head-micro", "tied-head", "host_gate"],
)
def test_a_gate_that_never_shuts_gives_verls_own_step(paths, stock, tied, fused, micro, optimizer):
    """With a gate that never shuts, verl's own losses, norms and weights (FSDP2): tied, untied, \
micro-batches, several mini-batches, the fused head, another optimizer with `host_gate`."""
    theirs = stock(paths[tied], micro=micro)
    expected = theirs.train(range(3), mini=4, epochs=2)
    ours = Run(paths[tied], fused=fused, micro=micro, optimizer=optimizer, host_gate=not optimizer)
    assert type(ours.engine) is DGGEngine
    got = ours.train(range(3), mini=4, epochs=2)
    for mine, other in zip(got, expected, strict=True):
        assert len(mine["loss"]) == 4 and len(mine["lr"]) == 1
        for name in ("loss", "grad_norm", "lr", "actor/entropy_loss"):
            assert mine[name] == pytest.approx(other[name], rel=1e-4, abs=1e-6), name
    assert_close(ours.weights(), theirs.weights())
    assert not same_bits(*ours.steps[0])


@pytest.mark.parametrize("gate", [EAGER, GAIN], ids=["norm", "loss"])
@pytest.mark.parametrize("tied, fused", [(False, False), (True, True)])
def test_a_shut_gate_changes_nothing_and_ends_the_reuse(paths, tied, fused, gate):
    """The gate, on the head's gradient or on the loss, shuts as `replay` says: that step leaves \
weights and moments as they were, the rest of the batch is left out, the learning rate steps once; \
metrics in verl's."""
    run = Run(paths[tied], gate, fused=fused, micro=4)
    rates = []
    logs = []
    for i in range(8):
        logs += run.train([i])
        rates.append(run.engine.lr_scheduler.last_epoch)
    assert rates == list(range(1, 9))
    assert all(len(log["lr"]) == 1 for log in logs)
    energies = [log["gate/energy"] for log in logs]
    assert all(energy > 0 for log in energies for energy in log)
    signals = [log["loss"] for log in logs] if gate is GAIN else energies
    decisions = replay(signals, GateConfig(**gate))
    shuts = [log["gate/shut"] for log in logs]
    assert shuts == [[d.shut for d in batch] for batch in decisions]
    assert any(len(s) < 4 for s in shuts) and any(s == [0] * 4 for s in shuts)
    assert all(not any(s[:-1]) for s in shuts), "nothing is done after the gate shut"
    assert [log["gate/reuse"] for log in logs] == [list(range(1, len(s) + 1)) for s in shuts]
    assert all(z == z for log in logs for z in log.get("gate/z", []))
    flat = [shut for s in shuts for shut in s]
    for shut, (before, after) in zip(flat, run.steps, strict=True):
        assert same_bits(before, after) == bool(shut)


def test_each_use_gives_the_head_the_log_sum_exps_of_the_last_one(paths, monkeypatch):
    """The fused head gets each token's log-sum-exp of the last use: several mini-batches, \
micro-batches; not where an epoch shuffles them."""
    calls, own = [], verl_head.linear_logprob

    def noted(hidden, weight, target, *, lse_ref=None, **options):
        out = own(hidden, weight, target, lse_ref=lse_ref, **options)
        calls.append((target, lse_ref, out.lse))
        return out

    monkeypatch.setattr(verl_head, "linear_logprob", noted)
    run = Run(paths[False], fused=True, micro=2)
    run.train([0, 0], mini=4, epochs=3)  # alike in shape: none is taken for the other's
    assert len(calls) == 2 * 3 * 4
    for batch_of in (calls[:12], calls[12:]):
        assert all(known is None for _, known, _ in batch_of[:4])
        for before, now in zip(batch_of, batch_of[4:], strict=False):
            assert now[0].equal(before[0]) and now[1].equal(before[2])
            assert not now[2].equal(before[2])
    calls.clear()
    run.log_probs()
    data = batch(2, mini=8, epochs=3)
    tu.assign_non_tensor(data, dataloader_kwargs={"shuffle": True})
    shuffled = Run(paths[False], fused=True, micro=2)
    shuffled.worker.train_mini_batch(data)
    assert len(calls) == 1 + 12 and all(known is None for _, known, _ in calls)


def test_mini_batches_are_compared_with_themselves(paths):
    """Several mini-batches an epoch: each is compared with its own last use; shuffling them anew \
is refused."""
    run = Run(paths[False], micro=2)
    (log,) = run.train([0], mini=2, epochs=2)
    energies = log["gate/energy"]
    assert log["gate/reuse"] == [1] * 4 + [2] * 4
    assert log["gate/increment"] == pytest.approx(
        [b - a for a, b in zip(energies[:4], energies[4:], strict=True)]
    )
    data = batch(1, mini=2)
    tu.assign_non_tensor(data, dataloader_kwargs={"shuffle": True})
    with pytest.raises(ValueError, match="shuffle: expected False"):
        run.worker.train_mini_batch(data)
    with pytest.raises(ValueError, match="epochs, mini_batches: expected"):
        run.train([1], mini=4)
    with pytest.warns(UserWarning, match="ppo_epochs: 1, verl's default, uses each rollout once"):
        Run(paths[False], EAGER).train([0], epochs=1)


def test_a_gradient_that_is_not_finite_is_not_applied(paths):
    """A NaN gradient shuts the gate, and the next batch trains on."""
    run = Run(paths[False])
    (log,) = run.train([0], advantages=torch.full((8, 6), math.nan))
    assert log["gate/shut"] == [1] and math.isnan(log["gate/energy"][0])
    assert same_bits(*run.steps[0])
    (log,) = run.train([1])
    assert log["gate/shut"] == [0] * 4 and not same_bits(*run.steps[-1])


def test_log_probs_between_updates_are_not_those_of_a_shut_gate(paths, stock):
    """`compute_log_prob` while the gate is shut, with the fused head."""
    expected = stock(paths[True]).log_probs()
    run = Run(paths[True], fused=True)
    run.train([0], advantages=torch.full((8, 6), math.nan))
    assert run.engine.gate.is_shut(wait=True)
    torch.testing.assert_close(run.log_probs(), expected, rtol=1e-4, atol=1e-4)


def test_lora_the_gate_sees_the_frozen_head(paths):
    """LoRA: the gate sees the frozen head, through the fused kernels alone."""
    options = {"fused": True, "micro": 4}
    whole = Run(paths[False], **options).train([0])
    run = Run(paths[False], lora=2, **options)
    log = run.train([0])
    assert log[0]["gate/energy"][0] == pytest.approx(whole[0]["gate/energy"][0], rel=1e-5)
    assert not same_bits(*run.steps[0])
    with pytest.raises(ValueError, match="use_fused_kernels: expected True"):
        Run(paths[False], lora=2)


def test_bf16_with_weights_in_fp32(paths):
    """bf16 compute with fp32 weights, with and without the fused head."""
    first = Run(paths[False]).train([0])[0]["gate/energy"][0]  # later ones: other weights
    for fused in (False, True):
        run = Run(paths[False], fused=fused, mixed_precision={**FP32, "param_dtype": "bf16"})
        assert run.train([0])[0]["gate/energy"][0] == pytest.approx(first, rel=0.02)
        assert not same_bits(*run.steps[0])


@pytest.mark.parametrize("gate", [EAGER, GAIN], ids=["norm", "loss"])
def test_a_resumed_run_is_the_uninterrupted_one(paths, gate, tmp_path):
    """A checkpoint holds the gate: a resumed run has the same bits."""
    whole = Run(paths[True], gate)
    expected = whole.train(range(8))
    first = Run(paths[True], gate)
    first.train(range(4))
    first.worker.save_checkpoint(str(tmp_path / "one"))
    second = Run(paths[True], gate)
    second.worker.load_checkpoint(str(tmp_path / "one"))
    second.worker.save_checkpoint(str(tmp_path / "two"))  # before it has built its gate
    third = Run(paths[True], gate)
    third.train([0])
    third.worker.load_checkpoint(str(tmp_path / "two"))
    for run in (second, third):
        got = run.train(range(4, 8))
        assert [log["gate/shut"] for log in got] == [log["gate/shut"] for log in expected[4:]]
        assert [log["loss"] for log in got] == [log["loss"] for log in expected[4:]]
        assert same_bits(run.bits(), whole.bits())
    assert any(1 in log["gate/shut"] for log in expected[4:])


def test_configuration_in_verls_style(paths):
    """Keys of verl's command line: `actor.fsdp_config._target_`, `.gate`, `.head`."""
    from hydra import compose, initialize_config_module
    from verl.utils.config import omega_conf_to_dataclass

    actor = "actor_rollout_ref.actor"
    with initialize_config_module("verl.trainer.config", version_base=None):
        config = compose("ppo_trainer", [
            f"{actor}.strategy=fsdp2",
            f"{actor}.ppo_micro_batch_size_per_gpu=8",
            f"{actor}.optim.override_optimizer_config={{fused: true}}",
            f"{actor}.fsdp_config._target_=dgg_kernels.integrations.verl.DGGEngineConfig",
            f"+{actor}.fsdp_config.gate.threshold=0.3",
            f"+{actor}.fsdp_config.gate.window=16",
            f"+{actor}.fsdp_config.head.grad_eps=0.0",
        ])  # fmt: skip
    made = omega_conf_to_dataclass(config.actor_rollout_ref.actor)
    assert isinstance(made.engine, DGGEngineConfig) and made.engine.strategy == "fsdp2"
    assert made.engine.gate == {"threshold": 0.3, "window": 16}
    assert made.engine.head == {"grad_eps": 0.0}
    assert made.optim.override_optimizer_config == {"fused": True}
    assert ActorRolloutRefWorker.actor_worker_cls is DGGTrainingWorker
    assert DGGEngineConfig(gate=None, head=None).head is None
    with pytest.raises(ValueError, match="gate: expected no max_reuse"):
        DGGEngineConfig(gate={"max_reuse": 4})
    with pytest.raises(TypeError, match="treshold"):
        DGGEngineConfig(gate={"treshold": 0.5})
    with pytest.raises(TypeError, match="head: expected grad_eps and screen alone, got grad_epss"):
        DGGEngineConfig(head={"grad_epss": 0.5})


def test_what_is_not_covered_is_refused(paths, monkeypatch):
    """FSDP1, CPUOffloadPolicy, fp16, an optimizer that cannot skip, and an engine that would not \
read the gate's settings, are refused by name."""
    for options in ({"strategy": "fsdp"}, {"offload_policy": True},
                    {"mixed_precision": {"param_dtype": "fp16"}}):  # fmt: skip
        with pytest.raises(ValueError, match=next(iter(options))):
            Run(paths[False], **options)
    run = Run(paths[False], optimizer={})
    with pytest.raises(TypeError, match=r"override_optimizer_config=\{fused: true\}"):
        run.train([0])
    assert Run(paths[False], None, optimizer={}).train([0])[0]["loss"]  # without a gate: any
    monkeypatch.setenv("VERL_ENGINE_DEVICE", "cuda")
    monkeypatch.setenv("VERL_ENGINE_VENDOR", "unknown")
    with pytest.raises(ValueError, match=r"strategy: expected 'fsdp2'.* FSDPEngineWithLMHead"):
        Run(paths[False])
    with pytest.raises(ValueError, match="'fsdp_turbo', for FSDPTurboEngineWithLMHead"):
        Run(paths[False], strategy="fsdp_turbo")


def test_two_processes_decide_alike(paths, stock, tmp_path):
    """Two processes (FSDP2, gloo): one process's decisions and weights, tied and untied, with \
and without the fused head, on the loss, sharded or replicated (`fsdp_size`), micro-batches \
reduced at once or together; a vocabulary in two parts; a resume from a disk of each node's own."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    folders = [str(paths[True]), str(paths[False])]
    done = subprocess.run(
        [*launch, __file__, *folders, str(tmp_path)], capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stderr[-3000:]
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1)]
    for tied, gate, cases in (
        (True, EAGER, ["tied head", "tied head, reduced at once"]),
        (False, EAGER, ["untied head", "untied replicated", "untied head, reduced at once"]),
        (False, GAIN, ["untied head, loss"]),
    ):
        Qwen2ForCausalLM.forward = OWN_FORWARD
        alone = Run(paths[tied], gate, fused=True)
        logs = alone.train(range(6))
        for case in cases:
            one, two = (rank[case] for rank in ranks)
            assert one["shut"] == two["shut"] == [log["gate/shut"] for log in logs]
            for mine, log in zip(one["energy"], logs, strict=True):
                assert mine == pytest.approx(log["gate/energy"], rel=1e-3)
            assert_close(one["weights"], alone.weights(), rtol=1e-3, atol=1e-5)
            assert same_bits(one["weights"].values(), two["weights"].values())
        assert any(1 in log["gate/shut"] for log in logs)
    hidden, weight, labels = head_inputs()
    logp, entropy = linear_cross_entropy(hidden, weight, labels, 0.7)
    (logp.sum() + entropy.square().sum()).backward()
    for i, rank in enumerate(ranks):
        torch.testing.assert_close(rank["head"][:2], [logp, entropy], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(rank["head"][2], hidden.grad, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(rank["head"][3], weight.grad.chunk(2)[i], rtol=1e-4, atol=1e-5)
        whole, resumed = rank["resumed"]
        assert whole == resumed == ranks[0]["resumed"][0] and any(1 in shut for shut in whole)


OWN_FORWARD = Qwen2ForCausalLM.forward


def head_inputs():
    torch.manual_seed(1)
    hidden, weight = torch.randn(9, D).requires_grad_(), torch.randn(V, D).requires_grad_()
    return hidden, weight, torch.randint(0, V, (9,))


def on_one_of_two(tied_path, untied_path, folder):
    dist.init_process_group("gloo")
    kept = {}
    for case, path, gate, options in (
        ("tied head", tied_path, EAGER, {"fused": True}),
        ("untied head", untied_path, EAGER, {"fused": True}),
        ("untied head, loss", untied_path, GAIN, {"fused": True}),
        ("untied replicated", untied_path, EAGER, {"fsdp_size": 1}),
        ("untied head, reduced at once", untied_path, EAGER, {"fused": True, **AT_ONCE}),
        ("tied head, reduced at once", tied_path, EAGER, {"fused": True, **AT_ONCE}),
    ):
        Qwen2ForCausalLM.forward = OWN_FORWARD
        run = Run(path, gate, micro=2, **options)
        logs = run.train(range(6))
        kept[case] = {
            "shut": [[float(x) for x in log["gate/shut"]] for log in logs],
            "energy": [[float(x) for x in log["gate/energy"]] for log in logs],
            "weights": run.weights(),
        }
    disk = Path(folder) / f"node{dist.get_rank()}"
    Qwen2ForCausalLM.forward = OWN_FORWARD
    first, second = (Run(untied_path, EAGER, micro=2) for _ in range(2))
    first.train(range(4))
    first.worker.save_checkpoint(str(disk))
    second.worker.load_checkpoint(str(disk))
    kept["resumed"] = [
        [[float(x) for x in log["gate/shut"]] for log in run.train(range(4, 7))]
        for run in (first, second)
    ]
    hidden, weight, labels = head_inputs()
    part = weight.detach().chunk(2)[dist.get_rank()].clone().requires_grad_()
    logp, entropy = linear_cross_entropy(hidden, part, labels, 0.7, "none", dist.group.WORLD)
    (logp.sum() + entropy.square().sum()).backward()
    dist.all_reduce(hidden.grad)  # Megatron's regions do it
    kept["head"] = [logp.detach(), entropy.detach(), hidden.grad, part.grad]
    torch.save(kept, Path(folder) / f"{dist.get_rank()}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    on_one_of_two(*sys.argv[1:])
