"""Where the time goes in the lm_head: ceilings first, then every kernel, then other tiles.

    python -m benchmarks.bench_kernels                 # a GPU, N=8192, D=4096, V=131072, bf16
    python -m benchmarks.bench_kernels --tune          # also times configs.CANDIDATES
    python -m benchmarks.bench_kernels --device cpu --rows 512 --features 576 --vocabulary 49152

Ceilings are a copy on the device (bytes read plus written) and the bare product
`hidden @ weight.T` of the same shape. Times are medians, on a GPU of CUDA events.
"""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from torch.profiler import ProfilerActivity, profile

from dgg_kernels import configs, linear_logprob

from . import common
from .rows import Rows, real_rows
from .tables import show

COPIED = {"cpu": 2**28, "cuda": 2**30}  # bytes, by which the copy's rate is taken


def milliseconds(run: Callable[[], Any], rounds: int = 10) -> float:
    """Median over the rounds, after two that warm up."""
    times = []
    for round_ in range(rounds + 2):
        if torch.cuda.is_available():
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            run()
            end.record()
            end.synchronize()
            elapsed = begin.elapsed_time(end)
        else:
            began = time.perf_counter()
            run()
            elapsed = 1e3 * (time.perf_counter() - began)
        if round_ >= 2:
            times.append(elapsed)
    return common.summary(times)["median"]


def ceilings(rows: Rows) -> dict[str, float]:
    """What this machine can do at most: copy in bytes/s, and the bare product in FLOP/s."""
    device = rows.hidden.device
    source = torch.ones(COPIED[device.type], device=device, dtype=torch.uint8)
    target = torch.empty_like(source)
    copy = milliseconds(lambda: target.copy_(source))
    N, D = rows.hidden.shape
    V = rows.weight.shape[0]
    product = milliseconds(lambda: rows.hidden @ rows.weight.T)
    return {
        "copy_bytes_per_s": 2 * source.numel() / copy * 1e3,
        "bare_product_ms": product,
        "bare_product_flop_per_s": 2 * N * D * V / product * 1e3,
    }


class Work(NamedTuple):
    """What a kernel must do in one step, by count."""

    pattern: str  # of its names in a profile
    flops: float
    bytes: float
    eight_bits: bool = False  # tensor cores do twice as much then


def work(record: dict[str, Any], step: str) -> dict[str, Work]:
    """Label -> work, of the kernels (on a CPU: ops) that take most of a step's time.

    Bytes are those of a kernel's operands, each once, and of gathered rows each time: the gathers'
    rows lie partly in the L2 cache, so their rate may exceed that of a copy.
    """
    N, D, V = (record["shape"][name] for name in "NDV")
    # A screen's margin keeps more entries; where V is small it has no effect. Older records have no
    # other count.
    refined = record["accuracy"]["fp8" if "fp8" in step else "int8"].get("refined_per_row")
    counted = record.get("kept_per_row")
    kept = (refined or counted) if step.startswith("screen") else (counted or refined)
    size = 2 if record["dtype"] == "bfloat16" else 4
    product, gathered, bits = 2 * N * V * D, N * kept * D * size, N * V / 8
    operands = (N + V) * D * size
    passes = 1 if "with lse_ref" in step or step == "forward alone" else 2
    sparse = {
        "row: logits and dX": Work("^row_kernel", 2 * 2 * N * kept * D, gathered + N * D * size),
        "dW": Work("^owner_kernel", 2 * N * kept * D, gathered + V * D * size),
        "backward": Work("^dgg::lm_head_backward", 4 * N * kept * D, 2 * gathered + operands),
    }
    if step == "forward alone":
        return {
            "scan": Work("^scan_kernel", product, operands),
            "forward": Work("^dgg::lm_head_forward", product, operands),
        }
    if step == "grad_eps=0":
        return {
            "scan": Work("^scan_kernel", product, operands),
            "dlogits": Work("^dlogits_kernel", product, operands + N * V * size),
            "products": Work("nvjet|gemm|cutlass", 2 * product, 2 * (operands + N * V * size)),
            "forward": Work("^dgg::lm_head_forward", product, operands),
            "backward": Work("^dgg::lm_head_backward", 3 * product, 2 * operands),
        }
    if step.startswith("screen"):
        codes = (N + V) * D + bits
        return {
            "screen": Work("^screen_kernel", passes * product, passes * codes, eight_bits=True),
            "refine": Work("^refine_kernel", 2 * 2 * N * kept * D, gathered + N * kept * D),
            **sparse,
        }
    return {
        "scan": Work("^scan_kernel", passes * product, passes * operands + bits),
        "forward": Work("^dgg::lm_head_forward", product, operands),
        **sparse,
    }


