"""Whole tiny runs: what they log, repeat, replay and leave behind."""

import datetime
import gc
import io
import itertools
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from functools import partial

import pytest
import torch
from forks import fork_to
from rich.console import Console
from trainer_toys import TINY, Digits, Echo, Fails

from dgg_kernels import replay
from python_trainer import checkpoint, compare, files, loop, report, tasks
from python_trainer.__main__ import main
from python_trainer.config import CheckpointError, ConfigError, TaskError
from python_trainer.files import (
    MetricsLog,
    per_batch,
    read_metrics,
    use_counts,
    write_atomically,
    write_json,
)
from python_trainer.loop import Progress, Run, prepare, train
from python_trainer.stopping import ARMS, GATED, batches_to_fill, gate_config

TOYS = {"digits": Digits, "echo": Echo, "fails": Fails}


@pytest.fixture(autouse=True)
def toy_tasks(monkeypatch):
    make_task = tasks.make_task

    def make(name, options):
        return TOYS[name](options) if name in TOYS else make_task(name, options)

    for module in (tasks, compare):
        monkeypatch.setattr(module, "make_task", make)


@pytest.fixture(scope="module")
def start():
    return prepare(TINY, Digits())


@pytest.fixture(scope="module")
def echo():
    return prepare(replace(TINY, task="echo"), Echo())


def one_run(config, start, folder):
    progress = Progress()
    train(config, start, folder, progress)
    return progress, read_metrics(folder / "metrics.jsonl")


@pytest.mark.parametrize(
    ("gate", "parts"),
    [*((gate, 1) for gate in ARMS), ("dgg", 2), ("gain", 2), ("random", 2), ("shuffled", 2)],
)
def test_same_seed_same_bytes_and_replay_repeats_the_decisions(gate, parts, start, tmp_path):
    # At tau = -1 the gate shuts often; limits that re-use does exceed.
    config = replace(TINY, gate=gate, mini_batches=parts, gate_threshold=-1.0, kl_stop=1e-4,
                     chi2_stop=1e-4, use_counts=(1, 2, 3, 4, 5, 6))  # fmt: skip
    result, rows = one_run(config, start, tmp_path / "a")
    one_run(config, start, tmp_path / "b")
    texts = [(tmp_path / name / "metrics.jsonl").read_bytes() for name in "ab"]
    assert texts[0] == texts[1]

    updates = [row for row in rows if row["type"] == "update"]
    assert len(updates) == result.updates_attempted
    shut = [row["gate/shut"] for row in updates]
    assert result.updates_applied == shut.count(False)
    limited = {"kl": "kl", "chi2": "gate/chi2"}
    assert any(shut) == (gate in (*GATED, *limited))
    if gate in limited:
        assert all((row[limited[gate]] > 1e-4) == row["gate/shut"] for row in updates)
        return
    foreseen = {
        "gain": lambda row: row["loss"],
        "gain_kl": lambda row: row["loss"] if row["kl"] <= 1e-4 else math.nan,
        "log_ratio": lambda row: -row["log_ratio/negative"],
    }
    signal = foreseen.get(gate, lambda row: row["gate/energy"])
    logged = per_batch([{**row, "signal": signal(row)} for row in updates], "signal")
    logged = list(logged.values())
    decisions = [d for batch in replay(logged, gate_config(config, start.policy)) for d in batch]
    assert [d.shut for d in decisions] == shut
    for decision, row in zip(decisions, updates, strict=True):
        assert decision.z == row["gate/z"] or (math.isnan(decision.z) and math.isnan(row["gate/z"]))
    for row in updates:
        if row["gate/shut"] and gate not in foreseen:
            assert row["dwd/lm_head"] == row["dwd/middle"] == 0.0
        elif row["gate/shut"]:  # no backward was paid for
            assert math.isnan(row["gate/energy"]) and math.isnan(row["dwd/lm_head"])


@pytest.mark.parametrize("loss_type", ["grpo", "dapo"])
def test_chi2_is_never_below_its_bound(loss_type, start, tmp_path):
    config = replace(TINY, gate="off", loss_type=loss_type, grad_eps=0.0, temperature=0.8)
    _, rows = one_run(config, start, tmp_path)
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
    _, rows = one_run(replace(TINY, gate="off", beta=0.1), start, tmp_path)
    updates = [row for row in rows if row["type"] == "update"]
    assert updates[0]["kl_ref"] == 0.0 and updates[-1]["kl_ref"] > 0.0
    assert all(math.isnan(row["gate/chi2_lower_bound"]) for row in updates)


