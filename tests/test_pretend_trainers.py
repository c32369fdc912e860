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
from pretend_gpu import REHEARSAL, pretended_gpu
from trainer_toys import TINY, Digits, Echo
from triton_tools import interpreting

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
