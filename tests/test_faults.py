"""Faults of the machine: what a run, its checkpoints and the gate are worth after each.

docs/faults.md lists them, with those that other files test.
"""

from __future__ import annotations

import errno
import io
import itertools
import json
import os
import random
import resource
import runpy
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from forks import fork_to
from test_trainer_runs import TOYS, assert_same_end, options_of
from trainer_toys import TINY, Digits

from dgg_kernels import GateConfig, GradientGate, linear_logprob
from python_trainer import checkpoint, compare, files, loop, report, tasks
from python_trainer.__main__ import main
from python_trainer.config import CheckpointError, TaskError, TrainConfig
from python_trainer.files import MetricsLog, read_metrics
from python_trainer.loop import Progress, prepare, train

CONFIG = replace(TINY, save_every=2)
ARM = Path("dgg", "seed-0")
forks = pytest.mark.skipif(sys.platform != "linux", reason="forks this process, and reads /proc")


@pytest.fixture(scope="module", autouse=True)
def toy_tasks() -> Iterator[None]:
    """The toys as tasks; one dot for a report's plots, which take longer than a run."""
    with pytest.MonkeyPatch.context() as patch:
        make_task = tasks.make_task

        def make(name: str, options: dict[str, Any]) -> tasks.Task:
            return TOYS[name](options) if name in TOYS else make_task(name, options)

        for module in (tasks, compare):
            patch.setattr(module, "make_task", make)
        patch.setattr(report, "draw", lambda *_: {"learning": ("A dot", b"png")})
        yield


