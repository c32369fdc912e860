"""How good a screen is on real rows, and what its noise does to importance ratios and the gate.

    python -m benchmarks.bench_screen --save screen        # CPU, a few minutes; draws a figure too

Rows of SmolLM2-135M at three temperatures (benchmarks/rows.py), int8 and bf16 screens, two
thresholds `grad_eps`, against fp64. A ratio is that of two passes over the same weights with other
draws, as between the old log-probs and the first update: exactly 1 without a screen. The energy is
the norm of the head's gradient, what the gate scores: its spread over draws.
"""

from __future__ import annotations

import statistics
import time
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import Progress

from dgg_kernels import linear_logprob

from . import common
from .rows import Rows, real_rows
from .tables import show

TEMPERATURES = (1.0, 0.6, 0.4)
SCREENS = (None, "int8", "bf16")
THRESHOLDS = (2**-10, 2**-12, 2**-14)
CLIP = 0.2  # PPO's: a ratio beyond 1 +- this takes no part in the gradient


def measure(rows: Rows, exact: torch.Tensor, draws: int, **options: Any) -> dict[str, float]:
    """Error, ratio, energy and time of one setting."""
    c = torch.randn(len(rows.target), generator=torch.Generator().manual_seed(3))
    logps, energies, seconds, out = [], [], [], None
    for seed in range(draws):
        torch.manual_seed(seed)
        hidden, weight = (t.detach().requires_grad_() for t in (rows.hidden, rows.weight))
        began = time.perf_counter()
        out = linear_logprob(hidden, weight, rows.target, **options)
        (out.logp * c).sum().backward()
        seconds.append(time.perf_counter() - began)
        logps.append(out.logp.detach().double())
        energies.append(float(torch.linalg.vector_norm(weight.grad)))
    off = logps[0] - exact
    log_ratio = logps[1] - logps[0]
    found = {
        "mean_abs": float(off.abs().mean()),
        "max_abs": float(off.abs().max()),
        "bias": float(off.mean()),
        "ratio_max_error": float((log_ratio.exp() - 1).abs().max()),
        "ratio_mean_error": float((log_ratio.exp() - 1).abs().mean()),
        "clipped_at_ratio_1": float(((log_ratio.exp() - 1).abs() > CLIP).double().mean()),
        "energy_mean": statistics.mean(energies),
        "energy_spread": statistics.stdev(energies) / statistics.mean(energies),
        "seconds": common.summary(seconds)["median"],
    }
    if out is not None and out.screen_stats is not None:
        stats = out.screen_stats
        found["refined_per_row"] = float(stats.refined) / len(rows.target)
        found["exact_rows"] = float(stats.exact_rows)
        found["missed_per_row"] = float(stats.missed) / len(rows.target)
        found["outside_bound"] = float(
            ((logps[-1] - exact).abs() > stats.error_bound + 1e-4).double().sum()
        )
    return found


def draw(record: dict[str, Any], path: Path) -> None:
    """Error against time, one panel per temperature."""
    figure = Figure(figsize=(12, 4), dpi=110, layout="constrained")
    panels = figure.subplots(1, len(TEMPERATURES), sharey=True)
    colours = {"int8": "#0072B2", "bf16": "#009E73"}
    for ax, (temperature, settings) in zip(panels, record["temperatures"].items(), strict=True):
        bare = settings["bare_s"]
        for screen, colour in colours.items():
            points = [s for s in settings["settings"] if s["screen"] == screen]
            ax.plot([p["seconds"] / bare for p in points], [p["mean_abs"] for p in points], "o-",
                    color=colour, label=f"screen {screen}", markersize=4)  # fmt: skip
            for p in points:
                ax.annotate(f" 2^{round(torch.tensor(p['grad_eps']).log2().item())}",
                            (p["seconds"] / bare, p["mean_abs"]), fontsize=8)  # fmt: skip
        none = [s for s in settings["settings"] if s["screen"] is None and s["grad_eps"] == 2**-12]
        ax.axvline(none[0]["seconds"] / bare, color="#999999", linestyle=":", label="no screen")
        ax.set_yscale("log")
        ax.set_xlim(left=0)
        ax.set_xlabel("forward + backward / bare product")
        ax.set_title(f"T = {temperature}, entropy {settings['entropy']:.2f}", fontsize=10)
        ax.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("mean |error| of the log-prob (nats)")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3,
                  frameon=False)  # fmt: skip
    figure.savefig(path)


def main() -> None:
    """Measure, show, record, draw."""
    parser = common.parser(__doc__)
    parser.add_argument("--rows", type=int, default=1024)
    parser.add_argument("--draws", type=int, default=6)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    common.use_threads(args.threads)
    console = Console(width=140)
    record: dict[str, Any] = {
        "benchmark": "screen",
        "rows": args.rows,
        "draws": args.draws,
        "stamp": common.stamp(torch.device("cpu"), args.threads),
        "temperatures": {},
    }
    with Progress(console=console, transient=True) as progress:
        total = len(TEMPERATURES) * (1 + len(SCREENS) * len(THRESHOLDS))
        bar = progress.add_task("screens", total=total)
        for temperature in TEMPERATURES:
            rows = real_rows(args.rows, temperature)
            exact = common.exact_gradients(*rows[:3], torch.zeros(args.rows))[0]
            bare = []
            for _ in range(4):
                began = time.perf_counter()
                torch.mm(rows.hidden, rows.weight.T)
                bare.append(time.perf_counter() - began)
            progress.advance(bar)
            settings = []
            for screen in SCREENS:
                for grad_eps in THRESHOLDS:
                    of = measure(rows, exact, args.draws, screen=screen, grad_eps=grad_eps)
                    settings.append({"screen": screen, "grad_eps": grad_eps, **of})
                    progress.advance(bar)
            record["temperatures"][temperature] = {
                "entropy": rows.entropy,
                "bare_s": common.summary(bare)["median"],
                "settings": settings,
            }
    show(record, console)
    if args.save:
        path = common.save(args.save, record)
        draw(record, path.with_suffix(".png"))
        console.print(f"written: {path} and its .png")


if __name__ == "__main__":
    main()
