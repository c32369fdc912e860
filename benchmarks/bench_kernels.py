"""Where a GPU's time goes in the lm_head: ceilings first, then every kernel, then other tiles.

    python -m benchmarks.bench_kernels                 # N=8192, D=4096, V=131072, bf16
    python -m benchmarks.bench_kernels --tune          # also times configs.CANDIDATES

Ceilings are a device-to-device copy (bytes read plus written) and the bare product
`hidden @ weight.T` of the same shape. Times are medians of CUDA events.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch.profiler import ProfilerActivity, profile

from dgg_kernels import configs, linear_logprob

from . import common
from .rows import Rows, real_rows


def milliseconds(run: Callable[[], Any], rounds: int = 10) -> float:
    """Median over the rounds, after two that warm up."""
    times = []
    for round_ in range(rounds + 2):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run()
        end.record()
        end.synchronize()
        if round_ >= 2:
            times.append(begin.elapsed_time(end))
    return common.summary(times)["median"]


def ceilings(rows: Rows) -> dict[str, float]:
    """What this machine can do at most: copy in bytes/s, and the bare product in FLOP/s."""
    source = torch.randn(2**29, device="cuda").to(torch.bfloat16)
    target = torch.empty_like(source)
    copy = milliseconds(lambda: target.copy_(source))
    N, D = rows.hidden.shape
    V = rows.weight.shape[0]
    product = milliseconds(lambda: rows.hidden @ rows.weight.T)
    return {
        "copy_bytes_per_s": 2 * source.numel() * 2 / copy * 1e3,
        "bare_product_ms": product,
        "bare_product_flop_per_s": 2 * N * D * V / product * 1e3,
    }


def steps(rows: Rows, c: torch.Tensor) -> dict[str, Callable[[], None]]:
    """Forward and backward as they are used: with and without a reference, exact, forward only."""
    leaves = [t.requires_grad_() for t in (rows.hidden.detach(), rows.weight.detach())]

    def step(**options: Any) -> None:
        leaves[0].grad = leaves[1].grad = None
        (linear_logprob(*leaves, rows.target, **options).logp * c).sum().backward()

    def forward() -> None:
        with torch.no_grad():
            linear_logprob(*leaves, rows.target)

    return {
        "forward alone": forward,
        "with lse_ref": lambda: step(lse_ref=rows.lse),
        "without lse_ref": step,
        "grad_eps=0": lambda: step(grad_eps=0.0),
        "screen int8, with lse_ref": lambda: step(screen="int8", lse_ref=rows.lse),
        "screen int8": lambda: step(screen="int8"),
        "screen fp8, with lse_ref": lambda: step(screen="fp8", lse_ref=rows.lse),
    }


def accuracy(rows: Rows) -> dict[str, dict[str, float]]:
    """Error of the log-prob against fp64, and what the screen says of itself."""
    leaves = (rows.hidden.detach(), rows.weight.detach())
    exact = []
    weight = leaves[1].double()
    for x, y in zip(leaves[0].split(256), rows.target.split(256), strict=True):
        z = x.double() @ weight.T
        exact.append(z.gather(1, y[:, None])[:, 0] - z.logsumexp(1))
    del weight
    found = {}
    variants: dict[str, dict[str, Any]] = {"none": {}, "int8": {"screen": "int8"},
                                           "fp8": {"screen": "fp8"}}  # fmt: skip
    for name, options in variants.items():
        with torch.no_grad():
            out = linear_logprob(*leaves, rows.target, lse_ref=rows.lse, **options)
        off = out.logp.double() - torch.cat(exact)
        found[name] = {
            "mean_abs": float(off.abs().mean()),
            "max_abs": float(off.abs().max()),
            "bias": float(off.mean()),
            "bias_standard_error": float(off.std() / len(off) ** 0.5),
        }
        if out.screen_stats is not None:
            stats = out.screen_stats
            found[name] |= {
                "outside_bound": float((off.abs() > stats.error_bound + 1e-4).sum()),
                "mean_bound": float(stats.error_bound.mean()),
                "exact_rows": float(stats.exact_rows),
                "refined_per_row": float(stats.refined) / len(off),
                "rms_error": float(stats.rms_error),
                "missed_per_row": float(stats.missed) / len(off),
            }
    return found


def replay_milliseconds(run: Callable[[], None]) -> float:
    """Of the same step captured in a CUDA graph and replayed: without the host's part."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return milliseconds(graph.replay)


def kernels(run: Callable[[], None], rounds: int = 3) -> dict[str, dict[str, float]]:
    """Milliseconds and launches of every kernel in one run, longest first."""
    run()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for _ in range(rounds):
            run()
        torch.cuda.synchronize()
    found = {
        event.key: {
            "ms": event.self_device_time_total / 1e3 / rounds,
            "launches": event.count / rounds,
        }
        for event in profiler.key_averages()
        if event.self_device_time_total > 0
    }
    return dict(sorted(found.items(), key=lambda item: -item[1]["ms"]))


