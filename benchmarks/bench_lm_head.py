"""Forward and backward of a language-model head, beside its peers, in one run.

    python -m benchmarks.bench_lm_head                       # the CPU, one thread, all peers
    python -m benchmarks.bench_lm_head --threads 2 --rows 512 2048 --peers ours "torch eager"
    python -m benchmarks.bench_lm_head --device cuda --dtype bfloat16 --model qwen2.5-7b gemma-2-9b

Rows are hidden states of SmolLM2-135M on text it sampled itself (benchmarks/rows.py). Every variant
runs once per round, in an order drawn for each; medians and p20/p80 over the rounds; ratios are
medians of the ratios to the bare product `hidden @ weight.T` of the same round. Speed is refused
when the check is red.
Options that take several values are measured in every combination, each with a record of its own.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import math
import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor

from . import common, peers
from .rows import ENTROPIES, GRAD_EPS, HEADS, Head, Rows, dense_rows, real_rows
from .tables import show

BARE = "bare product"
DENSE = "dense"
# A screen whose copy of the weight is not made within the time measured.
AT_HAND = ", codes at hand"
# Error of our own results against fp64 that is let pass: exact, and with the random tail.
ALLOWED = {torch.float32: (1e-4, 5e-3), torch.bfloat16: (5e-3, 8e-3)}
# Beyond this a peer computes something else: its speed says nothing.
ALLOWED_OF_A_PEER = 0.2


class Setting(NamedTuple):
    """What one table is measured on."""

    head: Head
    rows: int  # N
    entropy: str | None  # one of ENTROPIES, or DENSE; None: by temperature
    temperature: float
    zero_rows: float  # share of rows with c = 0


def temperature(of: Setting) -> float | None:
    """That of the rows; None if they are random."""
    if of.entropy == DENSE:
        return None
    return ENTROPIES[of.entropy] if of.entropy else of.temperature


def make_rows(of: Setting, device: torch.device, dtype: torch.dtype) -> Rows:
    """The inputs of a setting."""
    D, V, softcap = of.head
    heat = temperature(of)
    if heat is None:
        return dense_rows(of.rows, D, V, device=device, dtype=dtype, softcap=softcap)
    return real_rows(of.rows, heat, device=device, dtype=dtype, D=D, V=V, softcap=softcap)


def allowed(name: str, of: Setting, rows: Rows, grad_eps: float = GRAD_EPS) -> float:
    """The largest relative error of a gradient with which a variant's speed is reported.

    ALLOWED knows the default grad_eps on real rows. Elsewhere the random tail's error may be up to
    the root of its epsilon; and rows that keep more entries than a GPU has room for (256 a row or
    more) are drawn at a larger one there, 4 / 256 at most.
    """
    if not name.startswith("ours"):
        return ALLOWED_OF_A_PEER
    exact, drawn = ALLOWED[rows.hidden.dtype]
    # Rows moved by one vector (`rows._centred`) share much of their norm, by which the rounding of
    # dlogits to bf16 is multiplied: exact 4.4e-3 on the real rows, drawn up to 8.6e-3.
    moved = 1 if rows.softcap is None else 2
    if grad_eps == 0:
        return moved * exact
    if of.entropy != DENSE and grad_eps == GRAD_EPS:
        return moved * drawn
    return 2 * math.sqrt(max(grad_eps, 4 / 256) if rows.hidden.is_cuda else grad_eps)


def variant(
    peer: peers.Peer, rows: Rows, c: Tensor, written: bool = True
) -> Callable[[], common.Phases]:
    """One forward and backward of sum(c logp), the gradients of hidden and weight included.

    `written`: the weight is as after an optimizer's step, so that a screen makes its copy anew.
    """
    # Not detach(): leaves of it share one version counter, and one variant's write would be all's.
    hidden, weight = (t.data.requires_grad_() for t in (rows.hidden, rows.weight))

    def run(keep_gradients: bool = False) -> common.Phases:
        if written:
            torch.autograd.graph.increment_version(weight)
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


def errors(run: Any, peer: peers.Peer, rows: Rows, exact: tuple[Tensor, ...]) -> dict[str, float]:
    """Mean error of the log-probs, relative errors of the gradients and of their norm."""
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


def variants(
    args: argparse.Namespace, rows: Rows
) -> tuple[dict[str, tuple[peers.Peer, float]], dict[str, str]]:
    """Name -> function and its grad_eps, of what shall be measured; and why the others are not."""
    device = rows.hidden.device.type
    found, missing = peers.available(device, rows.softcap)
    mine = partial(peers.ours, softcap=rows.softcap)
    # On a CPU the selection costs nothing beside the product: no reference is needed.
    options = {"lse_ref": rows.lse} if device == "cuda" else {}
    base = "ours, with lse_ref" if options else "ours"
    if options:
        found[base] = partial(mine, **options)
    for screen in ("int8", "fp8") if device == "cuda" else ("int8",):
        for copy in ("", AT_HAND):
            found[f"{base}, screen {screen}{copy}"] = partial(mine, **options, screen=screen)
    if unknown := set(args.peers or ()) - {*found, *missing}:
        sys.exit(f"--peers: expected some of {[*found, *missing]}, got {sorted(unknown)}")
    if args.peers is not None:
        found = {name: peer for name, peer in found.items() if name in args.peers}
        missing = {name: why for name, why in missing.items() if name in args.peers}
    grad_eps = {name: 0.0 if "grad_eps=0" in name else GRAD_EPS for name in found}
    for exponent in args.grad_eps or ():
        name = f"{base}, grad_eps=2^{exponent}"
        grad_eps[name] = 2.0**exponent
        found[name] = partial(mine, **options, grad_eps=grad_eps[name])
    return {name: (peer, grad_eps[name]) for name, peer in found.items()}, missing


def measure(args: argparse.Namespace, of: Setting, console: Console) -> dict[str, Any]:
    """One table: every chosen peer on one set of rows.

    Raises:
        common.Refused: our own error against fp64 is too large.
    """
    device = torch.device(args.device)
    torch.compiler.reset()  # or it would compile for shapes that change
    dtype = getattr(torch, args.dtype)
    rows = make_rows(of, device, dtype)
    generator = torch.Generator().manual_seed(3)
    c = torch.randn(of.rows, generator=generator)
    c[torch.rand(of.rows, generator=generator) < of.zero_rows] = 0.0
    c = c.to(device)
    found, missing = variants(args, rows)
    record: dict[str, Any] = {
        "benchmark": "lm_head",
        "shape": {"N": of.rows, "D": rows.hidden.shape[1], "V": rows.weight.shape[0]},
        "softcap": rows.softcap,
        "dtype": args.dtype,
        "temperature": temperature(of),
        "entropy": rows.entropy,
        "kept_per_row": rows.kept,
        "zero_rows": of.zero_rows,
        "rounds": args.rounds,
        "stamp": common.stamp(device, args.threads),
        "missing": missing,
        "variants": {},
    }
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("fp64 truth", total=None)
        exact = common.exact_gradients(rows.hidden, rows.weight, rows.target, c, rows.softcap)
        runs: dict[str, Callable[[], common.Phases]] = {
            BARE: lambda: common.timed(device, ("forward", lambda: rows.hidden @ rows.weight.T))
        }
        for name, (peer, grad_eps) in found.items():
            progress.update(task, description=f"check {name}")
            run = variant(peer, rows, c, written=AT_HAND not in name)
            try:
                checked = errors(run, peer, rows, exact)
            except Exception as error:  # a peer that fails is reported, not fatal
                missing[name] = peers.reason(error)
                continue
            worst = max(checked["d_hidden"], checked["d_weight"])
            if not worst <= allowed(name, of, rows, grad_eps):
                missing[name] = f"error {worst:.1e} against fp64: no speed is reported"
                if name.startswith("ours"):
                    raise common.Refused(f"{name}: {missing[name]}")
                continue
            for leaf in run.leaves:  # type: ignore[attr-defined]
                leaf.grad = None
            memory = common.peak_extra_bytes(run, device)
            record["variants"][name] = {"errors": checked, "peak_extra_bytes": memory}
            runs[name] = run
        del exact
        gc.collect()
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


def settings(args: argparse.Namespace) -> Iterator[tuple[str, Setting]]:
    """Every combination, with what tells it apart in the name of its record."""
    heads = {}
    for model in args.model:
        D, V, softcap = HEADS[model]
        heads[model] = Head(args.features or D, args.vocabulary or V, softcap)
    axes = (args.model, args.rows, args.entropy or [None], args.zero_rows)
    for model, rows, entropy, zero_rows in itertools.product(*axes):
        parts = (f"_{model}", f"_n{rows}", f"_e{entropy}", f"_z{zero_rows}")
        several = (part for part, axis in zip(parts, axes, strict=True) if len(axis) > 1)
        setting = Setting(heads[model], rows, entropy, args.temperature, zero_rows)
        yield "".join(several), setting


def main() -> None:
    """Measure, show, record."""
    parser = common.parser(__doc__)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--model", nargs="+", default=["smollm2-135m"], choices=HEADS,
                        help="whose head: D, V and softcap")  # fmt: skip
    parser.add_argument("--features", type=int, help="D, in place of the model's")
    parser.add_argument("--vocabulary", type=int, help="V, in place of the model's")
    parser.add_argument("--rows", type=int, nargs="+", default=[2048], help="N")
    parser.add_argument("--entropy", nargs="+", choices=(*ENTROPIES, DENSE),
                        help="mean entropy of real rows in nats, or random rows")  # fmt: skip
    parser.add_argument("--temperature", type=float, default=1.0, help="in place of --entropy")
    parser.add_argument("--zero-rows", type=float, nargs="+", default=[0.0],
                        help="share of rows with c = 0")  # fmt: skip
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--peers", nargs="*", metavar="NAME",
                        help="measure these alone; a name that is unknown lists all")  # fmt: skip
    parser.add_argument("--grad-eps", type=int, nargs="*", metavar="EXPONENT",
                        help="also ours with grad_eps = 2^EXPONENT")  # fmt: skip
    args = parser.parse_args()
    common.use_threads(args.threads)
    console = Console(width=None if sys.stdout.isatty() else 120)
    refused = False
    for name, setting in settings(args):
        try:
            record = measure(args, setting, console)
        except common.Refused as error:
            console.print(f"{name.removeprefix('_')} {error}".strip())
            refused = True
            continue
        show(record, console)
        if args.save:
            console.print(f"written: {common.save(args.save + name, record)}")
    sys.exit(refused)


if __name__ == "__main__":
    main()