def achieved(record: dict[str, Any]) -> list[dict[str, Any]]:
    """Of every counted kernel in every step: time, rates, and its share of the roofline.

    The roofline's time is the longer one of FLOPs at the bare product's rate (twice that in 8 bits)
    and bytes at the copy's.
    """
    ceiling = record["ceilings"]
    found = []
    for step, profiled in record["kernels"].items():
        for label, of in work(record, step).items():
            times = [k["ms"] for name, k in profiled.items() if re.search(of.pattern, name)]
            if not times:
                continue
            seconds = sum(times) / 1e3
            flop_rate = ceiling["bare_product_flop_per_s"] * (2 if of.eight_bits else 1)
            least = max(of.flops / flop_rate, of.bytes / ceiling["copy_bytes_per_s"])
            found.append({
                "step": step,
                "kernel": label,
                "ms": 1e3 * seconds,
                "flop_per_s": of.flops / seconds,
                "bytes_per_s": of.bytes / seconds,
                "flop_per_byte": of.flops / of.bytes,
                "share_of_roofline": least / seconds,
            })  # fmt: skip
    return found


def steps(rows: Rows, c: torch.Tensor) -> dict[str, Callable[[], None]]:
    """Forward and backward as they are used: with and without a reference, exact, forward only."""
    hidden, weight = (t.detach().requires_grad_() for t in (rows.hidden, rows.weight))

    def step(**options: Any) -> None:
        hidden.grad = weight.grad = None
        # As an optimizer's step leaves it: launched or captured, a screen makes its copy anew.
        torch.autograd.graph.increment_version(weight)
        (linear_logprob(hidden, weight, rows.target, **options).logp * c).sum().backward()

    def forward() -> None:
        with torch.no_grad():
            linear_logprob(hidden, weight, rows.target)

    found: dict[str, Callable[[], None]] = {
        "forward alone": forward,
        "with lse_ref": lambda: step(lse_ref=rows.lse),
        "without lse_ref": step,
        "grad_eps=0": lambda: step(grad_eps=0.0),
        "screen int8, with lse_ref": lambda: step(screen="int8", lse_ref=rows.lse),
        "screen int8": lambda: step(screen="int8"),
    }
    if rows.hidden.is_cuda:
        found["screen fp8, with lse_ref"] = lambda: step(screen="fp8", lse_ref=rows.lse)
    return found


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
    variants: dict[str, dict[str, Any]] = {"none": {}, "int8": {"screen": "int8"}}
    if rows.hidden.is_cuda:
        variants["fp8"] = {"screen": "fp8"}
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
    """Milliseconds and launches of every kernel (on a CPU: op) in one run, longest first."""
    on_gpu = torch.cuda.is_available()
    run()
    with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as events:
        for _ in range(rounds):
            run()
        common.synchronize(torch.device("cuda" if on_gpu else "cpu"))
    found = {}
    for event in events.key_averages():
        microseconds = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        if microseconds > 0:
            milliseconds = microseconds / 1e3 / rounds
            found[event.key] = {"ms": milliseconds, "launches": event.count / rounds}
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
    parser = common.parser(__doc__)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--rows", type=int, default=8192, help="N")
    parser.add_argument("--features", type=int, default=4096, help="D")
    parser.add_argument("--vocabulary", type=int, default=131072, help="V")
    parser.add_argument("--temperature", type=float, default=0.6)
    parser.add_argument("--tune", action="store_true", help="on a GPU")
    args = parser.parse_args()
    on_gpu = args.device == "cuda"
    if on_gpu != torch.cuda.is_available():
        sys.exit(f"--device {args.device}: CUDA is {'not ' * on_gpu}there")
    console = Console(width=None if sys.stdout.isatty() else 140)
    device = torch.device(args.device)
    dtype = torch.bfloat16 if on_gpu else torch.float32
    rows = real_rows(args.rows, args.temperature, device=device, dtype=dtype,
                     D=args.features, V=args.vocabulary)  # fmt: skip
    c = torch.randn(args.rows, device=device)
    record: dict[str, Any] = {
        "benchmark": "kernels",
        "shape": {"N": args.rows, "D": args.features, "V": args.vocabulary},
        "dtype": str(dtype).removeprefix("torch."),
        "entropy": rows.entropy,
        "kept_per_row": rows.kept,
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
        time.sleep(1.0 if on_gpu else 0.0)  # a hot GPU lowers its clocks
        record["steps"][name] = milliseconds(run, 10 if on_gpu else 3)
        times = f"{record['steps'][name]:.2f} ms"
        if on_gpu:
            time.sleep(0.5)
            record["replayed"][name] = replay_milliseconds(run)
            times += f", {record['replayed'][name]:.2f} in a graph"
        record["kernels"][name] = kernels(run)
        table = Table(title=f"{name}: {times}")
        for column in ("kernel", "ms", "launches"):
            table.add_column(column, justify="right" if column != "kernel" else "left")
        for kernel, of in list(record["kernels"][name].items())[:12]:
            table.add_row(kernel[:90], f"{of['ms']:.3f}", f"{of['launches']:.0f}")
        console.print(table)
    show(record, console)
    if args.tune:
        record["tune"] = tune(rows, c, console.print)
    if args.save:
        console.print(f"written: {common.save(args.save, record)}")


if __name__ == "__main__":
    main()
