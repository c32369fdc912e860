"""The benchmarks: what they refuse to say, and what they make of a record. No time is asserted."""

from __future__ import annotations

import argparse
import functools
import json
import math
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console
from trainer_toys import TINY, Digits

from benchmarks import bench_lm_head, bench_step, bench_trl, common, gpu_suite, peers, plot, rows
from benchmarks.bench_kernels import achieved
from benchmarks.tables import markdown, tables, trl
from dgg_kernels import screen
from python_trainer.distributed import Ranks
from python_trainer.engine import TransformersEngine
from python_trainer.evaluate import Evaluator
from python_trainer.loop import prepare

QUIET = Console(quiet=True)
RESULTS = Path(plot.__file__).parent / "results"


def wrong(hidden, weight, target, **_):
    """A head whose gradients are a quarter too large."""
    logp = peers.torch_eager(hidden, weight, target)
    return logp + (logp - logp.detach()) / 4


def head_arguments(*names):
    return argparse.Namespace(
        device="cpu", threads=1, dtype="float32", peers=names, grad_eps=None, rounds=1
    )


DENSE = bench_lm_head.Setting(rows.Head(32, 600), 64, bench_lm_head.DENSE, 1.0, 0.5)


def test_a_head_that_is_right_gets_its_time():
    record = bench_lm_head.measure(head_arguments("ours", "torch eager"), DENSE, QUIET)
    assert set(record["variants"]) == {"ours", "torch eager", bench_lm_head.BARE}
    for name in ("ours", "torch eager"):
        assert record["variants"][name]["total_s"]["median"] > 0
        assert record["variants"][name]["errors"]["d_weight"] < 1e-4
    assert abs(record["entropy"] - (math.log(600) - 0.5)) < 0.2


def test_no_speed_of_ours_when_its_gradients_are_off(monkeypatch):
    monkeypatch.setitem(peers.PEERS, "ours", (wrong, "dgg_kernels", ("cpu",)))
    with pytest.raises(common.Refused, match=r"ours: error 2\.5e-01 against fp64: no speed"):
        bench_lm_head.measure(head_arguments("ours"), DENSE, QUIET)


def test_a_peer_that_is_off_is_listed_without_a_time(monkeypatch):
    monkeypatch.setitem(peers.PEERS, "torch eager", (wrong, "torch", ("cpu",)))
    record = bench_lm_head.measure(head_arguments("ours", "torch eager"), DENSE, QUIET)
    assert "torch eager" not in record["variants"]
    assert "no speed is reported" in record["missing"]["torch eager"]
    assert "ours" in record["variants"]


def test_the_command_ends_red_and_writes_nothing(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(common, "RESULTS", tmp_path)
    monkeypatch.setitem(peers.PEERS, "ours", (wrong, "dgg_kernels", ("cpu",)))
    arguments = "--features 32 --vocabulary 600 --rows 8 16 --entropy dense --peers ours --save x"
    monkeypatch.setattr(sys, "argv", ["bench_lm_head", *arguments.split()])
    with pytest.raises(SystemExit) as ended:
        bench_lm_head.main()
    assert ended.value.code == 1
    assert capsys.readouterr().out.count("no speed is reported") == 2
    assert not list(tmp_path.iterdir())


def test_codes_at_hand_are_at_hand(monkeypatch):
    """Whatever the variants beside it write."""
    made = []
    quantized = screen._quantized
    monkeypatch.setattr(
        screen, "_quantized", lambda w, kind: made.append(len(w)) or quantized(w, kind)
    )
    inputs = rows.real_rows(8, 0.6)
    whole = len(inputs.weight)
    peer, c = functools.partial(peers.ours, screen="int8"), torch.ones(8)
    anew = bench_lm_head.variant(peer, inputs, c)
    at_hand = bench_lm_head.variant(peer, inputs, c, written=False)
    at_hand()
    made.clear()
    for _ in range(2):
        anew()
        assert made == [whole]
        at_hand()
        assert whole not in made[1:]
        made.clear()


def test_softcap_truth_and_centring():
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, 8, generator=generator) for n in (6, 40))
    target, c = torch.arange(6), torch.randn(6, generator=generator)
    leaves = [t.clone().requires_grad_() for t in (hidden, weight)]
    logp = peers.torch_eager(*leaves, target, softcap=2.0)
    (logp * c).sum().backward()
    exact = common.exact_gradients(hidden, weight, target, c, 2.0)
    for got, expected in zip((logp, *(leaf.grad for leaf in leaves)), exact, strict=True):
        assert common.relative_error(got, expected) < 1e-6
    moved = rows._centred(hidden, weight)
    before, after = (torch.softmax(hidden @ w.T, 1) for w in (weight, moved))
    assert torch.allclose(before, after, atol=1e-5)
    assert (hidden @ moved.T).amax(1).abs().max() < 1e-3  # 8 features fit 6 rows exactly


