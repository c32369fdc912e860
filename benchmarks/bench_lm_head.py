"""Forward and backward of a language-model head, beside its peers, in one run.

    python -m benchmarks.bench_lm_head                       # the CPU, one thread, all peers
    python -m benchmarks.bench_lm_head --threads 2 --entropy 0.46 --peers ours "torch eager"

Rows are hidden states of SmolLM2-135M on text it sampled itself (benchmarks/rows.py). Every variant
runs once per round, in turn; medians and p20/p80 over the rounds; ratios are medians of the ratios
to the bare product `hidden @ weight.T` of the same round. Speed is refused when the check is red.
"""

from __future__ import annotations

import argparse
import gc
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor

from . import common, peers
from .rows import real_rows

BARE = "bare product"
# Error of our own results against fp64 that is let pass: exact, and with the random tail.
ALLOWED = {torch.float32: (1e-4, 5e-3), torch.bfloat16: (5e-3, 8e-3)}


def variant(peer: peers.Peer, rows: Any, c: Tensor) -> Callable[[], common.Phases]:
    """One forward and backward of sum(c logp), the gradients of hidden and weight included."""
    hidden, weight = (t.detach().requires_grad_() for t in (rows.hidden, rows.weight))

    def run(keep_gradients: bool = False) -> common.Phases:
        kept: list[Tensor] = []
        phases = common.timed(
            hidden.device,
            ("forward", lambda: kept.append((peer(hidden, weight, rows.target) * c).sum())),
            ("backward", lambda: kept[0].backward()),
        )
        if not keep_gradients:
            hidden.grad = weight.grad = None
        return phases

    run.leaves = hidden, weight  # type: ignore[attr-defined]
    return run


def errors(run: Any, peer: peers.Peer, rows: Any, exact: tuple[Tensor, ...]) -> dict[str, float]:
    """Relative errors of log-prob and gradients; 1 where a gradient did not arrive."""
    run(keep_gradients=True)
    hidden, weight = run.leaves
    with torch.no_grad():
        logp = peer(hidden, weight, rows.target)
    norm = exact[2].norm()
    return {
        "logp_mean_abs": float((logp.double() - exact[0]).abs().mean()),
        "d_hidden": common.relative_error(hidden.grad, exact[1]),
        "d_weight": common.relative_error(weight.grad, exact[2]),
        "norm": float((weight.grad.double().norm() - norm).abs() / norm),
    }


def measure(args: argparse.Namespace, console: Console) -> dict[str, Any]:
    """One table: every chosen peer on one set of rows."""
    device = torch.device(args.device)
    torch.set_num_threads(args.threads)
    dtype = getattr(torch, args.dtype)
    rows = real_rows(args.rows, args.temperature, device=device, dtype=dtype,
                     D=args.features, V=args.vocabulary)  # fmt: skip
    generator = torch.Generator().manual_seed(3)
    c = torch.randn(args.rows, generator=generator)
    c[torch.rand(args.rows, generator=generator) < args.zero_rows] = 0.0
    c = c.to(device)
    found, missing = peers.available(device.type)
    # On a CPU the selection costs nothing beside the product: no reference is needed.
    options = {"lse_ref": rows.lse} if device.type == "cuda" else {}
    base = "ours, with lse_ref" if options else "ours"
    if options:
        found[base] = partial(peers.ours, **options)
    for screen in ("int8", "fp8") if device.type == "cuda" else ("int8",):
        found[f"{base}, screen {screen}"] = partial(peers.ours, **options, screen=screen)
    if args.peers:
        found = {name: peer for name, peer in found.items() if name in args.peers}
    record: dict[str, Any] = {
        "benchmark": "lm_head",
        "shape": {"N": args.rows, "D": rows.hidden.shape[1], "V": rows.weight.shape[0]},
        "dtype": args.dtype,
        "temperature": args.temperature,
        "entropy": rows.entropy,
        "zero_rows": args.zero_rows,
        "rounds": args.rounds,
        "stamp": common.stamp(device, args.threads),
        "missing": missing,
        "variants": {},
    }
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("fp64 truth", total=None)
        exact = common.exact_gradients(rows.hidden, rows.weight, rows.target, c)
        runs: dict[str, Callable[[], common.Phases]] = {
            BARE: lambda: common.timed(device, ("forward", lambda: rows.hidden @ rows.weight.T))
        }
        for name, peer in list(found.items()):
            progress.update(task, description=f"check {name}")
            run = variant(peer, rows, c)
            try:
                checked = errors(run, peer, rows, exact)
            except Exception as error:  # a peer that fails is reported, not fatal
                missing[name] = f"{type(error).__name__}: {str(error).splitlines()[0][:120]}"
                continue
            worst = max(checked["d_hidden"], checked["d_weight"])
            allowed = ALLOWED[dtype][0 if "grad_eps=0" in name else 1]
            if name.startswith("ours") and not worst <= allowed:
                raise SystemExit(f"{name}: error {worst:.1e} against fp64: no speed is reported")
            gc.collect()
            for leaf in run.leaves:  # type: ignore[attr-defined]
                leaf.grad = None
            if device.type == "cuda":
                torch.cuda.empty_cache()
            memory = common.peak_extra_bytes(run, device)
            record["variants"][name] = {"errors": checked, "peak_extra_bytes": memory}
            runs[name] = run
        del exact
        total = (args.rounds + 1) * len(runs)
        progress.reset(task, total=total)
        timings = common.interleave(
            runs, args.rounds, lambda name: progress.update(task, advance=1, description=name)
        )
    bare = [phases["forward"] for phases in timings[BARE]]
    record["variants"][BARE] = {}
    for name, phases in timings.items():
        totals = [sum(p.values()) for p in phases]
        record["variants"][name] |= {
            "forward_s": common.summary([p["forward"] for p in phases]),
            "backward_s": common.summary([p.get("backward", 0.0) for p in phases]),
            "total_s": common.summary(totals),
            "ratio_to_bare": common.summary([t / b for t, b in zip(totals, bare, strict=True)]),
        }
    return record