def test_micro_batches_add_up_to_the_batch(echo, tmp_path):
    config = replace(TINY, gate="off", grad_eps=0.0, rollout_batches=2)
    _, whole = one_run(config, echo, tmp_path / "a")
    _, parts = one_run(replace(config, micro_batch_size=5), echo, tmp_path / "b")
    for row, other in zip(whole, parts, strict=True):
        for name in row.keys() - {"type", "text"}:
            assert other[name] == pytest.approx(row[name], rel=2e-3, abs=1e-5, nan_ok=True), name


def test_mini_batches_are_updates_of_their_own_part(echo, tmp_path, monkeypatch):
    config = replace(TINY, gate="off", mini_batches=2, num_iterations=3, rollout_batches=2)
    seen, token_shares = [], loop.token_shares
    monkeypatch.setattr(
        loop, "token_shares", lambda mask, *rest: seen.append(mask) or token_shares(mask, *rest)
    )
    _, rows = one_run(config, echo, tmp_path)
    updates = [row for row in rows if row["type"] == "update"]
    assert [row["gate/reuse"] for row in updates] == 2 * [1, 1, 2, 2, 3, 3]
    assert {len(mask) for mask in seen} == {TINY.prompts_per_batch * TINY.num_generations // 2}
    first, second, again = seen[:3]
    assert first.data_ptr() != second.data_ptr() and first.data_ptr() == again.data_ptr()
    assert updates[0]["kl"] == 0.0 != updates[1]["kl"]  # the first has moved the weights


def test_learning_rate_follows_applied_updates(start, tmp_path):
    config = replace(TINY, gate="dgg", gate_threshold=-1.0, lr_warmup=4)
    _, rows = one_run(config, start, tmp_path)
    updates = [row for row in rows if row["type"] == "update"]
    assert any(row["gate/shut"] for row in updates)
    for row in updates:
        applied = row["updates_applied"] - (not row["gate/shut"])
        factor = min(1.0, (applied + 1) / 5)
        assert row["learning_rate"] == pytest.approx(TINY.learning_rate * factor)


def test_reuse_decay_lowers_the_rate_of_every_further_use(start, tmp_path):
    config = replace(TINY, gate="off", reuse_decay=0.5, lr_warmup=4)
    _, rows = one_run(config, start, tmp_path)
    updates = [row for row in rows if row["type"] == "update"]
    for row in updates:
        factor = min(1.0, row["updates_applied"] / 5) * 0.5 ** (row["gate/reuse"] - 1)
        assert row["learning_rate"] == pytest.approx(TINY.learning_rate * factor)
    moved = [row["dwd/lm_head"] for row in updates[-4:]]
    assert moved[3] < moved[2] < moved[1]


def test_compare_writes_what_the_summary_promises(tmp_path):
    arms, seeds = ["random", "shuffled", "single_use", "fixed_k8", "dgg"], [0, 3]
    compare.begin(compare.plan(TINY, arms, seeds), tmp_path)
    summary = compare.go_on(tmp_path, Console(quiet=True))
    report.write(tmp_path)
    assert json.loads((tmp_path / "summary.json").read_text()) == json.loads(json.dumps(summary))
    assert {(r["arm"], r["seed"]) for r in summary["runs"]} == {(a, s) for a in arms for s in seeds}
    runs = {(r["arm"], r["seed"]): r for r in summary["runs"]}
    for (arm, seed), run in runs.items():
        assert run["finished"] and run["rollouts"] == TINY.rollout_batches
        assert run["mean_uses"] == run["updates_applied"] / run["rollouts"]
        assert 0.0 <= run["final_accuracy"] <= run["best_accuracy"] <= 1.0
        assert run["late_accuracy"] <= run["best_accuracy"]
        assert run["wall_s"] > 0 and "rollouts_to_single_use_final" in run
        rows = read_metrics(tmp_path / arm / f"seed-{seed}" / "metrics.jsonl")
        evals = [row["rollouts"] for row in rows if row["type"] == "eval"]
        assert evals == [0, 2, 4, 6] and rows[-1]["accuracy"] == run["final_accuracy"]
        # All arms meet the same prompts, and the first batch is sampled from the same policy.
        first = next(row for row in rows if row["type"] == "update")
        single = read_metrics(tmp_path / "single_use" / f"seed-{seed}" / "metrics.jsonl")
        assert first["reward"] == next(r for r in single if r["type"] == "update")["reward"]
    assert runs["fixed_k8", 0]["mean_uses"] == 8.0
    for seed in seeds:  # as many updates, of other batches
        counts = {
            arm: use_counts(read_metrics(tmp_path / arm / f"seed-{seed}" / "metrics.jsonl"))
            for arm in arms
        }
        assert sorted(counts["shuffled"]) == sorted(counts["dgg"])
    logs = [tmp_path / "dgg" / f"seed-{seed}" / "metrics.jsonl" for seed in seeds]
    assert logs[0].read_bytes() != logs[1].read_bytes()
    assert summary["versions"]["torch"] and "commit" in summary and "cores" in summary["device"]
    assert datetime.datetime.fromisoformat(summary["date"]).utcoffset() == datetime.timedelta(0)
    assert not list(tmp_path.glob("**/*.tmp"))

    # Nothing is left to do; a run that takes this one's place leaves nothing of it.
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/*/metrics.jsonl")}
    write_json(tmp_path / "summary.json", {**summary, "device": "another", "interrupted": True})
    again = compare.go_on(tmp_path, Console(quiet=True))
    assert again["device"] == "another" and not again["interrupted"]  # where it was run
    assert {path: path.stat().st_mtime_ns for path in before} == before
    for run in (*again["runs"], *summary["runs"]):
        del run["seconds"], run["wall_s"]  # the last save's is not in what it saved
    assert again["runs"] == summary["runs"] and again["warmups"] == summary["warmups"]
    with pytest.raises(ConfigError, match="out: expected a folder without a run"):
        compare.begin(compare.Plan({"dgg": TINY}, [0]), tmp_path)
    compare.begin(compare.Plan({"dgg": TINY}, [0]), tmp_path, overwrite=True)
    assert not list(tmp_path.glob("*/*/*")) and not list(tmp_path.glob("*.png"))


def test_an_arm_that_is_run_later_has_the_same_start(tmp_path):
    arms = {"hot": replace(TINY, temperature=1.5), "cold": TINY}
    logs = []
    for out in (tmp_path / "whole", tmp_path / "later"):
        compare.begin(compare.Plan(arms, [0]), out)
        compare.go_on(out, Console(quiet=True))
        logs.append(out / "cold" / "seed-0" / "metrics.jsonl")
    shutil.rmtree(logs[1].parent)
    summary = json.loads((out / "summary.json").read_text())
    write_json(out / "summary.json", {**summary, "device": "another"})
    assert compare.go_on(out, Console(quiet=True))["device"] == summary["device"]
    assert logs[0].read_bytes() == logs[1].read_bytes()


def options_of(config):
    return [
        f"--{name.replace('_', '-')}={str(value).lower() if isinstance(value, bool) else value}"
        for name, value in asdict(config).items()
        if name not in ("task_options", "task", "use_counts") and value is not None
    ]


def test_environment_that_raises_ends_in_one_line_and_resume_goes_on(tmp_path, capsys, monkeypatch):
    (tmp_path / "toy.toml").write_text('task = "fails"')
    run = ["train", "--out", str(tmp_path / "run"), "--config", str(tmp_path / "toy.toml")]
    assert main([*run, *options_of(replace(TINY, save_every=3))]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: task fails: ZeroDivisionError: no luck (turn")
    assert error.count("\n") == 1
    rows = read_metrics(tmp_path / "run" / "dgg" / "seed-0" / "metrics.jsonl")
    assert rows[-1]["rollouts"] >= 1
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["error"].startswith("task fails") and not summary["runs"][0]["finished"]
    report.write(tmp_path / "run")
    monkeypatch.setattr(Fails, "verify", Digits.verify)  # mended
    assert main(["resume", "--out", str(tmp_path / "run")]) == 0
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["error"] is None and summary["runs"][0]["finished"]
    assert main(["eval", "--out", str(tmp_path / "run")]) == 0
    said = capsys.readouterr().out
    assert f"accuracy {summary['runs'][0]['final_accuracy']:.4f}" in said and "(reward" in said


@pytest.mark.parametrize(("window", "fills"), [(11, True), (12, False)])
def test_a_window_that_does_not_fill_is_said(window, fills, tmp_path):
    """Four batches of three increments each: the gate would act on the last of them, or never."""
    config = replace(TINY, rollout_batches=4, gate_window=window)
    assert batches_to_fill(config) == (4 if fills else 5)
    compare.begin(compare.Plan({"dgg": config}, [0]), tmp_path)
    compare.go_on(tmp_path, console := Console(file=io.StringIO(), width=200))
    said = "dgg: a gate's window of 12 does not fill in 4 rollout batches: it shuts nothing by its"
    assert (said in console.file.getvalue()) is not fills
    rows = read_metrics(tmp_path / "dgg" / "seed-0" / "metrics.jsonl")
    scores = [row["gate/z"] for row in rows if row["type"] == "update"]
    assert any(math.isfinite(z) for z in scores) is fills


def test_what_a_policy_says_does_not_steer_the_terminal(tmp_path, monkeypatch):
    compare.begin(compare.Plan({"dgg": replace(TINY, rollout_batches=1)}, [0]), tmp_path)
    compare.go_on(tmp_path, Console(quiet=True))
    hostile = ["\x1b]0;title\x07", " \x1b[2Jgone\r[bold]\ud800"]
    monkeypatch.setattr(compare, "shown", lambda *_: hostile)
    console = Console(file=io.StringIO(), force_terminal=True, color_system=None, width=200)
    compare.evaluate(tmp_path, 1, console)
    said = console.file.getvalue()
    assert r"\x1b]0;title\x07" in said and r"\x1b[2Jgone\r[bold]\ud800" in said
    assert not set(said) & set("\x1b\x07\r")


@pytest.mark.parametrize(("act", "expected"), [
    (lambda: time.sleep(30), "TimeoutError: no answer within task_timeout = 0.2 s"),
    (lambda: 1.5, "reward: expected a number in \\[0, 1\\], got 1.5"),
    (lambda: math.nan, "reward: expected a number in \\[0, 1\\], got nan"),
    (lambda: "x", "ValueError: could not convert"),
])  # fmt: skip
def test_environment_that_hangs_or_lies_is_stopped(act, expected, start, tmp_path, monkeypatch):
    calls = iter(range(10**6))
    monkeypatch.setattr(Digits, "verify", lambda self, turn: act() if next(calls) > 30 else 0.5)
    began = time.monotonic()
    with pytest.raises(TaskError, match=expected):
        one_run(replace(TINY, task_timeout=0.2), start, tmp_path)
    assert time.monotonic() - began < 20


# -- interrupted runs -----------------------------------------------------------------------------


def assert_same_end(a, b):
    assert (a / "metrics.jsonl").read_bytes() == (b / "metrics.jsonl").read_bytes()
    (mine, _), (theirs, _) = (checkpoint.load(folder / "checkpoints") for folder in (a, b))
    assert mine.keys() == theirs.keys()
    for name, value in mine.items():
        if isinstance(value, torch.Tensor):
            torch.testing.assert_close(
                value, theirs[name], rtol=0, atol=0, equal_nan=True, msg=name
            )
        elif name != "progress":  # which counts seconds
            assert value == theirs[name], name


def test_checkpoints_every_so_many_updates_and_at_the_end(start, tmp_path, monkeypatch):
    numbers, save = [], checkpoint.save
    monkeypatch.setattr(
        checkpoint, "save", lambda folder, n, state: numbers.append(n) or save(folder, n, state)
    )
    config = replace(TINY, gate="off", save_every=5)
    began = time.monotonic()
    progress, _ = one_run(config, start, tmp_path / "whole")
    assert numbers == [5, 10, 15, 20, 25]  # the last after 24 updates, when all is done
    assert all(seconds > 0 for seconds in progress.seconds.values())
    assert sum(progress.seconds.values()) < time.monotonic() - began
    numbers.clear()

    def stop(progress):
        if progress.rollouts == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(config, start, tmp_path / "parts", Progress(), stop)
    train(config, start, tmp_path / "parts", Progress())
    assert numbers == [5, 10, 15, 20, 25]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills forks of this process")
def test_a_run_that_is_killed_at_random_ends_as_if_it_had_not_been(echo, tmp_path):
    config = replace(
        TINY,
        task="echo",
        save_every=1,
        gate_threshold=-0.5,
        mini_batches=2,
        grad_eps=0.05,  # so that entries of the gradient are drawn
        beta=0.05,
        lr_warmup=3,
        lr_decay=40,
    )
    gc.collect()
    gc.freeze()  # or every child copies what its collector touches, for longer than it may live

    def run(folder):
        train(config, echo, folder, Progress())

    began = time.monotonic()
    _, status = os.waitpid(fork_to(lambda: run(tmp_path / "whole")), 0)
    assert os.waitstatus_to_exitcode(status) == 0
    took = time.monotonic() - began  # of a child, as those that are killed
    rng, kills, runs = random.Random(0), 0, 0
    while kills < 20:
        folder, runs = tmp_path / f"killed-{runs}", runs + 1
        for attempt in itertools.count():
            assert attempt < 100, "none gets any further than the one before"
            child = fork_to(partial(run, folder))
            time.sleep(rng.uniform(0.02, 0.5 * took))
            os.kill(child, signal.SIGKILL)
            _, status = os.waitpid(child, 0)
            if os.WIFEXITED(status):
                assert os.WEXITSTATUS(status) == 0
                break
            kills += 1
        assert_same_end(tmp_path / "whole", folder)
    gc.unfreeze()


def test_a_damaged_checkpoint_is_passed_over_and_said(start, tmp_path):
    config = replace(TINY, save_every=2)
    one_run(config, start, tmp_path / "whole")
    one_run(config, start, tmp_path / "cut")
    newest, _ = sorted((tmp_path / "cut" / "checkpoints").iterdir(), reverse=True)
    file = newest / "tensors.safetensors"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    said = []
    train(config, start, tmp_path / "cut", Progress(), warn=said.append)
    assert len(said) == 1 and "its checksum differs" in said[0]
    assert_same_end(tmp_path / "whole", tmp_path / "cut")
    for path in (tmp_path / "cut" / "checkpoints").iterdir():
        (path / "state.json").write_text("{")
    with pytest.raises(CheckpointError, match="none can be read"):
        train(config, start, tmp_path / "cut", Progress())


def test_a_checkpoint_of_another_run_is_refused(start, tmp_path):
    one_run(TINY, start, tmp_path)
    before = (tmp_path / "metrics.jsonl").read_bytes()
    for name, other in (("seed", 1), ("learning_rate", 1e-5), ("rollout_batches", 12),
                        ("loss_type", "gspo"), ("use_counts", (1, 2)),
                        ("hidden_size", 32)):  # fmt: skip
        with pytest.raises(CheckpointError, match=f"{name}: expected .*, the checkpoint has "):
            train(replace(TINY, **{name: other}), start, tmp_path, Progress())
    other = {"save_every": 7, "threads": 2, "task_timeout": 9.0, "micro_batch_size": 2}
    train(replace(TINY, **other), start, tmp_path, Progress())
    assert (tmp_path / "metrics.jsonl").read_bytes() == before


def test_a_full_disk_costs_a_checkpoint_and_nothing_else(start, tmp_path, monkeypatch):
    config = replace(TINY, save_every=2)
    one_run(config, start, tmp_path / "whole")
    save_file, calls = checkpoint.save_file, iter(range(100))

    def full(tensors, path):
        if next(calls) in (1, 2):
            path.write_bytes(b"half")
            raise OSError(28, "No space left on device")
        save_file(tensors, path)

    monkeypatch.setattr(checkpoint, "save_file", full)
    said = []
    train(config, start, tmp_path / "full", Progress(), warn=said.append)
    assert len(said) == 2 and "no checkpoint was written at update" in said[0]
    assert_same_end(tmp_path / "whole", tmp_path / "full")
    assert not list(tmp_path.glob("**/*.tmp"))


@pytest.mark.skipif(os.name != "posix", reason="SIGINT to a child needs POSIX")
def test_ctrl_c_leaves_a_readable_directory(tmp_path):
    command = [
        sys.executable, "-m", "python_trainer", "train", "--out", str(tmp_path), "--gate", "dgg",
        "--warmup-max-steps", "1", "--rollout-batches", "100000", "--eval-prompts", "8",
    ]  # fmt: skip
    # A job started in the background ignores SIGINT, and so would its children.
    child = subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    metrics = tmp_path / "dgg" / "seed-0" / "metrics.jsonl"
    try:
        deadline = time.monotonic() + 240
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
    attempted = summary["runs"][0]["updates_attempted"]
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


def test_the_commit_is_that_of_this_code_and_of_no_other(tmp_path, monkeypatch):
    """It may be installed below another project's repository."""
    run = partial(subprocess.run, cwd=tmp_path, check=True)
    run(["git", "init", "-q"])
    who = ["-c", "user.name=n", "-c", "user.email=e"]
    run(["git", *who, "commit", "-q", "--allow-empty", "-m", "theirs"])
    monkeypatch.setattr(files, "__file__", str(tmp_path / "files.py"))
    (tmp_path / "files.py").touch()
    assert files.commit() is None
    run(["git", "add", "files.py"])
    run(["git", *who, "commit", "-q", "-m", "ours"])
    assert len(files.commit()) == 40


def test_a_batch_from_which_nothing_was_tried_counts():
    rows = [{"type": "update", "rollouts": n, "gate/shut": False} for n in (1, 1, 3)]
    assert use_counts(rows) == [2, 0, 1] and use_counts([]) == []


def test_a_warm_up_imitates_the_examples_that_have_an_answer():
    class Some(Digits):
        known = 3

        def sample(self, n, seed, held_out=False):
            examples = super().sample(n, seed, held_out)
            return [e if i < self.known else replace(e, answer=None)
                    for i, e in enumerate(examples)]  # fmt: skip

    assert prepare(replace(TINY, warmup_max_steps=2), Some()).warmup.steps == 2
    Some.known = 0
    with pytest.raises(TaskError, match=r"expected examples with an answer .* warmup_max_steps=0"):
        prepare(replace(TINY, warmup_max_steps=2), Some())


@pytest.mark.parametrize("gate", ["global_norm", "middle_norm"])
def test_a_tied_heads_norm_is_not_taken_for_its_own(gate, start, tmp_path, monkeypatch):
    """Its gradient is the embedding's as well, and the χ² bound would be none."""
    monkeypatch.setattr(type(start.policy), "tied", True)
    _, rows = one_run(replace(TINY, gate=gate), start, tmp_path)
    assert all(math.isnan(r["gate/chi2_lower_bound"]) for r in rows if r["type"] == "update")


def test_a_finished_arm_is_not_shown_with_other_settings(tmp_path):
    config = replace(TINY, rollout_batches=1)
    compare.begin(compare.Plan({"dgg": config}, [0]), tmp_path)
    compare.go_on(tmp_path, Console(quiet=True))
    edited = (tmp_path / "run.json").read_text().replace('"beta": 0.0', '"beta": 0.5')
    (tmp_path / "run.json").write_text(edited)
    with pytest.raises(CheckpointError, match=r"beta: expected 0.5, the checkpoint has 0.0"):
        compare.go_on(tmp_path, Console(quiet=True))


def test_saving_before_the_first_applied_update(start, tmp_path):
    """torch makes the optimizer's state by a step of its own then."""
    config = replace(TINY, gate="shuffled", use_counts=(0,) * 6, save_every=1)
    progress, _ = one_run(config, start, tmp_path)
    assert progress.finished and progress.updates_applied == 0


def test_lengths_are_those_of_truncated_episodes_too(start, tmp_path, monkeypatch):
    """Though they are masked out of the loss."""
    rows, seen, draw = {}, [], Run.draw

    def watched(run):
        draw(run)
        seen.append((run.config.mask_truncated_completions, run.batch))

    monkeypatch.setattr(Run, "draw", watched)
    for masked in (False, True):
        config = replace(TINY, mask_truncated_completions=masked, num_iterations=1)
        one_run(config, start, tmp_path / str(masked))
        rows[masked] = files.updates(files.read_metrics(tmp_path / str(masked) / "metrics.jsonl"))
    for masked, batch in seen:
        assert torch.equal(batch.mask_BC.any(1), batch.ended_B | (not masked))
    plain, masked = rows[False][0], rows[True][0]
    assert plain["truncated"] == masked["truncated"] > 0
    assert plain["completion_length"] == masked["completion_length"] > 0
