"""Every example runs to its end and does what it says."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_fsdp2_on_two_processes_learns():
    run = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2",
         str(ROOT / "examples" / "fsdp2.py")],
        capture_output=True, text=True, timeout=240,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "",
             "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-3000:]
    last = re.findall(r"even (\d+)%, ([\d.]+) uses", run.stdout)[-1]
    assert int(last[0]) > 85  # half of the vocabulary is even
    assert 1.0 < float(last[1]) < 4.0  # the gate shuts, not always
