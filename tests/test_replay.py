"""The replay command: reads a log, prints a table, draws; refuses what is no log."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from dataclasses import replace

import pytest
from trainer_toys import TINY, Digits

from dgg_kernels.replay_log import read_energies
from python_trainer.files import per_batch, read_metrics, updates
from python_trainer.loop import Progress, prepare, train

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


def test_a_packed_log_is_read_as_it_is(log):
    packed = log.with_name("metrics.jsonl.gz")
    packed.write_bytes(gzip.compress(log.read_bytes()))
    assert repr(read_energies(packed)) == repr(read_energies(log))


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("{", "metrics.jsonl:1: expected a JSON row"),
        (
            '{"gate/energy": 1.0}',
            "metrics.jsonl:1: expected a JSON row, got KeyError('gate/reuse')",
        ),
        ('{"gate/reuse": 1, "loss": 0.1}', ":1: expected a JSON row, got KeyError('gate/energy')"),
        ('{"a": 1}\n', "expected rows with gate/energy and gate/reuse, got none"),
    ],
)
def test_what_is_no_log_is_refused_in_one_line(tmp_path, content, says):
    path = tmp_path / "metrics.jsonl"
    path.write_text(content)
    done = command(path)
    assert done.returncode == 2 and says in done.stderr and done.stderr.count("\n") == 1


@pytest.mark.parametrize("option", ["window", "mini-batches"])
def test_a_wrong_option_is_named(log, option):
    done = command(log, f"--{option}", 0)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert f"GateConfig.{option.replace('-', '_')}: expected" in done.stderr


@pytest.mark.parametrize("numbered", [True, False])
def test_several_mini_batches_make_a_pass(tmp_path, numbered):
    path = tmp_path / "metrics.jsonl"
    batches = [[1.0, 5.0, 1.1, 5.1], [2.0, 6.0], [3.0, 7.0, 3.1, 7.1, 3.2]]
    rows = [
        {"gate/energy": g, "gate/reuse": k // 2 + 1} | ({"rollouts": n} if numbered else {})
        for n, batch in enumerate(batches, 1)
        for k, g in enumerate(batch)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert read_energies(path, mini_batches=2) == batches
    if numbered:
        with pytest.raises(ValueError, match=":2: expected 1 updates of pass 1 in a rollout"):
            read_energies(path)
    done = command(path, "--mini-batches", 2, "--window", 4, "--threshold", 1e9)
    assert done.stdout.startswith(f"{path}: 3 rollout batches, 11 updates\n"), done.stderr


@pytest.mark.parametrize(("gate", "signal"), [("dgg", "gate/energy"), ("gain", "loss")])
def test_a_log_of_the_trainer_replays_by_command_as_it_went(gate, signal, tmp_path):
    config = replace(TINY, gate=gate, mini_batches=2, gate_threshold=-0.5)
    train(config, prepare(config, Digits()), tmp_path, Progress())
    rows = updates(read_metrics(tmp_path / "metrics.jsonl"))
    read = read_energies(tmp_path / "metrics.jsonl", mini_batches=2, signal=signal)
    assert read == [*per_batch(updates(rows), signal).values()]
    assert len(read) == config.rollout_batches
    done = command(tmp_path / "metrics.jsonl", "--mini-batches", 2, "--window", 3,
                   "--threshold", -0.5, "--max-reuse", config.num_iterations, "--signal", signal,
                   *(["--include-shut"] * config.score.include_shut))  # fmt: skip
    shut = sum(row["gate/shut"] for row in rows)
    counts = [str(n) for n in (len(rows), len(rows) - shut, shut)]
    assert shut and done.stdout.splitlines()[2].split()[1:4] == counts
