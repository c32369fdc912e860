"""What the gate costs: energy, decision and skip, beside the head and beside a gate on the host.

    python -m benchmarks.bench_gate --save gate_cpu

One update of a language-model head on real rows (benchmarks/rows.py): forward, backward, decision,
fused AdamW. Three loops, interleaved: without a gate; with `GradientGate`, whose energy comes from
the backward kernel; and with the same rule written with `vector_norm(weight.grad).item()`. Shares
are of the head's own forward and backward (on a GPU with an exact `lse_ref`), which is far less
than a whole update of a model.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections import deque
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress

from dgg_kernels import GateConfig, GradientGate, linear_logprob

from . import common
from .rows import Rows, real_rows
from .tables import show

WINDOW = 32
LOOPS = ("no gate", "GradientGate", "host gate, .item()")


def loop(kind: str, rows: Rows, device: torch.device) -> Callable[[], common.Phases]:
    """One update per call; every loop has its own weight and optimizer."""
    hidden = rows.hidden.clone().requires_grad_()
    weight = torch.nn.Parameter(rows.weight.clone())
    optimizer = torch.optim.AdamW([weight], lr=1e-6, fused=True)
    # One batch, used without end, behind a window that is full: every update is scored.
    earlier = [1.0 + i % 7 for i in range(WINDOW + 1)]
    gate = None
    if kind == "GradientGate":
        gate = GradientGate(GateConfig(threshold=1e9, window=WINDOW, max_reuse=10**6), weight)
        gate.attach(optimizer)
        gate.new_batch()
        for energy in earlier:
            gate.decide(torch.tensor(energy, device=device))
            optimizer.step()  # of no gradient
    window = deque((b - a for a, b in pairwise(earlier)), maxlen=WINDOW)
    state: dict[str, Any] = {"energy": earlier[-1]}
    lse = rows.lse if device.type == "cuda" else None  # a CPU does not need it

    def forward() -> None:
        hidden.grad = weight.grad = None
        out = linear_logprob(hidden, weight, rows.target, lse_ref=lse, gate=gate)
        state["loss"] = -out.logp.mean()

    def decide() -> None:
        state["step"] = True
        if gate is not None:
            gate.decide()
        elif kind.startswith("host"):
            energy = torch.linalg.vector_norm(weight.grad).item()
            increment, state["energy"] = energy - state["energy"], energy
            z = (increment - statistics.fmean(window)) / statistics.pstdev(window)
            state["step"] = z <= 1e9
            if state["step"]:
                window.append(increment)

    def step() -> None:
        if state["step"]:
            optimizer.step()

    return lambda: common.timed(
        device, ("forward", forward), ("backward", lambda: state["loss"].backward()),
        ("decide", decide), ("step", step),
    )  # fmt: skip


def share_of_update(threads: int) -> dict[str, float]:
    """Seconds in `decide()` of a whole update of the demo's small model, on the CPU.

    Clipping's global norm is taken in `decide()` too; a loop without a gate would pay it elsewhere.
    """
    from python_trainer.config import TrainConfig
    from python_trainer.loop import Progress as Progressed
    from python_trainer.loop import prepare, train
    from python_trainer.tasks import make_task

    config = TrainConfig(
        rollout_batches=20, num_iterations=4, warmup_max_steps=20, eval_every=100,
        eval_prompts=64, threads=threads, gate="dgg", gate_threshold=1e9,
    )  # fmt: skip
    seconds = []
    original = GradientGate.decide

    def timed_decide(gate: GradientGate, energy: Any = None) -> None:
        began = time.perf_counter()
        original(gate, energy)
        seconds.append(time.perf_counter() - began)

    progress = Progressed()
    GradientGate.decide = timed_decide  # type: ignore[method-assign]
    try:
        with tempfile.TemporaryDirectory() as folder:
            start = prepare(config, make_task(config.task, config.task_options))
            train(config, start, Path(folder), progress)
    finally:
        GradientGate.decide = original  # type: ignore[method-assign]
    update = progress.seconds["update"] / progress.updates_attempted
    decide = statistics.median(seconds)
    return {"update_s": update, "decide_s": decide, "share": decide / update}


def main() -> None:
    """Measure, show, record."""
    parser = common.parser(__doc__)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--rows", type=int, default=2048)
    parser.add_argument("--temperature", type=float, default=1.0, help="of the rows")
    parser.add_argument("--features", type=int, help="D, if larger than the model's 576")
    parser.add_argument("--vocabulary", type=int, help="V, if other than the model's 49152")
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args()
    device = torch.device(args.device)
    common.use_threads(args.threads)
    rows = real_rows(args.rows, args.temperature, device=device, dtype=getattr(torch, args.dtype),
                     D=args.features, V=args.vocabulary)  # fmt: skip
    console = Console()
    with Progress(console=console, transient=True) as progress:
        bar = progress.add_task("", total=(args.rounds + 1) * len(LOOPS))
        runs = common.interleave(
            {kind: loop(kind, rows, device) for kind in LOOPS}, args.rounds,
            lambda name: progress.update(bar, advance=1, description=name),
        )  # fmt: skip
    record: dict[str, Any] = {
        "benchmark": "gate",
        "shape": {"N": args.rows, "D": rows.hidden.shape[1], "V": rows.weight.shape[0]},
        "dtype": args.dtype,
        "entropy": rows.entropy,
        "lse_ref": args.device == "cuda",
        "rounds": args.rounds,
        "stamp": common.stamp(device, args.threads),
        "loops": {},
    }
    head = [p["forward"] + p["backward"] for p in runs["no gate"]]
    for kind, phases in runs.items():
        more = [p["backward"] - q["backward"] for p, q in zip(phases, runs["no gate"], strict=True)]
        shares = [(m + p["decide"]) / h for m, p, h in zip(more, phases, head, strict=True)]
        record["loops"][kind] = {
            **{f"{name}_s": common.summary([p[name] for p in phases]) for name in phases[0]},
            "decide_share_of_head": common.summary(
                [p["decide"] / h for p, h in zip(phases, head, strict=True)]
            ),
            "decide_and_backward_difference_share_of_head": common.summary(shares),
        }
    if device.type == "cpu":
        record["whole_update"] = share_of_update(args.threads)
    show(record, console)
    if args.save:
        console.print(f"written: {common.save(args.save, record)}")


if __name__ == "__main__":
    main()