def asked(out: Path, config: TrainConfig = CONFIG) -> list[str]:
    """Arguments of `train`."""
    settings = out.parent / f"{out.name}.toml"
    settings.write_text('task = "digits"')
    return ["train", "--out", str(out), "--config", str(settings), *options_of(config)]


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing has befallen."""
    out = tmp_path_factory.mktemp("unbroken") / "run"
    assert main(asked(out)) == 0
    return out


@pytest.fixture(scope="module")
def start() -> loop.WarmStart:
    return prepare(CONFIG, Digits())


def summary_of(out: Path) -> dict[str, Any]:
    return json.loads((out / "summary.json").read_text())


def assert_whole(out: Path) -> None:
    """Every checkpoint there can be read, and nothing half-written lies about."""
    state, complaints = checkpoint.load(out / ARM / "checkpoints")
    assert state is not None and not complaints
    assert not list(out.glob("**/*.tmp"))


def assert_resumes(out: Path, unbroken: Path) -> None:
    """`resume` ends as if nothing had happened."""
    assert main(["resume", "--out", str(out)]) == 0
    assert_same_end(unbroken / ARM, out / ARM)
    assert_whole(out)
    summary = summary_of(out)
    assert summary["error"] is None and not summary["interrupted"]
    assert summary["runs"][0]["finished"] and (out / "report.html").exists()


children: set[int] = set()


@pytest.fixture(autouse=True)
def none_outlives_its_test() -> Iterator[None]:
    yield
    for child in set(children):
        os.kill(child, signal.SIGKILL)
        exit_code(child)


def forked(act: Callable[[], Any]) -> int:
    """Id of a copy of this process, as `fork_to` makes it, which ends with its test."""
    child = fork_to(act)
    children.add(child)
    return child


def runs(child: int) -> bool:
    return os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None


def exit_code(child: int) -> int:
    _, status = os.waitpid(child, 0)
    children.remove(child)
    return os.waitstatus_to_exitcode(status)


def by_command_line(argv: list[str], said: Path) -> int:
    """`python -m python_trainer`, in a forked child: its exit code; what it says goes to a file."""
    sys.argv = ["python_trainer", *argv]
    with open(said, "w") as sys.stderr:
        try:
            runpy.run_module("python_trainer", run_name="__main__")
        except SystemExit as end:
            return int(end.code or 0)
    return 99


# -- SIGTERM --------------------------------------------------------------------------------------


@forks
def test_sigterm_is_answered_like_ctrl_c_and_loses_nothing(unbroken: Path, tmp_path: Path) -> None:
    said, rng, stopped = tmp_path / "said", random.Random(0), 0
    for number in itertools.count():
        out = tmp_path / f"run-{number}"
        argv, summary, code = [*asked(out), "--overwrite"], out / "summary.json", None
        while code != 0:
            child = forked(lambda argv=argv: by_command_line(argv, said))
            while runs(child) and not summary.exists():
                time.sleep(0.01)
            time.sleep(rng.uniform(0.02, 0.3))
            os.kill(child, signal.SIGTERM)
            code = exit_code(child)
            if code == 0:
                continue
            assert code == 143
            assert said.read_text() == f"interrupted: what was done is in {out}\n"
            written = summary_of(out)
            if not written["interrupted"]:  # it came when the report was drawn: no run was cut
                assert written["runs"][0]["finished"] and written["error"] is None
            assert not list(out.glob("**/*.tmp"))
            summary.unlink()  # the next one's is waited for
            # Cut off in its first save a run may have an empty folder; afterwards never again.
            if argv[0] == "resume" or any((out / ARM / "checkpoints").glob("*")):
                assert_whole(out)
                stopped, argv = stopped + 1, ["resume", "--out", str(out)]
        assert_resumes(out, unbroken)
        if stopped > 4:
            return


@forks
def test_sigterm_that_comes_again_and_again_is_answered_once(
    unbroken: Path, tmp_path: Path
) -> None:
    """A scheduler's, then torchrun's: in a backward, and whenever the summary is written."""
    out, said = tmp_path / "run", tmp_path / "said"

    def child() -> int:
        patch, begun = pytest.MonkeyPatch(), []

        def again(*_: torch.Tensor) -> None:
            begun.append(True)
            os.kill(os.getpid(), signal.SIGTERM)

        in_the_backward(patch, again, at=8)
        patch.setattr(compare, "commit", lambda: again() if begun else None)
        return by_command_line(asked(out), said)

    assert exit_code(forked(child)) == 143
    assert said.read_text() == f"interrupted: what was done is in {out}\n"
    assert summary_of(out)["interrupted"]
    assert_resumes(out, unbroken)


def test_a_run_that_is_told_to_end_while_it_ends_says_why(
    unbroken: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    """A rank whose peer is gone: first its collective fails, then torchrun asks it to end."""
    out, broken, asked_again = tmp_path / "run", [], iter([True])

    def gone(_: torch.Tensor) -> None:
        broken.append(True)
        raise RuntimeError("Connection closed by peer")

    def commit() -> None:
        if broken and next(asked_again, False):
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        in_the_backward(patch, gone, at=8)
        patch.setattr(compare, "commit", commit)
        assert main(asked(out)) == 130
    summary = summary_of(out)
    assert summary["interrupted"] and "Connection closed" in summary["error"]
    assert_resumes(out, unbroken)


# -- a full disk ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "nth"),
    [("run.json", 0), ("summary.json", 0), ("summary.json", 1), ("summary.json", 2),
     ("learning.png", 0), ("report.html", 0), ("state.json", 0)],
)  # fmt: skip
def test_a_disk_that_is_full_at_any_file_ends_in_one_line(
    name: str, nth: int, unbroken: Path, tmp_path: Path, capsys: Any, monkeypatch: Any
) -> None:
    out, write_bytes, full = tmp_path / "run", Path.write_bytes, False
    met = itertools.count()

    def write(path: Path, data: bytes) -> int:
        nonlocal full
        full = full or (path.name.startswith(f".{name}.") and next(met) == nth)
        if not full:
            return write_bytes(path, data)
        write_bytes(path, data[: len(data) // 2])
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", write)
        code, error = main(argv := asked(out)), capsys.readouterr().err
    assert full and code == 1
    assert error == "error: out: [Errno 28] No space left on device\n"
    assert not list(tmp_path.glob("**/*.tmp"))
    if name == "run.json":  # nothing had begun
        assert main(argv) == 0
    assert_resumes(out, unbroken)


@forks
def test_a_log_that_meets_the_end_of_the_disk_goes_on_from_the_checkpoint(
    unbroken: Path, tmp_path: Path
) -> None:
    """A limit of the kernel's on the size of files: it takes a part of a row, then none."""
    out, said = tmp_path / "run", tmp_path / "said"
    update_row = loop.update_row

    def limited(progress: Progress, *rest: Any) -> dict[str, Any]:
        if progress.updates_attempted == 9:
            size = (out / ARM / "metrics.jsonl").stat().st_size + 100
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
        return update_row(progress, *rest)

    def child() -> int:
        loop.update_row = limited
        return by_command_line(asked(out), said)

    assert exit_code(forked(child)) == 1
    assert said.read_text() == "error: out: [Errno 27] File too large\n"
    assert not (out / ARM / "metrics.jsonl").read_bytes().endswith(b"\n")
    assert read_metrics(out / ARM / "metrics.jsonl")[-1]["updates_attempted"] == 8
    assert "File too large" in summary_of(out)["error"]
    assert_whole(out)
    report.write(out)
    assert_resumes(out, unbroken)


