"""Every figure and table of the benchmarks, from the recorded JSON alone.

    python -m benchmarks.plot                    # of results/: docs/images, results/tables.md
    python -m benchmarks.plot --results out      # of a suite's folder: out/images, out/tables.md
    python -m benchmarks.plot --active-set       # also the active set of real rows (needs them)

Records whose names differ in one part only (`_n512`, `_e0.8` or `_T0.4`, a model) share a figure.
"""

from __future__ import annotations

import argparse
import gzip
import json
import re
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure

from python_trainer.plots import draw_learning

from .bench_kernels import achieved
from .bench_lm_head import BARE
from .bench_step import HEAD_PHASES
from .common import RESULTS
from .rows import GRAD_EPS, HEADS, real_rows
from .tables import readable, tables

IMAGES = Path(__file__).parent.parent / "docs" / "images"
BLUE, GREY, RED, GREEN, ORANGE, PINK = (
    "#0072B2", "#999999", "#D55E00", "#009E73", "#E69F00", "#CC79A7",
)  # fmt: skip
INK = "#333333"
# By what a variant's name contains; the first that fits.
STYLES = (
    ("bare product", INK, ":"), ("screen int8", "#56B4E9", "-"), ("screen fp8", GREEN, "-"),
    ("grad_eps=0", BLUE, ":"), ("lse_ref", BLUE, "-"), ("ours", BLUE, "--"),
    ("compile", ORANGE, "-"), ("TRL", PINK, "-"), ("Liger", RED, "-"),
    ("Cut Cross-Entropy", GREEN, "--"), ("verl", "#8C564B", "-"), ("", GREY, "-"),
)  # fmt: skip
# Kept beside the records that took their place, to show what differs.
SUPERSEDED = re.compile("before_tuning|without_pauses|_epyc$")
Record = dict[str, Any]


def style(name: str) -> dict[str, Any]:
    return next({"color": c, "linestyle": d} for part, c, d in STYLES if part in name)


def where(record: Record, sizes: str = "NDV") -> str:
    """Shape, device and commit, for a caption."""
    shape, stamp = record["shape"], record["stamp"]
    parts = [f"{k}={shape[k]:,}" for k in sizes] + [record["dtype"], stamp["device"]]
    if "NVIDIA" not in stamp["device"]:
        parts.append(f"{stamp['threads']} thread(s)")
    return ", ".join([*parts, stamp["commit"]])


def plain(*panels: Any) -> None:
    for ax in panels:
        ax.spines[["top", "right"]].set_visible(False)


# -- one record, one figure -----------------------------------------------------------------------


def head_bars(record: Record) -> Figure:
    """Time of forward and backward as multiples of the bare product, and extra memory."""
    variants = sorted(
        record["variants"].items(), key=lambda item: -item[1]["ratio_to_bare"]["median"]
    )
    figure = Figure(figsize=(11, 0.42 * len(variants) + 1.3), dpi=110, layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(3, 2), sharey=True)
    most = variants[0][1]["ratio_to_bare"]["median"]
    for y, (name, v) in enumerate(variants):
        ratio = v["ratio_to_bare"]["median"]  # divided as the phases' medians are
        phases = [v[f"{phase}_s"]["median"] for phase in ("forward", "backward")]
        forward, backward = (ratio * phase / sum(phases) for phase in phases)
        colour = BLUE if "ours" in name else GREY
        left.barh(y, forward, color=colour, height=0.7)
        left.barh(y, backward, left=forward, color=colour, alpha=0.5, height=0.7)
        left.text(ratio + 0.01 * most, y, f"{ratio:.2f}", va="center", fontsize=9)
        if memory := v.get("peak_extra_bytes"):
            right.barh(y, memory / 1e9, color=colour, height=0.7)
            right.text(memory / 1e9, y, f" {memory / 1e9:.2f}", va="center", fontsize=9)
    left.set_yticks(range(len(variants)), [name for name, _ in variants])
    left.axvline(1, color=RED, linewidth=1, linestyle=":")
    left.set_xlabel("time / bare product (dark: forward, light: backward)")
    gradient = record["shape"]["V"] * record["shape"]["D"] / 1e9
    gradient *= 2 if record["dtype"] == "bfloat16" else 4
    right.axvline(gradient, color=RED, linewidth=1, linestyle=":")
    right.set_xlabel("extra memory, GB (dotted: dW itself)")
    right.margins(x=0.12)
    left.margins(x=0.08, y=0.02)
    figure.supxlabel(f"{where(record)}; entropy {record['entropy']:.2f}", fontsize=9)
    plain(left, right)
    return figure


