"""The trainers on a GPU that is not there: `TRITON_INTERPRET=1 pytest ...`.

The same run on the CPU is the oracle: other kernels of the head, the same numbers. What only a
device shows (a tensor that was left on the host) ends the run with an error.
"""

from __future__ import annotations

import json
import shutil
from contextlib import nullcontext
from dataclasses import replace
from functools import partial

import pytest
import tiny_models
import torch
from pretend_gpu import REHEARSAL, pretended_gpu
from trainer_toys import TINY, Digits, Echo
from transformers import LlamaConfig, LlamaForCausalLM
from triton_tools import interpreting

from dgg_kernels.integrations.transformers import patch_lm_head
from python_trainer.loop import Progress, prepare, train

if not interpreting():
    pytest.skip("needs TRITON_INTERPRET=1", allow_module_level=True)


def on(device):
    return pretended_gpu() if device == "cuda" else nullcontext()


def assert_same_rows(got, expected, but):
    """To fp32 rounding; NaN equals NaN."""
    assert len(got) == len(expected)
    for mine, theirs in zip(got, expected, strict=True):
        assert mine.keys() == theirs.keys()
        for name in mine.keys() - but:
            same = mine[name] == theirs[name]
            if isinstance(mine[name], float):
                same = mine[name] == pytest.approx(theirs[name], rel=1e-3, abs=1e-6, nan_ok=True)
            assert same, f"{name}: expected {theirs[name]}, got {mine[name]}"


# -- python_trainer -------------------------------------------------------------------------------

ARMS = {
    "dgg": {"max_grad_norm": 0.1, "micro_batch_size": 8},
    "gain": {"gate": "gain", "gate_window": 2, "gate_threshold": 0.0, "beta": 0.1},
    "kl": {"gate": "kl", "kl_stop": 0.02, "mini_batches": 2, "loss_type": "gspo"},
    "zclip": {"gate": "zclip", "gradient_checkpointing": True},
}


SHORT = replace(TINY, grad_eps=0.0, rollout_batches=2, warmup_max_steps=2, eval_prompts=4)


def run(folder, device, task=Digits, tick=lambda progress: None, **options):
    config = replace(SHORT, device=device, **options)
    with on(device) as gpu:
        train(config, prepare(config, task()), folder, Progress(), tick)
    return gpu


def rows(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    "arm", ["dgg", "gain", *(pytest.param(a, marks=REHEARSAL) for a in ("kl", "zclip"))]
)
def test_python_trainer_trains_as_on_the_cpu(arm, tmp_path):
    task = Echo if arm == "gain" else Digits
    start = partial(run, task=task, **ARMS[arm])
    gpu = start(tmp_path / "cuda", "cuda")
    start(tmp_path / "cpu", "cpu")
    assert gpu.launches["scan_kernel"] > 12 and gpu.launches["dlogits_kernel"] > 2
    assert_same_rows(rows(tmp_path / "cuda"), rows(tmp_path / "cpu"), {"seconds"})


def test_python_trainer_resumes_as_if_it_had_not_stopped(tmp_path):
    class Stopped(Exception):
        pass

    def stop(progress):
        if progress.rollouts == 1:
            raise Stopped

    start = partial(run, device="cuda", save_every=3)
    start(tmp_path / "whole")
    with pytest.raises(Stopped):
        start(tmp_path / "halves", tick=stop)
    start(tmp_path / "halves")
    assert_same_rows(rows(tmp_path / "halves"), rows(tmp_path / "whole"), {"seconds"})


# -- a model on two devices -----------------------------------------------------------------------


@pytest.mark.parametrize("tied", [False, True])
def test_a_model_that_lies_on_two_devices(tied):
    """As `device_map` lays it out, the final norm and an untied head on the second."""
    hooks = pytest.importorskip("accelerate").hooks
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2, tie_word_embeddings=tied,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    ids = torch.randint(0, 64, (2, 6))
    found = []
    for device in ("cpu", "cuda"):
        with on(device), torch.no_grad():  # the backward of a move is torch's
            first = (model.model.embed_tokens, *model.model.layers, model.model.rotary_emb)
            for module in (*first, model.model.norm, model.lm_head):
                there = "cpu" if module in first or (tied and module is model.lm_head) else device
                hooks.add_hook_to_module(module, hooks.AlignDevicesHook(execution_device=there))
                module.to(there)
            whole = hooks.AlignDevicesHook(execution_device="cpu", io_same_device=True)
            hooks.add_hook_to_module(model, whole)
            with patch_lm_head(model):
                out = model(input_ids=ids, labels=ids, num_items_in_batch=torch.tensor(10))
                again = model(input_ids=ids, labels=ids, lse_ref=out.lse)
        assert all(t.device == ids.device for t in (*out.values(), *again.values()))
        torch.testing.assert_close(again.log_probs, out.log_probs)
        found.append(out)
    torch.testing.assert_close(found[1].loss, found[0].loss)
    torch.testing.assert_close(found[1].entropy, found[0].entropy)


# -- TRL ------------------------------------------------------------------------------------------

TRL = {
    "dgg": {"gate": "EAGER", "gradient_accumulation_steps": 2, "tied": True},
    "gain": {"gate": "GAIN", "beta": 0.1, "gradient_checkpointing": True},
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("of", TRL)
def test_trls_trainer_trains_as_on_the_cpu(of, tmp_path):
    """With DGGTrainer on a GPU, too: what waits there is another matter."""
    pytest.importorskip("trl")
    import test_integration_trl as toys

    options = dict(TRL[of])
    gate, tied = getattr(toys, options.pop("gate")), options.pop("tied", False)
    gate = replace(gate, window=2)
    tiny_models.save_speller(tmp_path, tied)
    logs = {}
    for device in ("cuda", "cpu"):
        start = partial(
            toys.gated, tmp_path, tmp_path / "out", gate, use_cpu=device == "cpu", max_steps=6,
            save_strategy="steps", save_steps=3, **options,
        )  # fmt: skip
        with on(device) as gpu:
            whole = start().train().rows
            resumed = start().train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-3"))
            assert whole[-1]["updates_applied"] < len(whole) == 6, "the gate did not shut"
            assert_same_rows(resumed.rows, whole, {"step_time"})
        assert gpu is None or gpu.launches["scan_kernel"] > 12
        logs[device] = whole
        shutil.rmtree(tmp_path / "out")
    assert_same_rows(logs["cuda"], logs["cpu"], {"step_time"})