def test_a_row_that_the_disk_takes_in_parts_is_whole(tmp_path: Path, monkeypatch: Any) -> None:
    class Short(io.FileIO):
        def write(self, data: Any) -> int:
            return super().write(data[:7])

    monkeypatch.setattr(files, "open", lambda path, *_, **__: Short(path, "ab"), raising=False)
    log = MetricsLog(tmp_path / "m.jsonl")
    rows = [{"type": "update", "loss": 0.1}, {"type": "eval", "accuracy": 0.25}]
    for row in rows:
        log.write(row)
    log.close()
    assert read_metrics(tmp_path / "m.jsonl") == rows
    assert log.size == (tmp_path / "m.jsonl").stat().st_size


# -- checkpoints ----------------------------------------------------------------------------------

OPERATIONS = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir")


def saved(folder: Path, number: int) -> None:
    checkpoint.save(folder, number, {"a": torch.full((1000,), number), "number": number})


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def no_space() -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


@forks
@pytest.mark.parametrize("fault", [kill, no_space])
def test_a_fault_at_any_step_of_a_save_leaves_the_newest_checkpoint_or_the_next(
    fault: Callable[[], None], tmp_path: Path
) -> None:
    """At every call that touches the folder, those that drop old checkpoints included."""

    def child(folder: Path, at: int) -> int:
        met = itertools.count()

        def meet(event: str, _: Any) -> None:
            if event in OPERATIONS and next(met) == at:
                fault()

        sys.addaudithook(meet)  # for good: of a child alone
        try:
            saved(folder, 3)
        except OSError:
            return 1
        return 0 if next(met) > at else 2  # 2: there is no such step

    codes = []
    while 2 not in codes:
        folder = tmp_path / str(len(codes))
        for number in (1, 2):
            saved(folder, number)
        codes.append(exit_code(forked(lambda f=folder: child(f, len(codes)))))
        state, complaints = checkpoint.load(folder)
        assert state is not None and not complaints
        assert state["number"] == state["a"][0] and state["number"] in (2, 3)
        assert state["number"] == 3 or codes[-1] in (-signal.SIGKILL, 1)
        saved(folder, 4)
        names = sorted(path.name for path in folder.iterdir())
        assert names == [f"{state['number']:08d}", "00000004"]  # nor is anything left behind
    assert len(codes) > 12
    assert codes[0] == codes[5] == (-signal.SIGKILL if fault is kill else 1)


