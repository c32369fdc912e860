"""The replay command: reads a log, prints a table, draws; refuses what is no log."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

LOG = [[1.0, 1.1 + 0.01 * (i % 3), 1.2] for i in range(20)] + [[1.0, 9.0, 1.0], [1.0, None, 1.0]]


@pytest.fixture
def log(tmp_path):
    path = tmp_path / "metrics.jsonl"
    rows = [{"type": "eval", "accuracy": 0.5}]
    for batch in LOG:
        rows += [{"gate/energy": g, "gate/reuse": k} for k, g in enumerate(batch, 1)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def command(*args):
    full = [sys.executable, "-m", "dgg_kernels.replay_log", *map(str, args)]
    return subprocess.run(full, capture_output=True, text=True)


def test_table_and_plot(log, tmp_path):
    done = command(log, "--threshold", 0.5, 1e9, "--window", 4, "--plot", tmp_path / "out.png")
    assert done.returncode == 0 and done.stderr == ""
    assert "22 rollout batches, 66 updates" in done.stdout
    strict, never = (line.split() for line in done.stdout.splitlines()[2:4])
    assert never == ["1e+09", "65", "64", "1", "2.909", "0.04545"]  # only the NaN shuts
    assert float(strict[3]) > 1
    assert (tmp_path / "out.png").stat().st_size > 5000


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("{", "metrics.jsonl:1: expected a JSON row"),
        (
            '{"gate/energy": 1.0}',
            "metrics.jsonl:1: expected a JSON row, got KeyError('gate/reuse')",
        ),
        ('{"a": 1}\n', "expected rows with gate/energy and gate/reuse, got none"),
    ],
)
def test_what_is_no_log_is_refused_in_one_line(tmp_path, content, says):
    path = tmp_path / "metrics.jsonl"
    path.write_text(content)
    done = command(path)
    assert done.returncode == 2 and says in done.stderr and done.stderr.count("\n") == 1


def test_a_wrong_option_is_named(log):
    done = command(log, "--window", 1)
    assert done.returncode == 2 and "GateConfig.window: expected" in done.stderr