def roofline(record: Record) -> Figure:
    """Achieved FLOP/s of every counted kernel against its FLOPs a byte, under the ceilings."""
    ceiling = record["ceilings"]
    unit, prefix = (1e12, "T") if ceiling["bare_product_flop_per_s"] > 1e12 else (1e9, "G")
    copy, product = ceiling["copy_bytes_per_s"] / unit, ceiling["bare_product_flop_per_s"] / unit
    points = achieved(record)
    figure = Figure(figsize=(10, 5.2), dpi=110, layout="constrained")
    ax = figure.subplots()
    span = [p["flop_per_byte"] for p in points]
    low, high = min(span) / 3, max(*span, 2 * product / copy) * 3
    for factor, dash, name in ((1, "-", "bare product"), (2, ":", "8 bits, twice that")):
        if factor == 1 or any(p["kernel"] == "screen" for p in points):
            top = factor * product
            ax.plot(
                [low, top / copy, high], [low * copy, top, top], dash, color=GREY, linewidth=1.2
            )
            label = f"{name}: {readable(top)} {prefix}FLOP/s "
            ax.text(high, 1.15 * top, label, ha="right", color=INK, fontsize=9)
    ax.text(low * 8, low * 8 * copy, f"   copy: {readable(copy)} {prefix}B/s", va="top",
            color=INK, fontsize=9)  # fmt: skip
    colours = {step: c for step, c in zip(record["kernels"], (
        GREY, BLUE, "#000000", PINK, "#56B4E9", ORANGE, GREEN), strict=False)}  # fmt: skip
    markers: dict[str, str] = dict(
        zip(dict.fromkeys(p["kernel"] for p in points), "osD^vPX*<>", strict=False)
    )
    for p in points:
        ax.plot(p["flop_per_byte"], p["flop_per_s"] / unit, markers[p["kernel"]],
                color=colours[p["step"]], markersize=8, alpha=0.8)  # fmt: skip
    ax.set(xscale="log", yscale="log", xlim=(low, high), xlabel="FLOPs a byte, by count",
           ylabel=f"{prefix}FLOP/s")  # fmt: skip
    by_kernel = [ax.plot([], [], m, color=INK, label=k)[0] for k, m in markers.items()]
    by_step = [ax.plot([], [], "s", color=c, label=s)[0] for s, c in colours.items()]
    ax.add_artist(ax.legend(handles=by_kernel, loc="lower right", fontsize=9, frameon=False))
    figure.legend(handles=by_step, loc="outside right upper", fontsize=9, frameon=False,
                  title="step")  # fmt: skip
    figure.supxlabel(f"{where(record)}; entropy {record['entropy']:.2f}", fontsize=9)
    plain(ax)
    return figure


def step_bars(record: Record) -> Figure:
    """Phases of an update, and its extra memory, by head."""
    variants = list(record["variants"].items())[::-1]
    figure = Figure(figsize=(11, 0.5 * len(variants) + 1.9), dpi=110, layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(3, 2), sharey=True)
    colours = {"decoder forward": "#CCCCCC", "head forward": BLUE, "head backward": "#56B4E9",
               "decoder backward": "#AAAAAA", "clip": ORANGE, "step": PINK}  # fmt: skip
    order = sorted(colours, key=lambda phase: phase not in HEAD_PHASES)
    slow = max(v["total_s"]["median"] for _, v in variants) > 2
    for y, (name, v) in enumerate(variants):
        begin = 0.0
        for phase in order:
            width = (1 if slow else 1e3) * v["phases_s"][phase]["median"]
            left.barh(y, width, left=begin, color=colours[phase], height=0.7,
                      label=phase if y == 0 else None)  # fmt: skip
            begin += width
        label = f" {v['tokens_per_s']['median']:,.0f} tokens/s"
        left.text(begin, y, label, va="center", fontsize=9)
        memory = v["peak_extra_bytes"] / 1e9
        right.barh(y, memory, color=BLUE if "ours" in name else GREY, height=0.7)
        right.text(memory, y, f" {memory:.2f}", va="center", fontsize=9)
    left.set_yticks(range(len(variants)), [name for name, _ in variants])
    left.set_xlabel(f"{'s' if slow else 'ms'} of an update")
    right.set_xlabel("extra memory at its peak, GB")
    left.margins(x=0.22)
    right.margins(x=0.15)
    figure.legend(loc="outside upper center", ncols=6, frameon=False, fontsize=9)
    caption = f"{record['model']}, {record['shape']['tokens']:,} tokens, {where(record)}"
    figure.supxlabel(caption, fontsize=9)
    plain(left, right)
    return figure