def test_the_end_of_a_run_takes_no_checkpoint_away(
    start: loop.WarmStart, tmp_path: Path, monkeypatch: Any
) -> None:
    """Not even for a moment, where the last update was saved already and is the only one."""
    config = replace(CONFIG, gate="off", save_every=TINY.rollout_batches * TINY.num_iterations)
    rmtree, seen = checkpoint.shutil.rmtree, []

    def watched(path: Path, *rest: Any, **options: Any) -> None:
        rmtree(path, *rest, **options)
        seen.append(checkpoint.progress_in(tmp_path / "checkpoints"))

    monkeypatch.setattr(checkpoint.shutil, "rmtree", watched)
    train(config, start, tmp_path, Progress())
    first = next(i for i, progress in enumerate(seen) if progress)
    assert len(seen[first:]) > 1 and all(seen[first:]) and seen[-1]["finished"]


def test_a_log_is_on_the_disk_before_the_checkpoint_that_counts_on_it(
    start: loop.WarmStart, tmp_path: Path, monkeypatch: Any
) -> None:
    fsync, rename, synced = os.fsync, Path.rename, 0

    def watched(descriptor: int) -> None:
        nonlocal synced
        fsync(descriptor)
        if os.readlink(f"/proc/self/fd/{descriptor}").endswith("metrics.jsonl"):
            synced = os.fstat(descriptor).st_size

    def renamed(path: Path, to: Path) -> Path:
        state = json.loads((path / "state.json").read_text())["state"]
        assert state["log_bytes"] == synced > 0
        return rename(path, to)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", watched)
        patch.setattr(Path, "rename", renamed)
        train(CONFIG, start, tmp_path, Progress())
    os.truncate(tmp_path / "metrics.jsonl", 1000)
    with pytest.raises(CheckpointError, match=r"metrics.jsonl: expected at least \d+ bytes, got 1"):
        train(CONFIG, start, tmp_path, Progress())


# -- memory, numbers, clocks ----------------------------------------------------------------------


def in_the_backward(patch: Any, act: Callable[[torch.Tensor], Any], at: int) -> None:
    """Call `act` with a gradient in the middle of the policy, in backward number `at`."""
    spread, met = loop.spread, itertools.count(1)

    def hooked(policy: Any, *rest: Any) -> Any:
        policy.middle.register_hook(lambda grad: act(grad) if next(met) == at else None)
        return spread(policy, *rest)

    patch.setattr(loop, "spread", hooked)


def out_of_memory(_: torch.Tensor) -> None:
    torch.empty(2**50, dtype=torch.int8)  # the allocator's own error


def out_of_device_memory(_: torch.Tensor) -> None:
    raise torch.OutOfMemoryError("CUDA out of memory")


