"""Everything worth measuring on a machine with an NVIDIA GPU, in order of worth, within a budget.

    python -m benchmarks.gpu_suite --out out --minutes 9
    python -m benchmarks.gpu_suite --out out --only tests kernels
    python -m benchmarks.gpu_suite --out out --device cpu      # a rehearsal, small shapes

Every stage is a process of its own with a time limit; its output is in OUT/<stage>.log, its records
in OUT/*.json, and OUT/suite.json says how each stage ended, written anew after every stage. A stage
that fails does not stop the next, except that no speed is measured when the tests are red.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from . import common

ROOT = Path(__file__).parents[1]
LARGE = ("--rows", "8192", "--features", "4096", "--vocabulary", "131072")
# The fastest of each kind, for the shapes beside the first.
CHOSEN = ("--peers", "ours", "ours, with lse_ref", "ours, with lse_ref, screen int8",
          "ours, with lse_ref, screen fp8", "ours, grad_eps=0", "torch.compile",
          "Liger scaled cross-entropy", "Cut Cross-Entropy")  # fmt: skip
# (D, V) of heads that people train, beside the largest above.
MODELS = {
    "qwen2.5-1.5b": (1536, 151936),
    "qwen2.5-7b": (3584, 152064),
    "qwen3-4b": (2560, 151936),
    "llama-3.1-8b": (4096, 128256),
    "gemma-2-9b": (3584, 256000),
}


@dataclass(frozen=True)
class Stage:
    """One process: `minutes` is its limit, `measures` whether it needs the tests to be green."""

    name: str
    command: Sequence[str]
    minutes: float
    measures: bool = True


def python(module: str, *arguments: str) -> list[str]:
    return [sys.executable, "-m", module, *arguments]


def head(name: str, *arguments: str) -> list[str]:
    return python("benchmarks.bench_lm_head", *arguments, "--save", f"lm_head_{name}")


def gpu_stages() -> list[Stage]:
    """In order of worth: a short lease gets the first ones."""
    bf16 = ("--device", "cuda", "--dtype", "bfloat16", "--rounds", "5")
    chosen = (*bf16, *CHOSEN)
    stages = [
        Stage("info", python("dgg_kernels.info"), 0.5, measures=False),
        Stage("tests", [*pytest(6), "tests/gpu", "tests/test_triton_kernels.py"], 3, False),
        Stage("kernels", python("benchmarks.bench_kernels", "--save", "kernels_gpu"), 2),
        Stage("head", head("gpu", *bf16, *LARGE, "--temperature", "0.6"), 3),
        Stage("gate", python("benchmarks.bench_gate", *bf16[:4], *LARGE, "--save", "gate_gpu"), 1),
    ]
    for temperature in ("1.0", "0.4"):
        options = (*chosen, *LARGE, "--temperature", temperature)
        stages.append(Stage(f"head-T{temperature}", head(f"gpu_T{temperature}", *options), 2))
    zero = (*chosen, *LARGE, "--zero-rows", "0.5", "--temperature", "0.6")
    stages.append(Stage("head-zero-rows", head("gpu_zero_rows", *zero), 2))
    if sanitizer := shutil.which("compute-sanitizer"):
        for tool in ("memcheck", "racecheck"):
            which = "small or decides or partial or graph" if tool == "memcheck" else "partial"
            command = [sanitizer, "--tool", tool, "--error-exitcode", "9", *pytest(0), "-k", which]
            stages.append(Stage(tool, [*command, "tests/gpu"], 2, measures=False))
    for rows in ("4096", "32768"):
        for model, (features, vocabulary) in MODELS.items():
            shape = ("--rows", rows, "--features", str(features), "--vocabulary", str(vocabulary))
            options = (*chosen, *shape, "--temperature", "0.6")
            stages.append(Stage(f"{model}-{rows}", head(f"gpu_{model}_{rows}", *options), 2))
    stages.append(
        Stage("tune", python("benchmarks.bench_kernels", "--tune", "--save", "tune_gpu"), 3)
    )
    return stages


def cpu_stages() -> list[Stage]:
    """The same harness where there is no GPU, on small shapes."""
    cpu = ("--device", "cpu", "--rows", "256", "--rounds", "2")
    return [
        Stage("info", python("dgg_kernels.info"), 0.5, measures=False),
        Stage("tests", [*pytest(0), "tests/test_lm_head.py", "tests/test_gate.py"], 4, False),
        Stage("head", head("rehearsal", *cpu), 3),
        Stage("gate", python("benchmarks.bench_gate", "--rows", "256", "--rounds", "2"), 2),
    ]


def pytest(processes: int) -> list[str]:
    parallel = processes and importlib.util.find_spec("xdist")
    return python("pytest", "-q", "-p", "no:cacheprovider", *(("-n", str(processes)) if parallel
                                                              else ()))  # fmt: skip


def run(stage: Stage, out: Path, seconds: float) -> str:
    """Run it; "ok", or how it failed."""
    with (out / f"{stage.name}.log").open("w") as log:
        try:
            done = subprocess.run(
                stage.command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, timeout=seconds,
                env={**os.environ, "DGG_RESULTS": str(out)},
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            return f"stopped after {seconds:.0f} s"
    return "ok" if done.returncode == 0 else f"exit {done.returncode}"


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
    if args.device == "cuda" and not torch.cuda.is_available():
        sys.exit("no CUDA device: --device cpu rehearses")
    out = args.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    console = Console(width=None if sys.stdout.isatty() else 140)
    stages = gpu_stages() if args.device == "cuda" else cpu_stages()
    if unknown := set(args.only or ()) - {stage.name for stage in stages}:
        sys.exit(f"--only: unknown {sorted(unknown)}; of {[stage.name for stage in stages]}")
    record = {"stamp": common.stamp(torch.device(args.device)), "stages": {}}
    ended = time.monotonic() + 60 * args.minutes
    red = False
    for stage in stages:
        if args.only and stage.name not in args.only:
            continue
        began, left = time.monotonic(), ended - time.monotonic()
        if red and stage.measures:
            result = "skipped: tests are red"
        elif left < 10:
            result = "skipped: no time left"
        else:
            console.print(f"[bold]{stage.name}[/bold]: {' '.join(map(str, stage.command))}")
            result = run(stage, out, min(left, 60 * stage.minutes))
            console.print((out / f"{stage.name}.log").read_text()[-6000:], markup=False)
        red |= stage.name == "tests" and result != "ok"
        record["stages"][stage.name] = {"result": result, "seconds": time.monotonic() - began}
        (out / "suite.json").write_text(json.dumps(record, indent=1) + "\n")
    table = Table("stage", "result", "seconds")
    for name, stage in record["stages"].items():
        table.add_row(name, stage["result"], f"{stage['seconds']:.0f}")
    console.print(table)


if __name__ == "__main__":
    main()