# Field of the configuration -> the kernel that it shapes, and the steps to time it in.
TUNED = {
    "tile": ("scan_kernel", ("forward alone", "with lse_ref")),
    "tile_8bit": ("screen_kernel", ("screen int8, with lse_ref", "screen fp8, with lse_ref")),
    "owner": ("owner_kernel", ("with lse_ref",)),
    "row": ("row_kernel", ("with lse_ref",)),
    "refine": ("refine_kernel", ("screen int8, with lse_ref",)),
}


@contextmanager
def use_config(architecture: str, **fields: Any) -> Iterator[None]:
    """The kernels with another configuration, for the time of a with block."""
    before = configs.CONFIGS.get(architecture)
    now = configs.config_for(architecture)
    configs.CONFIGS[architecture] = replace(now, **fields)
    try:
        yield
    finally:
        if before is None:
            del configs.CONFIGS[architecture]
        else:
            configs.CONFIGS[architecture] = before


def tune(rows: Rows, c: torch.Tensor, say: Callable[[str], None]) -> list[dict[str, Any]]:
    """Milliseconds of a kernel with every candidate configuration, the one in use first."""
    from dgg_kernels.lm_head_forward import architecture

    name = architecture(rows.hidden.device)
    config = configs.config_for(name)
    runs = steps(rows, c)
    found = []
    for field, (kernel, chosen) in TUNED.items():
        for candidate in (getattr(config, field), *configs.CANDIDATES[config.name].get(field, ())):
            result: dict[str, Any] = {"field": field, "config": asdict(candidate), "ms": {}}
            with use_config(name, **{field: candidate}):
                for step in chosen:
                    time.sleep(0.1)
                    try:
                        result["ms"][step] = kernels(runs[step])[kernel]["ms"]
                    except Exception as error:  # one that does not fit is a result, too
                        result["ms"][step] = f"{type(error).__name__}: {str(error)[:100]}"
            say(f"{field} {candidate}: {result['ms']}")
            found.append(result)
    return found


def main() -> None:
    """Measure, show, record."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=8192, help="N")
    parser.add_argument("--features", type=int, default=4096, help="D")
    parser.add_argument("--vocabulary", type=int, default=131072, help="V")
    parser.add_argument("--temperature", type=float, default=0.6)
    parser.add_argument("--tune", action="store_true")
    parser.add_argument("--save", metavar="NAME", help="write benchmarks/results/NAME.json")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("bench_kernels needs a GPU")
    console = Console(width=None if sys.stdout.isatty() else 140)
    device = torch.device("cuda")
    rows = real_rows(args.rows, args.temperature, device=device, dtype=torch.bfloat16,
                     D=args.features, V=args.vocabulary)  # fmt: skip
    c = torch.randn(args.rows, device=device)
    record: dict[str, Any] = {
        "benchmark": "kernels",
        "shape": {"N": args.rows, "D": args.features, "V": args.vocabulary},
        "dtype": "bfloat16",
        "entropy": rows.entropy,
        "stamp": common.stamp(device),
        "ceilings": ceilings(rows),
    }
    console.print(f"N={args.rows} D={args.features} V={args.vocabulary}, entropy "
                  f"{rows.entropy:.2f}: {record['ceilings']}")  # fmt: skip
    record["accuracy"] = accuracy(rows)
    for name, of in record["accuracy"].items():
        console.print(name, {key: f"{value:.2e}" for key, value in of.items()})
    record["steps"], record["replayed"], record["kernels"] = {}, {}, {}
    for name, run in steps(rows, c).items():
        time.sleep(1.0)  # a hot GPU lowers its clocks
        record["steps"][name] = milliseconds(run)
        time.sleep(0.5)
        record["replayed"][name] = replay_milliseconds(run)
        record["kernels"][name] = kernels(run)
        times = f"{record['steps'][name]:.2f} ms, {record['replayed'][name]:.2f} in a graph"
        table = Table(title=f"{name}: {times}")
        for column in ("kernel", "ms", "launches"):
            table.add_column(column, justify="right" if column != "kernel" else "left")
        for kernel, of in list(record["kernels"][name].items())[:12]:
            table.add_row(kernel[:90], f"{of['ms']:.3f}", f"{of['launches']:.0f}")
        console.print(table)
    if args.tune:
        record["tune"] = tune(rows, c, console.print)
    if args.save:
        console.print(f"written: {common.save(args.save, record)}")


if __name__ == "__main__":
    main()