def error_by_grad_eps(record: Record) -> Figure | None:
    """Relative error of the gradients against grad_eps; None without such variants."""
    found = {}
    for name, v in record["variants"].items():
        if exponent := re.search(r"grad_eps=2\^(-\d+)$", name):
            found[2.0 ** int(exponent[1])] = v["errors"]
    if len(found) < 2:
        return None
    figure = Figure(figsize=(7.5, 4.4), dpi=110, layout="constrained")
    ax = figure.subplots()
    x = sorted(found)
    for key, label, colour, marker in (
        ("d_hidden", "dX", BLUE, "o-"), ("d_weight", "dW", RED, "s-"),
        ("norm", "norm of dW", GREEN, "^-"),
    ):  # fmt: skip
        ax.plot(x, [found[eps][key] for eps in x], marker, color=colour, label=label)
        exact = record["variants"].get("ours, grad_eps=0")
        if exact and key != "norm":
            ax.axhline(exact["errors"][key], color=colour, linestyle=":", linewidth=1,
                       label=f"{label}, grad_eps = 0")  # fmt: skip
    ax.axvline(GRAD_EPS, color=GREY, linestyle=":", linewidth=1)
    ax.text(GRAD_EPS, ax.get_ylim()[1], " default", va="top", fontsize=9, color=INK)
    ax.set_xscale("log", base=2)
    ax.set(yscale="log", xlabel="grad_eps: where the random tail begins",
           ylabel="relative error against fp64")  # fmt: skip
    ax.legend(frameon=False)
    figure.supxlabel(f"{where(record)}; entropy {record['entropy']:.2f}", fontsize=8)
    plain(ax)
    return figure


# -- several records, one figure ------------------------------------------------------------------

# Axis -> pattern of its part of a record's name, and how a panel's title tells it.
AXES = {
    "rows": (r"_n(\d+)", "N = {}"),
    "entropy": (r"_(?:e|T)(dense|[\d.]+)", "rows {}"),
    "model": (f"_({'|'.join(map(re.escape, HEADS))})", "{}"),
}
Panels = dict[str, list[tuple[str, Record]]]


def series(records: dict[str, Record], axis: str) -> Iterator[tuple[str, Panels]]:
    """Stem -> panels (what else tells records apart) -> records in the order of the axis.

    A record without that part in its name belongs to the others of its stem.
    """
    stems: dict[str, Panels] = defaultdict(lambda: defaultdict(list))
    for name, record in records.items():
        stem, rest = name, []
        for other, (pattern, title) in AXES.items():
            if (part := re.search(pattern, stem)) and other != axis:
                rest.append(title.format(part[1]))
            stem = re.sub(pattern, "", stem)
        stems[stem][", ".join(rest)].append((name, record))
    for stem, panels in stems.items():
        several = {rest: found for rest, found in panels.items() if len(found) > 1}
        if several:
            yield stem, several


