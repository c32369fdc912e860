"""The gate over ranks: energy of the reduced gradient, flag and state the same bits everywhere."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from distributed_gate import SAVED
from torch.distributed.fsdp import fully_shard

from dgg_kernels import GateConfig, GradientGate

SCRIPT = Path(__file__).parent / "distributed_gate.py"


def launch(ranks: int | None, script: Path, *args: str) -> None:
    """Run a script in so many ranks, or (None) in one process without any."""
    ranked = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    command = [sys.executable, *(ranked if ranks else []), str(script), *args]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=180)
    assert done.returncode == 0, done.stderr[-3000:]


def run(kind: str, ranks: int, folder: Path, *checkpoint: str) -> list[dict]:
    """Results of every rank."""
    launch(None if kind == "alone" else ranks, SCRIPT, kind, str(folder / kind), *checkpoint)
    return [json.loads((folder / f"{kind}.{rank}.json").read_text()) for rank in range(ranks)]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    return run("alone", 1, tmp_path_factory.mktemp("alone"))[0]


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    """Results of DDP on two ranks, and the checkpoint that it left behind."""
    folder = tmp_path_factory.mktemp("two_ranks")
    return run("ddp", 2, folder), str(folder / "ddp.pt")


def floats(log: list[dict], name: str) -> list[float]:
    return [float.fromhex(row[name]) for row in log]


@pytest.mark.parametrize(("kind", "ranks"), [("ddp", 2), ("fsdp2", 2), ("ddp", 4), ("fsdp2", 4)])
def test_all_ranks_decide_alike_and_as_one_process_would(kind, ranks, alone, request, tmp_path):
    if (kind, ranks) == ("ddp", 2):
        results, _ = request.getfixturevalue("two_ranks")
    else:
        results = run(kind, ranks, tmp_path)
    for other in results[1:]:
        # Bitwise: hexadecimal floats of energy, norm, flag and the whole state. The norm that the
        # test recomputes may be NaN, which is unequal to itself.
        for mine, theirs in zip(results[0]["log"], other["log"], strict=True):
            assert mine | {"norm": 0} == theirs | {"norm": 0}
        assert other["weights"] == results[0]["weights"]
    log = results[0]["log"]
    assert len(log) == len(alone["log"])
    flags = floats(log, "flag")
    assert flags == floats(alone["log"], "flag")
    assert 0 < sum(flags) < len(flags)
    for row, expected in zip(log, alone["log"], strict=True):
        energy = float.fromhex(row["energy"])
        assert math.isnan(energy) == math.isnan(float.fromhex(expected["energy"]))
        if math.isfinite(energy):
            assert energy == pytest.approx(row["norm"], rel=1e-6)
            assert energy == pytest.approx(float.fromhex(expected["energy"]), rel=1e-5)
    assert any(map(math.isnan, floats(log, "energy")))
    mine, theirs = (torch.tensor(r["weights"]) for r in (results[0], alone))
    torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


def test_a_checkpoint_of_two_ranks_resumes_on_two_four_and_one(two_ranks, tmp_path):
    """Two ranks go on with the same bits; other numbers of ranks take the same decisions."""
    results, checkpoint = two_ranks
    rest = [row for row in results[0]["log"] if row["batch"] >= SAVED]
    flags, energies = floats(rest, "flag"), floats(rest, "energy")
    assert 0 < sum(flags) < len(flags) and any(map(math.isnan, energies))
    for kind, ranks in (("ddp", 2), ("ddp", 4), ("alone", 1)):
        folder = tmp_path / str(ranks)
        folder.mkdir()
        resumed = run(kind, ranks, folder, checkpoint)
        for result in resumed:
            if ranks == 2:
                assert [row | {"norm": 0} for row in result["log"]] == [
                    row | {"norm": 0} for row in rest
                ]
                assert result["weights"] == results[0]["weights"]
            assert floats(result["log"], "flag") == flags
            assert floats(result["log"], "energy") == pytest.approx(energies, rel=1e-5, nan_ok=True)
            mine, theirs = (torch.tensor(r["weights"]) for r in (result, results[0]))
            torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("ranks", [2, 4])
def test_vocabulary_parallel_head(ranks):
    """Values, gradients and energy of a sharded head are those of the whole one."""
    launch(ranks, SCRIPT.with_name("distributed_vocab.py"))


def test_plain_and_sharded_gradients_are_clipped_by_one_norm(tmp_path):
    """FSDP2 leaves parameters plain that it is told to ignore."""
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Linear(3, 5))
        fully_shard(model, ignored_params={*model[0].parameters()})
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        gate = GradientGate(GateConfig(), model[0].weight)
        gate.attach(optimizer, max_grad_norm=1.0, host_gate=True)
        model(torch.ones(2, 4)).square().sum().backward()
        parts = [p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad
                 for p in model.parameters()]  # fmt: skip
        expected = torch.nn.utils.get_total_norm(parts)
        torch.testing.assert_close(gate.total_grad_norm(), expected)
        gate.new_batch()
        gate.decide(energy=torch.tensor(1.0))
        optimizer.step()
        torch.testing.assert_close(gate.total_grad_norm(), torch.tensor(1.0))
    finally:
        torch.distributed.destroy_process_group()
