"""Every example runs to its end and does what it says."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_models

ROOT = Path(__file__).parent.parent


def run(*command):
    done = subprocess.run(
        [sys.executable, *map(str, command)], capture_output=True, text=True, timeout=240,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "",
             "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_fsdp2_on_two_processes_learns():
    launch = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
    last = re.findall(r"even (\d+)%, ([\d.]+) uses", run(*launch, ROOT / "examples/fsdp2.py"))[-1]
    assert int(last[0]) > 85  # half of the vocabulary is even
    assert 1.0 < float(last[1]) < 4.0  # the gate shuts, not always


def test_trl_uses_a_batch_eight_times_and_draws_the_next(tmp_path):
    pytest.importorskip("trl", minversion="1.16")
    tiny_models.save_speller(tmp_path / "model", tied=True)
    printed = run(
        ROOT / "examples/trl_grpo.py", "--model", tmp_path / "model",
        "--output_dir", tmp_path / "out", "--max_steps", 12, "--max_completion_length", 4,
        "--use_cpu", "--bf16", "False", "--report_to", "none",
    )  # fmt: skip
    assert "12 updates of 2 batches of rollouts: 6.00 uses each" in printed
    assert (tmp_path / "out" / "model.safetensors").is_file()
