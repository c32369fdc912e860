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

SCRIPT = Path(__file__).parent / "distributed_gate.py"


def launch(ranks: int | None, script: Path, *args: str) -> None:
    """Run a script in so many ranks, or (None) in one process without any."""
    ranked = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    command = [sys.executable, *(ranked if ranks else []), str(script), *args]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=180)
    assert done.returncode == 0, done.stderr[-3000:]


def run(kind: str, ranks: int, folder: Path) -> list[dict]:
    """Results of every rank."""
    launch(None if kind == "alone" else ranks, SCRIPT, kind, str(folder / kind))
    return [json.loads((folder / f"{kind}.{rank}.json").read_text()) for rank in range(ranks)]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    return run("alone", 1, tmp_path_factory.mktemp("alone"))[0]


@pytest.mark.parametrize(("kind", "ranks"), [("ddp", 2), ("fsdp2", 2), ("ddp", 4), ("fsdp2", 4)])
def test_all_ranks_decide_alike_and_as_one_process_would(kind, ranks, alone, tmp_path):
    results = run(kind, ranks, tmp_path)
    for other in results[1:]:
        # Bitwise: hexadecimal floats of energy, norm, flag and the whole state. The norm that the
        # test recomputes may be NaN, which is unequal to itself.
        for mine, theirs in zip(results[0]["log"], other["log"], strict=True):
            assert mine | {"norm": 0} == theirs | {"norm": 0}
        assert other["weights"] == results[0]["weights"]
    log = results[0]["log"]
    assert len(log) == len(alone["log"])
    flags = [float.fromhex(row["flag"]) for row in log]
    assert flags == [float.fromhex(row["flag"]) for row in alone["log"]]
    assert 0 < sum(flags) < len(flags)
    for row, expected in zip(log, alone["log"], strict=True):
        energy = float.fromhex(row["energy"])
        assert math.isnan(energy) == math.isnan(float.fromhex(expected["energy"]))
        if math.isfinite(energy):
            assert energy == pytest.approx(row["norm"], rel=1e-6)
            assert energy == pytest.approx(float.fromhex(expected["energy"]), rel=1e-5)
    assert any(math.isnan(float.fromhex(row["energy"])) for row in log)
    mine, theirs = (torch.tensor(r["weights"]) for r in (results[0], alone))
    torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("ranks", [2, 4])
def test_vocabulary_parallel_head(ranks):
    """Values, gradients and energy of a sharded head are those of the whole one."""
    launch(ranks, SCRIPT.with_name("distributed_vocab.py"))
