"""Everything worth measuring on a machine with an NVIDIA GPU, in order of worth, within a budget.

    python -m benchmarks.gpu_suite --out out --minutes 9
    python -m benchmarks.gpu_suite --out out --only step models     # another ten minutes
    python -m benchmarks.gpu_suite --out out --device cpu           # the same on small shapes

Every stage is a process of its own with a time limit; its output is in OUT/<stage>.log, its records
in OUT/*.json, and OUT/suite.json says how each stage ended, written anew after every stage and gone
on with by a later call at the same commit. A stage that fails does not stop the next, except that
no speed is measured when the tests are red. Figures and tables are made from whatever was recorded
(benchmarks/plot.py).

Where there is no git, DGG_COMMIT names the commit. DGG_CACHE names a folder with the rows to
measure on, for a machine that has not got what samples them (benchmarks/rows.py).
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from . import common, rows

ROOT = Path(__file__).parents[1]
PLOTTING = 40.0  # seconds, kept for it
MODELS = tuple(name for name in rows.HEADS if name != "smollm2-135m")
# The fastest of each kind, for the shapes beside the first.
CHOSEN = ("--peers", "ours", "ours, with lse_ref", "ours, with lse_ref, screen int8",
          "ours, with lse_ref, screen fp8", "ours, grad_eps=0", "torch.compile",
          "Liger scaled cross-entropy", "Cut Cross-Entropy")  # fmt: skip
CHOSEN_CPU = ("--peers", "ours", "ours, screen int8", "torch eager")


@dataclass(frozen=True)
class Stage:
    """One process: `minutes` is its limit, `measures` whether it needs the tests to be green."""

    name: str
    command: Sequence[str]
    minutes: float
    measures: bool = True


def python(module: str, *arguments: str) -> list[str]:
    return [sys.executable, "-m", module, *arguments]


def stages(device: str) -> list[Stage]:
    """In order of worth: a short lease gets the first ones. A CPU gets the same on small shapes."""
    gpu = device == "cuda"
    on = ("--device", device)
    dtype = ("--dtype", "bfloat16") if gpu else ()
    size = ("--features", "4096", "--vocabulary", "131072") if gpu else ()
    n = ("--rows", "8192") if gpu else ("--rows", "128")
    rounds = ("--rounds", "5") if gpu else ("--rounds", "1")
    policy = ("--temperature", "0.6")

    def head(name: str, minutes: float, *arguments: str, record: str = "lm_head_gpu") -> Stage:
        command = python("benchmarks.bench_lm_head", *on, *dtype, *rounds, *arguments)
        return Stage(name, [*command, "--save", record], minutes)

    chosen = CHOSEN if gpu else CHOSEN_CPU
    # What real models would need does not fit a rehearsal; their softcaps do.
    models = ("--model", *MODELS, *(() if gpu else ("--features", "640", "--vocabulary", "50000")))
    others = ("4096", "32768") if gpu else ("64", "256")
    small = ("--features", "576", "--vocabulary", "49152")
    kernels = (*on, *n, *(size or small))
    tests = ("tests/gpu", "tests/test_triton_kernels.py") if gpu else ("tests/test_lm_head.py",)
    found = [
        Stage("info", python("dgg_kernels.info"), 0.5, measures=False),
        Stage("tests", [*pytest(6 if gpu else 0), *tests], 3, measures=False),
        Stage("kernels", python("benchmarks.bench_kernels", *kernels, "--save", "kernels_gpu"), 2),
        head("head", 3.5, *size, *n, *policy),  # a peer's JIT takes a minute
        Stage("gate", python("benchmarks.bench_gate", *on, *dtype, *size, *n, *policy,
                             *(() if gpu else ("--rounds", "2")), "--save", "gate_gpu"), 1),
        Stage("step", python("benchmarks.bench_step", *on, *rounds, "--model",
                             "qwen2.5-1.5b" if gpu else "tiny", "--save", "step_gpu"), 3),
        head("rows", 2.5, *size, "--rows", *others, *policy, *chosen),
        head("models", 4, *models, *n, "--entropy", "0.8", *chosen, record="lm_head_models"),
        head("entropies", 3, *size, *n, "--entropy", "1.7", "0.3", "dense", *chosen),
        head("zero-rows", 1.5, *size, *n, *policy, "--zero-rows", "0.5", *chosen,
             record="lm_head_zero_rows"),
        head("errors", 1.5, *size, *n, *policy, "--peers", "ours, grad_eps=0",
             "--grad-eps", "-6", "-8", "-10", "-12", "-14", record="lm_head_errors"),
    ]  # fmt: skip
    if checkout := os.environ.get("VERL_CHECKOUT"):  # a folder with verl's tests/utils
        own = [sys.executable, "tests/verl_own_tests.py", checkout, "--save", "verl_own_tests"]
        found.insert(2, Stage("verl", own, 2, measures=False))
    if not gpu:
        compiled = [*pytest(2), "tests/test_triton_compile.py", "-k", "sm_90"]
        found.append(Stage("compile", compiled, 4, measures=False))
    elif sanitizer := shutil.which("compute-sanitizer"):
        for tool in ("memcheck", "racecheck"):
            which = "193 or decides or partial or graph" if tool == "memcheck" else "partial"
            command = [sanitizer, "--tool", tool, "--error-exitcode", "9", *pytest(0), "-k", which]
            found.append(Stage(tool, [*command, "tests/gpu"], 2, measures=False))
    some = others if gpu else others[:1]
    found.append(head("models-rows", 8, *models, "--rows", *some, "--entropy", "0.8", *chosen,
                      record="lm_head_models"))  # fmt: skip
    if gpu:
        tuned = python("benchmarks.bench_kernels", "--tune", "--save", "tune_gpu")
        found.append(Stage("tune", tuned, 3))
    return found


def pytest(processes: int) -> list[str]:
    parallel = processes and importlib.util.find_spec("xdist")
    return python("pytest", "-q", "-p", "no:cacheprovider", *(("-n", str(processes)) if parallel
                                                              else ()))  # fmt: skip


def run(stage: Stage, out: Path, seconds: float) -> str:
    """Run it; "ok", or how it failed."""
    with (out / f"{stage.name}.log").open("w") as log:
        try:
            process = subprocess.Popen(
                stage.command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT,
                env={**os.environ, "DGG_RESULTS": str(out)}, process_group=0,
            )  # fmt: skip
        except OSError as error:
            return f"did not start: {error}"
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGINT)  # pytest then says what failed, others where
            with suppress(subprocess.TimeoutExpired):
                process.wait(5)
            return f"stopped after {seconds:.0f} s"
        finally:  # whatever ends it, its children end with it: they may hold the GPU
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return "ok" if code == 0 else f"exit {code}"


def begun(file: Path, stamp: dict[str, Any]) -> dict[str, Any]:
    """The record of an earlier call at this commit, or a new one."""
    if file.exists():
        record = json.loads(file.read_text())
        if all(record["stamp"][name] == stamp[name] for name in ("commit", "dirty", "device")):
            return record
    return {"stamp": stamp, "stages": {}}


def main() -> None:
    """Run the stages and say how each ended."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for logs and records")
    parser.add_argument("--minutes", type=float, default=9.0, help="for everything together")
    parser.add_argument("--only", nargs="*", metavar="STAGE", help="just these, in their order")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    args = parser.parse_args()
    ended = time.monotonic() + 60 * args.minutes - PLOTTING
    if args.device == "cuda" and not torch.cuda.is_available():
        sys.exit("no CUDA device: --device cpu rehearses")
    out = args.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    console = Console(width=None if sys.stdout.isatty() else 140)
    planned = stages(args.device)
    if unknown := set(args.only or ()) - {stage.name for stage in planned}:
        sys.exit(f"--only: unknown {sorted(unknown)}; of {[stage.name for stage in planned]}")
    planned = [stage for stage in planned if not args.only or stage.name in args.only]
    stamp = common.stamp(torch.device(args.device))
    if not stamp["commit"]:
        sys.exit("commit: there is no git here: set DGG_COMMIT to the commit that is measured")
    if any(stage.measures for stage in planned):
        rows.cached()  # or no stage would have its rows
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # its stage ends with it
    record = begun(out / "suite.json", stamp)

    def carry_out(stage: Stage, seconds: float) -> None:
        console.print(f"[bold]{stage.name}[/bold]: {' '.join(stage.command)}")
        began = time.monotonic()
        result = run(stage, out, seconds)
        said = (out / f"{stage.name}.log").read_text(errors="replace")
        console.print(said[-6000:], markup=False)
        note(stage, result, time.monotonic() - began)

    def note(stage: Stage, result: str, seconds: float) -> None:
        if not (result.startswith("skipped") and stage.name in record["stages"]):
            record["stages"][stage.name] = {"result": result, "seconds": seconds}
        (out / "suite.json").write_text(json.dumps(record, indent=1) + "\n")

    for stage in planned:
        tests = record["stages"].get("tests", {"result": "ok"})["result"]
        red = tests != "ok" and not tests.startswith("skipped")
        left = ended - time.monotonic()
        if red and stage.measures:
            note(stage, "skipped: tests are red", 0.0)
        elif left < 10:
            note(stage, "skipped: no time left", 0.0)
        else:
            carry_out(stage, min(left, 60 * stage.minutes))
    plot = python("benchmarks.plot", "--results", str(out))
    carry_out(Stage("plot", plot, 1), PLOTTING)
    table = Table("stage", "result", "seconds")
    for name, stage in record["stages"].items():
        table.add_row(name, stage["result"], f"{stage['seconds']:.0f}")
    console.print(table)


if __name__ == "__main__":
    main()