def lines(
    panels: Panels, x_of: Callable[[Record], float], y_of: Callable[[Record, str], float],
    x_label: str, y_label: str, sizes: str, log_x: bool,
) -> Figure | None:  # fmt: skip
    """A line per variant that is in two records or more, a panel per group of records."""
    drawn = []
    for rest, named in panels.items():
        points: dict[str, list[tuple[float, float]]] = defaultdict(list)
        for _, record in sorted(named, key=lambda item: x_of(item[1])):
            for name in record["variants"]:
                points[name].append((x_of(record), y_of(record, name)))
        points = {name: p for name, p in points.items() if len({x for x, _ in p}) > 1}
        if points:
            drawn.append((rest, named[0][1], points))
    if not drawn:
        return None
    columns = min(3, len(drawn))
    count = -(-len(drawn) // columns)
    figure = Figure(figsize=(3.2 + 4.2 * columns, 3.9 * count + 0.5), dpi=110, layout="constrained")
    axes = list(figure.subplots(count, columns, squeeze=False).flat)
    handles: dict[str, Any] = {}
    for ax, (rest, _, points) in zip(axes, drawn, strict=False):
        for name, p in points.items():
            xs, ys = [x for x, _ in p], [y for _, y in p]
            handles[name] = ax.plot(xs, ys, marker="o", markersize=4, label=name, **style(name))[0]
        if log_x:
            ax.set_xscale("log", base=2)
            values = sorted({x for p in points.values() for x, _ in p})
            ax.set_xticks(values, [f"{x:,.0f}" for x in values])
        ax.set_ylim(bottom=0)
        ax.set(title=rest, xlabel=x_label, ylabel=y_label)
        plain(ax)
    for ax in axes[len(drawn) :]:
        ax.set_visible(False)
    figure.legend(list(handles.values()), list(handles), loc="outside right upper", frameon=False,
                  fontsize=9)  # fmt: skip
    figure.supxlabel(where(drawn[0][1], sizes), fontsize=8)
    return figure


def by_rows(panels: Panels) -> Figure | None:
    return lines(
        panels, lambda r: r["shape"]["N"],
        lambda r, name: 1e6 * r["variants"][name]["total_s"]["median"] / r["shape"]["N"],
        "N, rows", "µs a row, forward and backward", "DV", log_x=True,
    )  # fmt: skip


def by_entropy(panels: Panels) -> Figure | None:
    """Of real rows: random ones are far from any policy's entropy."""
    real = {
        rest: [(name, r) for name, r in named if r["temperature"] is not None]
        for rest, named in panels.items()
    }
    return lines(
        real, lambda r: r["entropy"],
        lambda r, name: 1e3 * r["variants"][name]["total_s"]["median"],
        "mean entropy of the rows, nats", "ms, forward and backward", "NDV", log_x=False,
    )  # fmt: skip


def model_of(name: str) -> str:
    """Of a record; bench_lm_head's own where its name has none."""
    part = re.search(AXES["model"][0], name)
    return part[1] if part else next(iter(HEADS))


def by_model(panels: Panels) -> Figure:
    """Multiples of the bare product, by model and variant; a panel per number of rows."""
    order = list(HEADS)
    panels = dict(sorted(panels.items(), key=lambda item: item[1][0][1]["shape"]["N"]))
    figure = Figure(figsize=(11, 3.6 * len(panels) + 0.6), dpi=110, layout="constrained")
    axes = figure.subplots(len(panels), 1, squeeze=False)[:, 0]
    names = dict.fromkeys(
        name for named in panels.values() for _, r in named for name in r["variants"]
    )
    names.pop(BARE)
    width = 0.8 / len(names)
    for ax, named in zip(axes, panels.values(), strict=True):
        named = sorted(named, key=lambda item: order.index(model_of(item[0])))
        for i, name in enumerate(names):
            there = [(x, r) for x, (_, r) in enumerate(named) if name in r["variants"]]
            ax.bar(
                [x + (i - (len(names) - 1) / 2) * width for x, _ in there],
                [r["variants"][name]["ratio_to_bare"]["median"] for _, r in there],
                width, label=name, color=style(name)["color"],
                hatch="" if style(name)["linestyle"] == "-" else "///", edgecolor="white",
            )  # fmt: skip
        labels = []
        for name, record in named:
            sizes = f"D={record['shape']['D']:,} V={record['shape']['V']:,}"
            cap = f"\nsoftcap {record['softcap']:g}" if record["softcap"] else ""
            labels.append(f"{model_of(name)}\n{sizes}{cap}")
        ax.set_xticks(range(len(named)), labels, fontsize=8)
        ax.axhline(1, color=INK, linestyle=":", linewidth=1)
        ax.set(title=f"N = {named[0][1]['shape']['N']:,}", ylabel="time / bare product")
        plain(ax)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right upper", frameon=False,
                  fontsize=9)  # fmt: skip
    record = next(iter(panels.values()))[0][1]
    figure.supxlabel(f"{where(record, '')}; entropy {record['entropy']:.2f}", fontsize=9)
    return figure


# -- not from a record ----------------------------------------------------------------------------