@pytest.mark.parametrize("act", [out_of_memory, out_of_device_memory])
def test_no_memory_in_the_backward_ends_a_run_that_resumes(
    act: Callable[[torch.Tensor], None], unbroken: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        in_the_backward(patch, act, at=8)
        with pytest.raises(RuntimeError, match="memory"):  # a traceback, and exit code 1
            main(asked(out))
    summary = summary_of(out)
    assert "memory" in summary["error"] and not summary["runs"][0]["finished"]
    assert summary["runs"][0]["updates_attempted"] == 8
    assert_whole(out)
    assert_resumes(out, unbroken)


def test_a_nan_in_the_gradient_is_shut_out_and_the_run_goes_on(
    start: loop.WarmStart, tmp_path: Path, monkeypatch: Any
) -> None:
    """Even in a layer that the gate does not look at: the global norm has it."""
    in_the_backward(monkeypatch, lambda grad: grad * torch.nan, at=8)
    train(replace(CONFIG, gate="off"), start, tmp_path, Progress())
    spoilt = [row for row in read_metrics(tmp_path / "metrics.jsonl") if row["type"] == "update"][7]
    assert spoilt["gate/shut"] and spoilt["dwd/lm_head"] == spoilt["dwd/middle"] == 0.0
    state, _ = checkpoint.load(tmp_path / "checkpoints")
    assert state is not None and state["progress"]["finished"]
    assert all(torch.isfinite(x).all() for name, x in state.items() if name.startswith("model."))


@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("foreseen", [False, True])
def test_the_gate_goes_on_after_a_backward_that_failed(foreseen: bool, accumulate: bool) -> None:
    """As if the batch had ended before it."""

    reached = []

    def run(fails: bool) -> list[Any]:
        torch.manual_seed(0)
        body, head = torch.nn.Linear(5, 8), torch.nn.Linear(8, 37, bias=False)
        optimizer = torch.optim.AdamW([*body.parameters(), head.weight], lr=0.05, fused=True)
        energy = "loss" if foreseen else "head"
        config = GateConfig(threshold=0.0, window=3, accumulate=accumulate, energy=energy)
        gate, seen = GradientGate(config, head.weight), []
        gate.attach(optimizer, max_grad_norm=0.2)
        for batch, use in itertools.product(range(6), range(4)):
            if use == 0:
                gate.new_batch()
                x, y = torch.randn(12, 5), torch.randint(37, (12,))
            if gate.is_shut() or (batch == 2 and use > 1):
                continue
            optimizer.zero_grad(set_to_none=True)
            hidden = body(x).tanh()
            loss = -linear_logprob(hidden, head.weight, y, gate=gate, grad_eps=0.0).logp.mean()
            if foreseen:
                gate.foresee(loss)
            if (batch, use) == (2, 1):
                reached.append(fails)
                if fails:
                    hidden.register_hook(out_of_memory)  # after the head's backward, before that
                    with pytest.raises(RuntimeError, match="memory"):  # of the body
                        loss.backward()
                continue
            loss.backward()
            gate.decide()
            optimizer.step()
            seen += [
                gate.state_dict()["state"],
                gate.found_inf.clone(),
                head.weight.detach().clone(),
            ]
        return seen

    broken, whole = run(fails=True), run(fails=False)
    assert reached == [True, False]
    assert len(broken) == len(whole) > 3 * 9
    for mine, theirs in zip(broken, whole, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=0, equal_nan=True)


def test_clocks_that_jump_change_no_number_and_no_limit_on_time(
    unbroken: Path, start: loop.WarmStart, tmp_path: Path, monkeypatch: Any
) -> None:
    out, rng = tmp_path / "run", random.Random(0)
    with monkeypatch.context() as patch:
        for name in ("time", "monotonic", "perf_counter"):
            clock = getattr(time, name)
            patch.setattr(time, name, lambda clock=clock: clock() + rng.uniform(-1e7, 1e7))
        assert main(asked(out)) == 0
        assert_same_end(unbroken / ARM, out / ARM)
        seconds = summary_of(out)["runs"][0]["seconds"].values()
        assert max(map(abs, seconds)) > 1e5  # they did jump
        patch.setattr(Digits, "verify", lambda *_: signal.pause())
        with pytest.raises(TaskError, match="no answer within task_timeout"):
            train(replace(CONFIG, task_timeout=0.2), start, tmp_path / "hangs", Progress())


# -- several processes ----------------------------------------------------------------------------

TWO = replace(CONFIG, rollout_batches=16, eval_every=8, warmup_max_steps=1)
MATH = ["--task", "math", "--task-option", "dataset=chain_sum"]  # that torchrun knows, too


def two_ranks(
    out: Path, command: str, *argv: str, befall: Callable[[int], None] = lambda rank: None
) -> list[int]:
    """Ids of two forked processes as torchrun would start them, without its watch over them."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])

    def rank(number: int) -> int:
        os.environ |= {"RANK": str(number), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
                       "MASTER_PORT": port}  # fmt: skip
        befall(number)
        return by_command_line([command, "--out", str(out), *argv], out / f"said.{number}")

    return [forked(lambda number=number: rank(number)) for number in range(2)]


def logged(out: Path) -> int:
    metrics = out / ARM / "metrics.jsonl"
    return metrics.read_bytes().count(b"\n") if metrics.exists() else 0


def wait_for(out: Path, rows: int) -> None:
    deadline = time.monotonic() + 120
    while logged(out) < rows:
        assert time.monotonic() < deadline
        assert all(map(runs, children))
        time.sleep(0.02)


def assert_cut_off(out: Path) -> None:
    summary = summary_of(out)
    assert (summary["interrupted"] or summary["error"]) and not summary["runs"][0]["finished"]
    assert_whole(out)


def ranks_of(torchrun: int) -> list[int]:
    """Process ids of its two ranks, in order."""
    children = Path(f"/proc/{torchrun}/task/{torchrun}/children").read_text().split()
    environments = {int(child): Path(f"/proc/{child}/environ").read_bytes() for child in children}
    ranks = {
        int(line.removeprefix(b"RANK=")): child
        for child, environment in environments.items()
        for line in environment.split(b"\0")
        if line.startswith(b"RANK=")
    }
    return [ranks[0], ranks[1]]


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory, unbroken: Path) -> Path:
    """A run of two ranks that nothing has befallen; what they import is there already."""
    tasks.make_task("math", {"dataset": "chain_sum"})
    out = tmp_path_factory.mktemp("two")
    assert [*map(exit_code, two_ranks(out, "train", *MATH, *options_of(TWO)))] == [0, 0]
    return out


@forks
def test_a_rank_that_is_killed_ends_the_others_and_the_run_resumes(
    two: Path, tmp_path: Path
) -> None:
    torchrun = subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m",
         "python_trainer", "train", "--out", str(tmp_path), *MATH, *options_of(TWO)],
        stderr=subprocess.DEVNULL, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    try:
        wait_for(tmp_path, 20)
        ranks = ranks_of(torchrun.pid)
        os.kill(ranks[1], signal.SIGKILL)
        assert torchrun.wait(timeout=45) != 0  # it grants the others 30 s
    finally:
        torchrun.kill()
    assert not any(Path(f"/proc/{pid}").exists() for pid in ranks)
    assert_cut_off(tmp_path)

    ranks = two_ranks(tmp_path, "resume")
    wait_for(tmp_path, logged(tmp_path) + 10)
    for pid in ranks:  # as torchrun hands on what a scheduler sends it
        os.kill(pid, signal.SIGTERM)
    assert 0 not in map(exit_code, ranks)
    assert_cut_off(tmp_path)

    assert [*map(exit_code, two_ranks(tmp_path, "resume"))] == [0, 0]
    assert_same_end(two / ARM, tmp_path / ARM)


@forks
def test_a_slow_rank_is_waited_for_and_changes_nothing(two: Path, tmp_path: Path) -> None:
    ranks = two_ranks(tmp_path, "train", *MATH, *options_of(TWO))
    for pid in (*ranks, *ranks):
        wait_for(tmp_path, logged(tmp_path) + 8)
        os.kill(pid, signal.SIGSTOP)
        time.sleep(0.5)
        os.kill(pid, signal.SIGCONT)
    assert [*map(exit_code, ranks)] == [0, 0]
    assert_same_end(two / ARM, tmp_path / ARM)


@forks
def test_a_nan_on_one_rank_shuts_the_gate_on_all(two: Path, tmp_path: Path) -> None:
    def befall(rank: int) -> None:
        in_the_backward(
            pytest.MonkeyPatch(), lambda grad: grad * torch.nan, at=9 if rank == 1 else -1
        )

    ranks = two_ranks(tmp_path, "train", *MATH, *options_of(TWO), befall=befall)
    assert [*map(exit_code, ranks)] == [0, 0]
    rows = [[row for row in read_metrics(out / ARM / "metrics.jsonl") if row["type"] == "update"]
            for out in (tmp_path, two)]  # fmt: skip
    assert rows[0][:8] == rows[1][:8] and not rows[1][8]["gate/shut"]
    spoilt, after = rows[0][8:10]
    assert spoilt["gate/shut"] and spoilt["dwd/lm_head"] == spoilt["dwd/middle"] == 0.0
    assert after["rollouts"] == spoilt["rollouts"] + 1
    assert after["kl"] == 0.0  # sampled from what both ranks still have
