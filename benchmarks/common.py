"""What every benchmark shares: a record's stamp, interleaved timing, peak memory, fp64 truth."""

from __future__ import annotations

import argparse
import ctypes
import gc
import os
import random
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from python_trainer.files import device_name, now, versions, write_json

ROOT = Path(__file__).parent
RESULTS = Path(os.environ.get("DGG_RESULTS", ROOT / "results"))
_PACKAGES = ("torch", "triton", "dgg-kernels", "trl", "liger-kernel", "cut-cross-entropy",
             "quack-kernels", "verl", "transformers", "reasoning-gym", "numpy")  # fmt: skip


# What benchmarks write themselves: their newer records do not make the code another one.
_OUTPUTS = (":!results", ":!../docs/images")


class Refused(Exception):
    """A check against the reference is red: no speed is reported."""


def _output(*command: str) -> str | None:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def stamp(device: torch.device, threads: int | None = None) -> dict[str, Any]:
    """Device, versions, commit and date, so that a figure can be traced to what made it."""
    if device.type == "cuda":
        driver = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    else:
        driver = torch.backends.cpu.get_cpu_capability()
    git = ("git", "-C", str(ROOT))
    changes = _output(*git, "status", "--porcelain", "-uno", "--", "..", *_OUTPUTS)
    return {
        "device": device_name(str(device)),
        "driver": driver,
        "threads": threads or torch.get_num_threads(),
        "versions": {name: known for name, known in versions(_PACKAGES).items() if known},
        "commit": os.environ.get("DGG_COMMIT")  # where the checkout has no git
        or _output(*git, "rev-parse", "--short=12", "HEAD"),
        "dirty": None if changes is None else bool(changes),  # None: not known
        "date": now(),
    }


def parser(doc: str | None) -> argparse.ArgumentParser:
    """Of a benchmark's options, those that all have."""
    found = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    found.add_argument("--save", metavar="NAME", help="write benchmarks/results/NAME.json")
    return found


def save(name: str, record: dict[str, Any], out: Path = RESULTS) -> Path:
    """Write a record as JSON; an older one of that name is replaced whole."""
    path = out / f"{name}.json"
    write_json(path, record)
    return path


def synchronize(device: torch.device) -> None:
    """Wait for the device, so that a host clock can time it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def use_threads(threads: int) -> None:
    """Of the CPU. Denormal numbers count as zero there: on an Intel Xeon a product of them takes a
    hundred times as long, which would be most of eager's time at low entropies.
    """
    torch.set_num_threads(threads)
    torch.set_flush_denormal(True)


Phases = dict[str, float]  # seconds of each phase of one run


def interleave(
    variants: dict[str, Callable[[], Phases]], rounds: int, tick: Callable[[str], None]
) -> dict[str, list[Phases]]:
    """Run every variant once per round, so that drift of the machine hits all alike.

    In an order drawn for each round: what one leaves behind, such as memory that it gave back, is
    not always the same one's burden. One round before the first warms up and is dropped.
    """
    runs: dict[str, list[Phases]] = {name: [] for name in variants}
    for round_ in range(rounds + 1):
        for name in random.Random(round_).sample([*variants], len(variants)):
            variant = variants[name]
            tick(name)
            if torch.cuda.is_available():
                time.sleep(0.25)  # under unbroken load a GPU lowers its clocks
            phases = variant()
            if round_:
                runs[name].append(phases)
    return runs


def summary(values: list[float]) -> dict[str, float]:
    """Median and the 20th and 80th percentile."""
    ordered = sorted(values)
    at = lambda q: ordered[round(q * (len(ordered) - 1))]  # noqa: E731
    return {"median": statistics.median(ordered), "p20": at(0.2), "p80": at(0.8)}


def peak_extra_bytes(run: Callable[[], Any], device: torch.device) -> int:
    """Peak memory during `run()` beyond what was held before it."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        return torch.cuda.max_memory_allocated(device) - before
    # glibc keeps what was freed for the next one who asks: that would count for nothing.
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
        trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
    before = _status("VmRSS")
    run()
    return _status("VmHWM") - before


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return 1024 * int(line.split()[1])
    raise RuntimeError(f"/proc/self/status has no {field}")


def exact_gradients(
    hidden: Tensor, weight: Tensor, target: Tensor, c: Tensor, softcap: float | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """logp [N], and d_hidden, d_weight of sum(c logp), in fp64, a few rows at a time."""
    w = weight.double()
    d_weight = torch.zeros_like(w)
    logp, d_hidden = [], []
    for x, y, c_part in zip(hidden.split(128), target.split(128), c.split(128), strict=True):
        z = x.double() @ w.T
        slope = None
        if softcap is not None:
            z.div_(softcap).tanh_()
            slope = 1 - z**2
            z.mul_(softcap)
        z -= z.logsumexp(1, keepdim=True)
        logp.append(z.gather(1, y[:, None])[:, 0])
        d_z = z.exp_().mul_(-c_part.double()[:, None])
        d_z.scatter_add_(1, y[:, None], c_part.double()[:, None])
        if slope is not None:
            d_z.mul_(slope)
        d_hidden.append(d_z @ w)
        d_weight.addmm_(d_z.T, x.double())
    return torch.cat(logp), torch.cat(d_hidden), d_weight


def relative_error(got: Tensor, exact: Tensor) -> float:
    """||got - exact|| / ||exact|| in fp64."""
    return ((got.detach().double() - exact).norm() / exact.norm()).item()


def timed(device: torch.device, *phases: tuple[str, Callable[[], Any]]) -> Phases:
    """Run the phases in order; seconds of each."""
    seconds: Phases = {}
    for name, phase in phases:
        synchronize(device)
        began = time.perf_counter()
        phase()
        synchronize(device)
        seconds[name] = time.perf_counter() - began
    return seconds
