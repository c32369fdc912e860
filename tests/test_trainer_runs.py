"""Whole tiny runs: what they log, repeat, replay and leave behind."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace

import pytest
from rich.console import Console
from trainer_toys import TINY, Digits, Fails

from dgg_kernels import replay
from python_trainer import compare, report, tasks
from python_trainer.__main__ import main
from python_trainer.files import MetricsLog, energies, read_metrics, write_atomically
from python_trainer.loop import ArmResult, prepare, train
from python_trainer.stopping import ARMS, gate_config


@pytest.fixture(autouse=True)
def toy_tasks(monkeypatch):
    monkeypatch.setitem(tasks.TASKS, "digits", Digits)
    monkeypatch.setitem(tasks.TASKS, "fails", Fails)


@pytest.fixture(scope="module")
def start():
    return prepare(TINY, Digits())


def one_run(config, start, path):
    result, log = ArmResult(), MetricsLog(path)
    train(config, start, log, result)
    log.close()
    return result, read_metrics(path)


@pytest.mark.parametrize("gate", list(ARMS))
def test_same_seed_same_bytes_and_replay_repeats_the_decisions(gate, start, tmp_path):
    # At tau = -1 the gate shuts often; a KL limit that re-use does exceed.
    config = replace(TINY, gate=gate, gate_threshold=-1.0, kl_stop=1e-4)
    result, rows = one_run(config, start, tmp_path / "a.jsonl")
    one_run(config, start, tmp_path / "b.jsonl")
    assert (tmp_path / "a.jsonl").read_bytes() == (tmp_path / "b.jsonl").read_bytes()

    updates = [row for row in rows if row["type"] == "update"]
    assert len(updates) == result.updates_attempted
    shut = [row["gate/shut"] for row in updates]
    assert result.updates_applied == shut.count(False)
    assert any(shut) == (gate in ("dgg", "global_norm", "kl"))
    if gate == "kl":  # its veto is the host's, before the gate sees anything
        assert all(row["kl"] > config.kl_stop for row in updates if row["gate/shut"])
        return
    decisions = [d for batch in replay(energies(rows), gate_config(config)) for d in batch]
    assert [d.shut for d in decisions] == shut
    for decision, row in zip(decisions, updates, strict=True):
        assert decision.z == row["gate/z"] or (math.isnan(decision.z) and math.isnan(row["gate/z"]))
    for row in updates:
        if row["gate/shut"]:
            assert row["dwd/lm_head"] == row["dwd/middle"] == 0.0


@pytest.mark.parametrize("loss_type", ["grpo", "dapo"])
def test_chi2_is_never_below_its_bound(loss_type, start, tmp_path):
    config = replace(TINY, gate="off", loss_type=loss_type, grad_eps=0.0, temperature=0.8)
    _, rows = one_run(config, start, tmp_path / "m.jsonl")
    updates = [row for row in rows if row["type"] == "update"]
    assert len(updates) == TINY.rollout_batches * TINY.num_iterations
    for row in updates:
        assert row["gate/chi2_lower_bound"] <= row["gate/chi2"] + 1e-5
        if row["gate/reuse"] == 1:
            assert row["gate/chi2"] == 0.0 and row["kl"] == 0.0
    assert max(row["gate/chi2"] for row in updates) > 1e-3
    # A bound far below everything would hold for any formula.
    assert max(row["gate/chi2_lower_bound"] for row in updates) > -1.0


def test_kl_term_is_logged_and_needs_no_bound(start, tmp_path):
    _, rows = one_run(replace(TINY, gate="off", beta=0.1), start, tmp_path / "m.jsonl")
    updates = [row for row in rows if row["type"] == "update"]
    assert updates[0]["kl_ref"] == 0.0 and updates[-1]["kl_ref"] > 0.0
    assert all(math.isnan(row["gate/chi2_lower_bound"]) for row in updates)


def test_compare_writes_what_the_summary_promises(tmp_path):
    arms = compare.arm_configs(TINY, list(compare.PRESETS))
    summary = compare.run(arms, tmp_path, Console(quiet=True))
    report.write(tmp_path)
    assert json.loads((tmp_path / "summary.json").read_text()) == json.loads(json.dumps(summary))
    assert set(summary["arms"]) == set(compare.PRESETS)
    for name, arm in summary["arms"].items():
        assert arm["finished"] and arm["rollouts"] == TINY.rollout_batches
        assert arm["mean_uses"] == arm["updates_applied"] / arm["rollouts"]
        assert 0.0 <= arm["final_accuracy"] <= arm["best_accuracy"] <= 1.0
        assert arm["late_accuracy"] <= arm["best_accuracy"]
        assert arm["wall_s"] > 0 and "rollouts_to_single_use_final" in arm
        rows = read_metrics(tmp_path / name / "metrics.jsonl")
        evals = [row["rollouts"] for row in rows if row["type"] == "eval"]
        assert evals == [0, 2, 4, 6] and rows[-1]["accuracy"] == arm["final_accuracy"]
    single = summary["arms"]["single_use"]
    assert single["updates_applied"] == single["updates_attempted"] == TINY.rollout_batches
    assert summary["arms"]["fixed_k8"]["mean_uses"] == 8.0
    matched = summary["config"]["random"]["mean_uses"]
    assert matched == max(1.0, summary["arms"]["dgg"]["mean_uses"])
    assert summary["seed"] == 0 and summary["versions"]["torch"] and "commit" in summary
    page = (tmp_path / "report.html").read_text()
    assert page.count("data:image/png;base64,") == len(list(tmp_path.glob("*.png"))) == 4
    assert "http" not in page
    assert not list(tmp_path.glob("**/*.tmp"))

    # All arms meet the same prompts, and the first batch is sampled from the same policy.
    first = {name: read_metrics(tmp_path / name / "metrics.jsonl")[1]["reward"] for name in arms}
    assert len(set(first.values())) == 1

    # A later run into the same directory leaves nothing of this one.
    compare.run({"dgg": TINY}, tmp_path, Console(quiet=True))
    assert [p.parent.name for p in tmp_path.glob("*/metrics.jsonl")] == ["dgg"]
    assert not list(tmp_path.glob("*.png"))


def test_reward_that_raises_ends_in_one_line_and_a_readable_directory(tmp_path, capsys):
    options = [
        f"--{name.replace('_', '-')}={value}"
        for name, value in asdict(replace(TINY, task="fails")).items()
        if name != "task_options" and value is not None
    ]
    assert main(["train", "--out", str(tmp_path), *options]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: task fails: reward raised ZeroDivisionError: no luck")
    assert error.count("\n") == 1
    rows = read_metrics(tmp_path / "dgg" / "metrics.jsonl")
    assert rows[-1]["rollouts"] == 2  # both whole batches before it
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["error"].startswith("task fails") and not summary["arms"]["dgg"]["finished"]
    report.write(tmp_path)
    assert "did not finish" in (tmp_path / "report.html").read_text()


@pytest.mark.skipif(os.name != "posix", reason="SIGINT to a child needs POSIX")
def test_ctrl_c_leaves_a_readable_directory(tmp_path):
    command = [
        sys.executable, "-m", "python_trainer", "train", "--out", str(tmp_path), "--threads", "1",
        "--warmup-max-steps", "1", "--rollout-batches", "100000", "--eval-prompts", "8",
    ]  # fmt: skip
    # A job started in the background ignores SIGINT, and so would its children.
    child = subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    metrics = tmp_path / "dgg" / "metrics.jsonl"
    try:
        deadline = time.monotonic() + 60
        while not (metrics.exists() and metrics.read_bytes().count(b"\n") > 5):
            assert child.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
        child.send_signal(signal.SIGINT)
        _, error = child.communicate(timeout=30)
    finally:
        child.kill()
    assert child.returncode == 130
    assert error == f"interrupted: what was done is in {tmp_path}\n"
    rows = read_metrics(metrics)
    assert metrics.read_bytes().endswith(b"\n")
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["interrupted"] is True
    attempted = summary["arms"]["dgg"]["updates_attempted"]
    assert attempted - 1 <= max(row["updates_attempted"] for row in rows) <= attempted


def test_numbers_survive_the_file(tmp_path):
    row = {"a": 0.1 + 0.2, "b": math.nan, "c": math.inf, "d": -math.inf, "e": 5e-324, "f": True}
    log = MetricsLog(tmp_path / "m.jsonl")
    log.write(row)
    log.close()
    text = (tmp_path / "m.jsonl").read_text()
    assert "NaN" not in text
    (back,) = read_metrics(tmp_path / "m.jsonl")
    assert math.isnan(back.pop("b")) and row.pop("b")
    assert back == row


def test_whole_files_are_written_or_not_at_all(tmp_path):
    path = tmp_path / "f"
    write_atomically(path, "old")
    with pytest.raises(UnicodeEncodeError):
        write_atomically(path, "\ud800")
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_report_needs_a_run(tmp_path, capsys):
    assert main(["report", "--out", str(tmp_path)]) == 2
    assert "expected a run directory with summary.json" in capsys.readouterr().err
