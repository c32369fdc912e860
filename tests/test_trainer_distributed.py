"""Two processes train what one does: DDP, FSDP2, and going on with another number of them."""

from __future__ import annotations

import math
import os
import subprocess
import sys
import types
from contextlib import nullcontext
from importlib.machinery import ModuleSpec
from pathlib import Path

import pytest
import torch
from trainer_toys import TINY, Digits, Fails

from python_trainer import checkpoint, trackers
from python_trainer.config import TaskError
from python_trainer.distributed import Ranks
from python_trainer.files import read_metrics
from python_trainer.loop import Progress, prepare, train

SCRIPT = Path(__file__).with_name("distributed_trainer.py")


def run(
    processes: int,
    parallel: str,
    out: Path,
    *updates: str,
    gate: str = "dgg",
    model: str = "embedded",
) -> None:
    command = [sys.executable]
    if processes > 1:
        command += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    paths = os.pathsep.join([str(SCRIPT.parent), str(SCRIPT.parent.parent)])
    subprocess.run(
        [*command, str(SCRIPT), parallel, str(out), gate, model, *updates], check=True, timeout=240,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths},
    )  # fmt: skip


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    out = tmp_path_factory.mktemp("alone")
    run(1, "ddp", out)
    return out


def weights(out: Path) -> torch.Tensor:
    state, complaints = checkpoint.load(out / "checkpoints")
    assert state is not None and not complaints
    named = {k: v for k, v in state.items() if k.startswith("model.")}
    return torch.cat([named[k].flatten().double() for k in sorted(named)])


def held_to(out: Path, alone: Path) -> None:
    """Same decisions, same rewards, weights to 1e-5."""
    rows, expected = (read_metrics(folder / "metrics.jsonl") for folder in (out, alone))
    assert len(rows) == len(expected)
    for row, other in zip(rows, expected, strict=True):
        for name in ("type", "rollouts", "sequences", "gate/shut", "gate/reuse"):
            assert row.get(name) == other.get(name)
        for name in ("reward", "accuracy", "turns", "loss", "kl", "entropy", "gate/energy",
                     "gate/chi2", "gate/chi2_lower_bound", "grad_norm", "learning_rate",
                     "dwd/lm_head", "dwd_total/middle"):  # fmt: skip
            if name in other:
                assert row[name] == pytest.approx(other[name], rel=1e-3, abs=1e-5, nan_ok=True)
    assert (weights(out) - weights(alone)).abs().max() < 1e-5


@pytest.mark.parametrize("parallel", ["ddp", "fsdp2"])
def test_two_processes_train_what_one_does(parallel, alone, tmp_path):
    run(2, parallel, tmp_path)
    held_to(tmp_path, alone)
    shut = [row["gate/shut"] for row in read_metrics(tmp_path / "metrics.jsonl")
            if row["type"] == "update"]  # fmt: skip
    assert any(shut) and not all(shut)


@pytest.mark.parametrize("parallel", ["ddp", "fsdp2"])
def test_a_tied_heads_own_gradient_is_scored_by_two_processes_too(parallel, tmp_path):
    """Not the embedding's with it; and one goes on with what two began."""
    run(1, "ddp", tmp_path / "a", model="Llama, tied")
    run(2, parallel, tmp_path / "b", "5", model="Llama, tied")
    run(1, "ddp", tmp_path / "b", model="Llama, tied")
    held_to(tmp_path / "b", tmp_path / "a")


def test_bfloat16_keeps_weights_in_fp32(alone, tmp_path):
    expected = next(r for r in read_metrics(alone / "metrics.jsonl") if r["type"] == "update")
    for processes, parallel in ((1, "ddp"), (2, "fsdp2")):
        out = tmp_path / parallel
        run(processes, parallel, out, model="embedded, bfloat16")
        first = next(r for r in read_metrics(out / "metrics.jsonl") if r["type"] == "update")
        assert first["gate/energy"] == pytest.approx(expected["gate/energy"], rel=0.2)
        kept = weights(out)
        assert (kept != kept.bfloat16()).double().mean() > 0.9


def test_a_backward_is_left_out_by_all_processes_or_none(tmp_path):
    """Under DDP, which waits for every gradient that it was told of; and so do collectives."""
    for processes in (1, 2):
        run(processes, "ddp", tmp_path / str(processes), gate="gain")
    held_to(tmp_path / "2", tmp_path / "1")
    rows = read_metrics(tmp_path / "2" / "metrics.jsonl")
    shut = [row for row in rows if row["type"] == "update" and row["gate/shut"]]
    assert shut and all(math.isnan(row["grad_norm"]) for row in shut)


def test_two_processes_go_on_where_one_stopped_and_the_other_way_round(alone, tmp_path):
    run(1, "ddp", tmp_path / "a", "5")
    run(2, "fsdp2", tmp_path / "a")
    held_to(tmp_path / "a", alone)
    run(2, "fsdp2", tmp_path / "b", "5")
    run(1, "ddp", tmp_path / "b")
    held_to(tmp_path / "b", alone)


@pytest.mark.parametrize(("device", "taken"), [("cpu", []), ("cuda", [3])])
def test_a_rank_takes_a_gpu_only_to_train_on_it(device, taken, monkeypatch):
    """There may be fewer GPUs than ranks that train on the CPU."""
    for name, value in {"WORLD_SIZE": "4", "RANK": "3", "LOCAL_RANK": "3"}.items():
        monkeypatch.setenv(name, value)
    found = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", found.append)
    backends = []
    monkeypatch.setattr(torch.distributed, "init_process_group", backends.append)
    assert Ranks(device).rank == 3 and found == taken
    assert backends == ["nccl" if taken else "gloo"]


def test_tensorboard_forgets_what_came_after_the_checkpoint(tmp_path, monkeypatch):
    """A resumed run logs it again."""
    made = []
    module = types.ModuleType("tensorboard")
    module.SummaryWriter = lambda folder, purge_step: made.append(purge_step)
    module.__spec__ = ModuleSpec("tensorboard", None)
    monkeypatch.setitem(sys.modules, "tensorboard", module)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    trackers.make(["tensorboard"], tmp_path)
    progress = Progress()
    train(TINY, prepare(TINY, Digits()), tmp_path, progress)
    trackers.make(["tensorboard"], tmp_path)
    assert made == [0, progress.updates_attempted + 1]


@pytest.mark.parametrize("task", [Digits, Fails])
def test_the_first_rank_alone_has_trackers_and_closes_them(task, tmp_path, monkeypatch):
    rows, ends = [], []
    wandb = types.ModuleType("wandb")
    wandb.__spec__ = ModuleSpec("wandb", None)
    run = types.SimpleNamespace(log=rows.append, finish=lambda: ends.append(len(rows)))
    monkeypatch.setattr(wandb, "init", lambda **_: run, raising=False)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.setenv("RANK", "1")
    assert trackers.make(["wandb"], tmp_path) == []
    monkeypatch.delenv("RANK")
    start = prepare(TINY, task())
    with nullcontext() if task is Digits else pytest.raises(TaskError):
        train(TINY, start, tmp_path, Progress(), mirrors=trackers.make(["wandb"], tmp_path))
    assert ends == [len(rows)] and len(rows) == len(read_metrics(tmp_path / "metrics.jsonl"))
    assert rows[0]["eval/accuracy"] >= 0.0