def show(record: dict[str, Any], console: Console) -> None:
    """The record as a table."""
    shape, of = record["shape"], record["stamp"]
    title = f"N={shape['N']} D={shape['D']} V={shape['V']} {record['dtype']}, "
    title += f"entropy {record['entropy']:.2f}, {record['zero_rows']:.0%} rows with c=0; "
    title += f"{of['device']}, {of['threads']} thread(s)"
    table = Table(title=title)
    table.add_column("", no_wrap=True)
    for column in (
        "forward ms",
        "backward ms",
        "x bare",
        "(p20-p80)",
        "extra MB",
        "err dX",
        "err dW",
    ):
        table.add_column(column, justify="right")
    by_time = sorted(record["variants"].items(), key=lambda item: item[1]["total_s"]["median"])
    for name, v in by_time:
        ratio, checked = v["ratio_to_bare"], v.get("errors")
        table.add_row(
            name, f"{1e3 * v['forward_s']['median']:.2f}",
            f"{1e3 * v['backward_s']['median']:.2f}",
            f"{ratio['median']:.2f}", f"{ratio['p20']:.2f}-{ratio['p80']:.2f}",
            f"{v['peak_extra_bytes'] / 1e6:.0f}" if checked else "",
            f"{checked['d_hidden']:.1e}" if checked else "",
            f"{checked['d_weight']:.1e}" if checked else "",
        )  # fmt: skip
    console.print(table)
    for name, why in record["missing"].items():
        console.print(f"missing: {name} ({why})")


def main() -> None:
    """Measure, show, record."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--rows", type=int, default=2048, help="N")
    parser.add_argument("--features", type=int, help="D, if larger than the model's 576")
    parser.add_argument("--vocabulary", type=int, help="V, if other than the model's 49152")
    parser.add_argument("--temperature", type=float, default=1.0,
                        help="1.0, 0.6, 0.4: mean entropy 1.8, 0.8, 0.5 nats")  # fmt: skip
    parser.add_argument("--zero-rows", type=float, default=0.0, help="share of rows with c = 0")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--peers", nargs="*", metavar="NAME", help=f"of: {', '.join(peers.PEERS)}")
    parser.add_argument("--save", metavar="NAME", help="write benchmarks/results/NAME.json")
    args = parser.parse_args()
    console = Console(width=None if sys.stdout.isatty() else 120)
    record = measure(args, console)
    show(record, console)
    if args.save:
        console.print(f"written: {common.save(args.save, record)}")


if __name__ == "__main__":
    main()