def test_every_combination_has_its_own_record():
    arguments = argparse.Namespace(
        model=["qwen2.5-7b", "gemma-2-9b"], features=None, vocabulary=None, rows=[4096, 32768],
        entropy=["0.8"], temperature=1.0, zero_rows=[0.0],
    )  # fmt: skip
    found = dict(bench_lm_head.settings(arguments))
    assert list(found) == [
        f"_{model}_n{n}" for model in arguments.model for n in arguments.rows
    ]  # fmt: skip
    assert found["_gemma-2-9b_n4096"].head == (3584, 256000, 30.0)
    named = {
        f"x{name}": {"shape": {"N": s.rows}, "variants": {}, "temperature": 0.56}
        for name, s in found.items()
    }
    ((stem, panels),) = plot.series(named, "rows")
    assert stem == "x" and list(panels) == arguments.model
    # Where none is named, it is the first one's.
    ((_, panels),) = plot.series({"x": {}, "x_qwen2.5-7b": {}}, "model")
    assert [plot.model_of(name) for name, _ in panels[""]] == ["smollm2-135m", "qwen2.5-7b"]
    assert all(len(records) == 2 for records in panels.values())


@pytest.fixture(scope="module")
def step_record():
    arguments = argparse.Namespace(
        model="tiny", device="cpu", dtype=None, threads=1, rounds=1, prompts=None,
        generations=None, prompt_length=None, completion_length=None,
    )  # fmt: skip
    chosen = {bench_step.EAGER, "ours", "ours, screen int8"}
    found, missing = bench_step.heads("cpu")
    heads = {name: head for name, head in found.items() if name in chosen}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench_step, "heads", lambda device: (heads, missing))
        record = bench_step.measure(arguments, QUIET)
        broken = {**heads, "ours": lambda *args: bench_step.with_logp(*args, peer=wrong)}
        patch.setattr(bench_step, "heads", lambda device: (broken, {}))
        with pytest.raises(common.Refused, match=r"ours: gradients off by 2\.5e-01"):
            bench_step.measure(arguments, QUIET)
    return record