def active_set() -> Figure:
    """Which entries are kept: a part of the vocabulary for some rows; counts against entropy."""
    figure = Figure(figsize=(11, 4.2), dpi=110, layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    for temperature, colour in ((1.0, RED), (0.6, BLUE), (0.4, GREY)):
        rows = real_rows(512, temperature)
        n, vocabulary = len(rows.target), len(rows.weight)
        logp = torch.log_softmax(rows.hidden @ rows.weight.T, 1)
        p, entropy = logp.exp(), -(logp.exp() * logp).sum(1)
        generator = torch.Generator().manual_seed(0)
        kept = torch.rand(n, vocabulary, generator=generator) < p / GRAD_EPS
        if temperature == 1.0:
            order = p.amax(0).argsort(descending=True)[:2048]
            image = torch.where(p >= GRAD_EPS, 2, kept.int())[:128, order]
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
    plain(right)
    return figure


def task_curves(folder: Path) -> Figure | None:
    """Reward and held-out accuracy of the trainer's task families, a panel each."""
    logs = {path.name.split(".")[0]: path for path in sorted(folder.glob("*.metrics.jsonl.gz"))}
    if not logs:
        return None
    figure = Figure(figsize=(3.7 * len(logs), 3.2), dpi=110, layout="constrained")
    panels = figure.subplots(1, len(logs), squeeze=False)[0]
    for ax, (name, path) in zip(panels, logs.items(), strict=True):
        with gzip.open(path, "rt") as file:
            rows = [json.loads(line) for line in file]
        drawn = {row["rollouts"]: row["reward"] for row in rows if row["type"] == "update"}
        held = {row["rollouts"]: row["accuracy"] for row in rows if row["type"] == "eval"}
        ax.plot(list(drawn), list(drawn.values()), ".", color=GREY, markersize=4)
        ax.plot(list(held), list(held.values()), color=BLUE, linewidth=1.8)
        ax.set(title=name, xlabel="rollout batches", ylim=(0, 1))
    panels[0].set_ylabel("blue: held-out accuracy\ngrey: mean reward of a batch")
    plain(*panels)
    return figure


def figures(records: dict[str, Record]) -> Iterator[tuple[str, Figure]]:
    """Name and figure of everything that these records allow."""
    records = {name: r for name, r in records.items() if not SUPERSEDED.search(name)}
    heads = {name: r for name, r in records.items() if r.get("benchmark") == "lm_head"}
    for name, record in records.items():
        kind = record.get("benchmark")
        if kind == "lm_head":
            if (figure := error_by_grad_eps(record)) is not None:
                yield name, figure
            elif len(record["variants"]) > 5:
                yield name, head_bars(record)
        elif kind == "kernels" and "NVIDIA" in record["stamp"]["device"]:
            yield f"{name}_roofline", roofline(record)
        elif kind == "step":
            yield name, step_bars(record)
        elif kind == "trl":
            yield name, draw_learning({a: {int(s): rows for s, rows in of.items()}
                                       for a, of in record["logs"].items()})  # fmt: skip
    for axis, draw in (("rows", by_rows), ("entropy", by_entropy), ("model", by_model)):
        for stem, panels in series(heads, axis):
            if (figure := draw(panels)) is not None:
                yield f"{stem}_by_{axis}", figure


def read(results: Path) -> dict[str, Record]:
    """Records by name: the path below `results`, without its suffix."""
    found = {}
    for path in sorted(results.rglob("*.json")):
        found[path.relative_to(results).with_suffix("").as_posix()] = json.loads(path.read_text())
    return found


def main() -> None:
    """Draw what there is."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of records")
    parser.add_argument("--images", type=Path, help="where figures go")
    parser.add_argument("--active-set", action="store_true")
    args = parser.parse_args()
    home = args.results.resolve() == (Path(__file__).parent / "results").resolve()
    images = args.images or (IMAGES if home else args.results / "images")
    images.mkdir(parents=True, exist_ok=True)
    records = read(args.results)
    (args.results / "tables.md").write_text(tables(records))
    print(f"written: {args.results / 'tables.md'}")
    drawn = dict(figures(records))
    if (curves := task_curves(args.results / "tasks")) is not None:
        drawn["tasks"] = curves
    if args.active_set:
        drawn["active_set"] = active_set()
    for name, figure in drawn.items():
        path = images / f"{name.replace('/', '_')}.png"
        figure.savefig(path)
        print(f"written: {path}")
    for name, record in records.items():
        # These draw what they record.
        if record.get("benchmark") == "bias":
            from .bench_bias import plot as draw
        elif record.get("benchmark") == "screen":
            from .bench_screen import draw
        else:
            continue
        path = images / f"{name.replace('/', '_')}.png"
        draw(record, path)
        print(f"written: {path}")


if __name__ == "__main__":
    main()
