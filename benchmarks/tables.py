"""The tables of README and docs, as Markdown, from the recorded JSON alone (`benchmarks.plot`)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from rich.console import Console
from rich.markdown import Markdown

from python_trainer import results

Record = dict[str, Any]
Row = list[str]


def tables(records: dict[str, Record]) -> str:
    """One section per record that has a table."""
    sections = ["# Tables", "Made by `python -m benchmarks.plot` from the records beside it."]
    for name, record in records.items():
        sections += of_record(name, record)
    return "\n\n".join(sections) + "\n"


def of_record(name: str, record: Record) -> Iterator[str]:
    for title, rows in TABLES.get(record.get("benchmark", ""), lambda _: ())(record):
        yield from (f"## {name}{title}", caption(record), markdown(rows))
    if missing := record.get("missing"):
        yield "No times: " + "; ".join(f"{who} ({why})" for who, why in missing.items())


def show(record: Record, console: Console) -> None:
    """What was measured, on a terminal."""
    console.print(Markdown("\n\n".join(of_record(record["benchmark"], record))))


def markdown(rows: list[Row]) -> str:
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([lines[0], "|---" * len(rows[0]) + "|", *lines[1:]])


def caption(record: Record) -> str:
    """What was measured, on what, with which commit."""
    stamp = record["stamp"]
    parts = [f"{name}={size:,}" for name, size in record.get("shape", {}).items()]
    for key, text in (("dtype", "{}"), ("entropy", "entropy {:.2f}"), ("model", "{}"),
                      ("kept_per_row", "{:.0f} entries kept a row"),
                      ("zero_rows", "{:.0%} of the rows with c = 0")):  # fmt: skip
        if record.get(key):
            parts.append(text.format(record[key]))
    threads = "" if "NVIDIA" in stamp["device"] else f", {stamp['threads']} thread(s)"
    parts.append(f"{stamp['device']}{threads}")
    dirty = " with changes" if stamp["dirty"] else ""
    return f"{', '.join(parts)}; commit {stamp['commit']}{dirty}, {stamp['date'][:10]}"


def readable(number: float) -> str:
    """Three digits, and never an exponent."""
    return f"{number:,.0f}" if number >= 100 else f"{number:.3g}"


def milliseconds(of: dict[str, float]) -> str:
    return readable(1e3 * of["median"])


def memory(count: float) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"


def heads(record: Record) -> Iterator[tuple[str, list[Row]]]:
    rows = [["forward + backward", "ms", "forward", "× bare product", "p20 to p80",
             "extra memory", "error of dX / dW"]]  # fmt: skip
    for name, v in sorted(
        record["variants"].items(), key=lambda item: item[1]["ratio_to_bare"]["median"]
    ):
        ratio, errors = v["ratio_to_bare"], v.get("errors")
        rows.append([
            name, milliseconds(v["total_s"]), milliseconds(v["forward_s"]),
            f"{ratio['median']:.2f}", f"{ratio['p20']:.2f} to {ratio['p80']:.2f}",
            memory(v["peak_extra_bytes"]) if errors else "",
            f"{errors['d_hidden']:.1e} / {errors['d_weight']:.1e}" if errors else "",
        ])  # fmt: skip
    yield "", rows


def kernels(record: Record) -> Iterator[tuple[str, list[Row]]]:
    from .bench_kernels import achieved

    replayed = record.get("replayed", {})
    ceiling = record["ceilings"]
    yield ": ceilings", [
        ["copy", "bare product", ""],
        [f"{ceiling['copy_bytes_per_s'] / 1e12:.3g} TB/s", f"{ceiling['bare_product_ms']:.4g} ms",
         f"{ceiling['bare_product_flop_per_s'] / 1e12:.3g} TFLOP/s"],
    ]  # fmt: skip
    yield (
        ": steps",
        [["step", "ms", "ms in a CUDA graph"]]
        + [
            [step, f"{ms:.1f}", f"{replayed[step]:.1f}" if step in replayed else ""]
            for step, ms in record["steps"].items()
        ],
    )
    yield ": kernels", [["step", "kernel", "ms", "TFLOP/s", "GB/s", "of the roofline"]] + [
        [a["step"], a["kernel"], f"{a['ms']:.2f}", readable(a["flop_per_s"] / 1e12),
         readable(a["bytes_per_s"] / 1e9), f"{a['share_of_roofline']:.0%}"]
        for a in achieved(record)
    ]  # fmt: skip
    yield ": accuracy of the log-probs", [
        ["screen", "mean", "max", "bias", "refined a row", "missed a row", "exact rows"]
    ] + [
        [name, f"{a['mean_abs']:.1e}", f"{a['max_abs']:.1e}",
         f"{a['bias']:.1e} ± {a['bias_standard_error']:.1e}",
         *(f"{a[key]:.2g}" if key in a else ""
           for key in ("refined_per_row", "missed_per_row", "exact_rows"))]
        for name, a in record["accuracy"].items()
    ]  # fmt: skip


def gates(record: Record) -> Iterator[tuple[str, list[Row]]]:
    rows = [["loop", "backward ms", "decide ms", "of the head", "step ms"]]
    for name, of in record["loops"].items():
        rows.append([name, *(milliseconds(of[key]) for key in ("backward_s", "decide_s")),
                     f"{of['decide_share_of_head']['median']:.3%}",
                     milliseconds(of["step_s"])])  # fmt: skip
    if whole := record.get("whole_update"):
        rows.append(["GradientGate, a whole update of the demo's model", "",
                     f"{1e3 * whole['decide_s']:.2f}", f"{whole['share']:.2%} of the update",
                     ""])  # fmt: skip
    yield "", rows


def steps(record: Record) -> Iterator[tuple[str, list[Row]]]:
    speedup = f"× {record['baseline']} (p20 to p80)"
    rows = [["head", "update ms", "tokens/s", speedup, "head's share", "extra memory",
             "error of dX / dW"]]  # fmt: skip
    for name, v in record["variants"].items():
        fast, errors = v["speedup"], v["errors"]
        rows.append([
            name, milliseconds(v["total_s"]), f"{v['tokens_per_s']['median']:,.0f}",
            f"{fast['median']:.2f} ({fast['p20']:.2f} to {fast['p80']:.2f})",
            f"{v['head_share']['median']:.0%}", memory(v["peak_extra_bytes"]),
            f"{errors['d_hidden']:.1e} / {errors['d_weight']:.1e}",
        ])  # fmt: skip
    yield "", rows


def screens(record: Record) -> Iterator[tuple[str, list[Row]]]:
    columns = ("mean_abs", "max_abs", "bias", "ratio_max_error", "energy_spread", "refined_per_row",
               "outside_bound")  # fmt: skip
    rows = [["T", "entropy", "screen", "grad_eps", "× bare product",
             *(name.replace("_", " ") for name in columns)]]  # fmt: skip
    for temperature, of in record["temperatures"].items():
        for s in of["settings"]:
            rows.append([
                str(temperature), f"{of['entropy']:.2f}", str(s["screen"]), f"{s['grad_eps']:.1e}",
                f"{s['seconds'] / of['bare_s']:.2f}",
                *(f"{s[name]:.1e}" if name in s else "" for name in columns),
            ])  # fmt: skip
    yield "", rows


def bias(record: Record) -> Iterator[tuple[str, list[Row]]]:
    yield "", [["last quarter", "difference to every entry", "every entry", "spread of seeds"]] + [
        [name, f"{v['mean_difference']:+.5f} ± {v['standard_error']:.5f}",
         f"{v['exact_mean']:.4f}", f"{v['seed_spread']:.4f}"]
        for name, v in record.get("verdict", {}).items()
    ]  # fmt: skip


def trl(record: Record) -> Iterator[tuple[str, list[Row]]]:
    rows = [[*results.COLUMNS], *results.table(record["summary"])]
    yield "", [row[:-1] for row in rows]  # without the seconds: other work went on beside it


TABLES: dict[str, Callable[[Record], Any]] = {
    "lm_head": heads, "kernels": kernels, "gate": gates, "step": steps, "screen": screens,
    "bias": bias, "trl": trl,
}  # fmt: skip