def test_a_whole_update(step_record):
    assert abs(step_record["entropy"] - bench_step.ENTROPY) < 0.3
    for name, v in step_record["variants"].items():
        assert v["errors"]["d_hidden"] < (1e-4 if name == bench_step.EAGER else 1e-2)
        assert 0 < v["head_share"]["median"] < 1
        assert v["tokens_per_s"]["median"] > 0 and v["peak_extra_bytes"] > 0
    plot.step_bars(step_record)
    assert "ours, screen int8" in tables({"step": step_record})


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("gate", ["off", "dgg", "gain"])
def test_trl_trains_an_arm_of_the_trainers(gate, tmp_path):
    pytest.importorskip("trl")
    config = replace(TINY, gate=gate, gate_threshold=-1.0)
    start, told = prepare(config, Digits()), []
    before = start.policy.head.weight.detach().clone()
    run = bench_trl.Run(config, start, str(tmp_path))
    run.trainer.reward_funcs = [lambda **told_: told.append(told_) or run.reward(**told_)]
    progress = run.train()
    assert progress.finished and progress.rollouts == config.rollout_batches == len(told)
    # Prompts come in the order in which python_trainer would draw them.
    for n, of in enumerate(told):
        expected = [e.prompt for e in Digits().sample(4, f"{config.seed} train {n}")]
        assert [run.examples[p].prompt for p in of["prompts"][::4]] == expected
    ended = [ids for of in told for ids in of["completion_ids"]]
    assert len(ended) == progress.sequences == 6 * 4 * 4 and max(map(len, ended)) <= 5
    rewards = [r["reward"] for r in run.rows if r["type"] == "update"]
    digits = [sum(c.isdigit() for c in run.policy.tokenizer.decode(ids)[:5]) / 5 for ids in ended]
    assert rewards == pytest.approx([sum(digits[i : i + 16]) / 16 for i in range(0, 96, 16)])
    assert [n for n, _ in progress.accuracy] == [0, 2, 4, 6]
    for policy, (_, accuracy) in ((start.policy, progress.accuracy[0]),
                                  (run.policy, progress.accuracy[-1])):  # fmt: skip
        evaluator = Evaluator(start.task, policy, config, Ranks("cpu"))
        assert accuracy == evaluator.accuracy(policy, TransformersEngine(policy))
    assert before.equal(start.policy.head.weight) and not before.equal(run.policy.head.weight)
    shut = progress.updates_attempted - progress.updates_applied
    assert (shut > 0) == (gate != "off") and (shut > 0 or progress.updates_applied == 6 * 4)


def test_records_become_figures_and_tables(tmp_path):
    wanted = ("h100/kernels", "h100/lm_head", "cpu_n", "cpu_2")
    records = {n: r for n, r in plot.read(RESULTS).items() if n.startswith(wanted)}
    figures = dict(plot.figures(records))
    assert set(figures) == {
        "cpu_2_threads", "cpu_by_rows", "h100/kernels_roofline", "h100/lm_head",
        "h100/lm_head_by_entropy",
    }  # fmt: skip
    for figure in figures.values():
        figure.savefig(tmp_path / "figure.png")
    text = tables(records)
    assert "| ours, with lse_ref, screen fp8 | 16.9 |" in text
    assert "| scan | 13.40 |" in text.replace("with lse_ref | ", "")


def test_the_page_has_the_table_and_the_ratios_of_trls_record():
    record = json.loads((RESULTS / "trl.json").read_text())
    ((_, table),) = trl(record)
    docs = RESULTS.parents[1] / "docs"
    assert markdown(table) in (docs / "integrations.md").read_text()
    needed = {(run["arm"], run["seed"]): run["rollouts_to_single_use_final"]
              for run in record["summary"]["runs"]}  # fmt: skip
    for arm, ratio in (("gain", 1.8), ("fixed_k8", 1.9), ("dgg@1", 1.9), ("dgg", 1.3)):
        fewer = [needed["single_use", seed] / needed[arm, seed] for seed in range(5)]
        assert sum(fewer) / 5 == pytest.approx(ratio, abs=0.05)
    plot.plain(*dict(plot.figures({"trl": record}))["trl"].axes)


def test_shares_of_the_roofline_are_possible():
    points = achieved(json.loads((RESULTS / "h100/kernels.json").read_text()))
    assert len(points) > 20
    # Gathers are counted as if nothing came from the cache.
    assert all(0.5 < p["share_of_roofline"] < 1.2 for p in points)


