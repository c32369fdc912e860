"""Figures from the recorded JSON, and a picture of the active set.

python -m benchmarks.plot                 # docs/images/*.png from benchmarks/results/**/*.json
python -m benchmarks.plot --active-set    # also the active set of real rows (needs the model)
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure

from .common import RESULTS
from .rows import real_rows

IMAGES = Path(__file__).parent.parent / "docs" / "images"
BLUE, GREY, RED = "#0072B2", "#999999", "#D55E00"


def head_times(record: dict[str, Any], path: Path) -> None:
    """Forward and backward of every variant as multiples of the bare product."""
    bare = record["variants"]["bare product"]["total_s"]["median"]
    variants = sorted(record["variants"].items(), key=lambda item: -item[1]["total_s"]["median"])
    figure = Figure(figsize=(9, 0.42 * len(variants) + 1.2), dpi=110, layout="constrained")
    ax = figure.subplots()
    for y, (name, v) in enumerate(variants):
        forward, backward = (v[f"{phase}_s"]["median"] / bare for phase in ("forward", "backward"))
        colour = GREY if "ours" not in name else BLUE
        ax.barh(y, forward, color=colour, height=0.7)
        ax.barh(y, backward, left=forward, color=colour, alpha=0.5, height=0.7)
        total = v["ratio_to_bare"]["median"]
        ax.text(forward + backward + 0.08, y, f"{total:.2f}", va="center", fontsize=9)
    ax.set_yticks(range(len(variants)), [name for name, _ in variants])
    ax.axvline(1, color=RED, linewidth=1, linestyle=":")
    shape, stamp = record["shape"], record["stamp"]
    ax.set_xlabel(
        f"time / bare product (dark: forward, light: backward)\nN={shape['N']} D={shape['D']} "
        f"V={shape['V']}, {stamp['device']}, {stamp['threads']} thread(s), {stamp['commit']}"
    )
    ax.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)


def active_set(path: Path) -> None:
    """Which entries are kept: a part of the vocabulary for some rows; counts against entropy."""
    figure = Figure(figsize=(11, 4.2), dpi=110, layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    for temperature, colour in ((1.0, RED), (0.6, BLUE), (0.4, GREY)):
        rows = real_rows(512, temperature)
        n, vocabulary = len(rows.target), len(rows.weight)
        logp = torch.log_softmax(rows.hidden @ rows.weight.T, 1)
        p, entropy = logp.exp(), -(logp.exp() * logp).sum(1)
        generator = torch.Generator().manual_seed(0)
        kept = torch.rand(n, vocabulary, generator=generator) < p * 2**12
        if temperature == 1.0:
            order = p.amax(0).argsort(descending=True)[:2048]
            image = torch.where(p >= 2**-12, 2, kept.int())[:128, order]
            left.imshow(image, aspect="auto", cmap="Blues", interpolation="nearest")
            left.set_xlabel("2,048 of 49,152 tokens, by their largest probability")
            left.set_ylabel("row")
            left.set_title("dark: p > 2⁻¹², light: random tail (T = 1)", fontsize=10)
        label = f"T = {temperature}: mean {kept.sum(1).float().mean():.0f} of {vocabulary:,}"
        right.plot(entropy, kept.sum(1), ".", color=colour, markersize=3, label=label)
    right.set_xlabel("entropy of the row (nats)")
    right.set_ylabel("entries kept")
    right.set_yscale("log")
    right.legend(frameon=False, fontsize=9)
    right.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)


def main() -> None:
    """Draw what there is."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--active-set", action="store_true")
    args = parser.parse_args()
    IMAGES.mkdir(parents=True, exist_ok=True)
    for path in sorted(RESULTS.rglob("*.json")):
        record = json.loads(path.read_text())
        if record.get("benchmark") == "lm_head" and len(record["variants"]) > 4:
            name = "_".join(path.relative_to(RESULTS).with_suffix("").parts)
            head_times(record, IMAGES / f"{name}.png")
            print(f"written: {IMAGES / name}.png")
    if args.active_set:
        active_set(IMAGES / "active_set.png")
        print(f"written: {IMAGES / 'active_set.png'}")


if __name__ == "__main__":
    main()