def test_the_suite_outlives_its_stages(monkeypatch, tmp_path):
    def stage(name, code, minutes=1.0, measures=True):
        return gpu_suite.Stage(name, [sys.executable, "-c", code], minutes, measures)

    planned = [
        stage("raises", "raise SystemExit(3)"),
        gpu_suite.Stage("absent", ["/no/such/program"], 1),
        stage("hangs", "import time; time.sleep(60)", 0.02),
        stage("writes", "import sys; sys.stdout.buffer.write(bytes([255, 10]))"),
        stage("tests", "raise SystemExit(1)", measures=False),
        stage("speed", "print('must not run')"),
        stage("info", "print('still runs')", measures=False),
    ]
    monkeypatch.setattr(gpu_suite, "stages", lambda device: planned)
    monkeypatch.setattr(gpu_suite, "python", lambda *_: planned[-1].command)  # no plots here
    arguments = ["gpu_suite", "--device", "cpu", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", arguments)
    gpu_suite.main()
    # What a later call was not asked for stands as it was.
    monkeypatch.setattr(sys, "argv", [*arguments, "--only", "speed"])
    gpu_suite.main()
    monkeypatch.setattr(sys, "argv", [*arguments, "--only", "tests", "writes", "--minutes", "0"])
    gpu_suite.main()
    ended = json.loads((tmp_path / "suite.json").read_text())["stages"]
    assert {name: of["result"] for name, of in ended.items()} == {
        "raises": "exit 3",
        "absent": "did not start: [Errno 2] No such file or directory: '/no/such/program'",
        "hangs": "stopped after 1 s",
        "writes": "ok",
        "tests": "exit 1",
        "speed": "skipped: tests are red",
        "info": "ok",
        "plot": "ok",
    }

    assert "KeyboardInterrupt" in (tmp_path / "hangs.log").read_text()  # says where


def test_the_suite_wants_to_know_the_commit(monkeypatch, tmp_path):
    monkeypatch.setattr(common, "_output", lambda *_: None)
    monkeypatch.delenv("DGG_COMMIT", raising=False)
    monkeypatch.setattr(sys, "argv", ["gpu_suite", "--device", "cpu", "--out", str(tmp_path)])
    with pytest.raises(SystemExit, match="set DGG_COMMIT"):
        gpu_suite.main()
    monkeypatch.setenv("DGG_COMMIT", "0123")
    stamp = common.stamp(torch.device("cpu"))
    assert stamp["commit"] == "0123" and stamp["dirty"] is None


def wait_until(holds):
    for _ in range(300):
        if holds():
            return
        time.sleep(0.1)
    raise AssertionError("still not so after 30 s")


def test_a_stage_leaves_no_process(tmp_path):
    """One that ended itself; and one whose suite is stopped."""
    pid, proc = tmp_path / "pid", Path("/proc")

    def ended():  # or waits to be noticed by its parent
        status = proc / pid.read_text() / "status"
        return not status.exists() or "State:\tZ" in status.read_text()

    child = f"import os, time; f = open({str(pid)!r}, 'w'); f.write(str(os.getpid())); f.close()"
    child += "; time.sleep(60)"
    parent = f"import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', {child!r}])"
    parent += "; time.sleep(2); sys.exit(3)"
    stage = gpu_suite.Stage("ends", [sys.executable, "-c", parent], 1)
    assert gpu_suite.run(stage, tmp_path, 30) == "exit 3"
    wait_until(ended)
    pid.unlink()

    suite = "import sys; from benchmarks import gpu_suite as g; g.stages = lambda device: "
    suite += f"[g.Stage('info', [sys.executable, '-c', {child!r}], 1, measures=False)]; "
    suite += f"sys.argv = ['gpu_suite', '--device', 'cpu', '--out', {str(tmp_path)!r}]; g.main()"
    process = subprocess.Popen(
        [sys.executable, "-c", suite], cwd=gpu_suite.ROOT, stdout=subprocess.DEVNULL
    )
    wait_until(lambda: pid.exists() and pid.read_text())
    process.terminate()
    assert process.wait(30) == 143
    wait_until(ended)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_stages_name_modules_and_files_that_are_there(device):
    names = [stage.name for stage in gpu_suite.stages(device)]
    assert len(names) == len(set(names))
    for stage in gpu_suite.stages(device):
        module = stage.command[stage.command.index("-m") + 1]
        assert module == "pytest" or (gpu_suite.ROOT / f"{module.replace('.', '/')}.py").exists()
        for argument in stage.command:
            if argument.startswith("tests/"):
                assert (gpu_suite.ROOT / argument).exists()
