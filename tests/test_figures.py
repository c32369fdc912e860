"""The tables of the README and of docs/evidence.md say what the records say."""

from __future__ import annotations

import json
import lzma
import re
from pathlib import Path
from typing import Any

import pytest

from python_trainer.plots import style

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"


def table(page: str, first: str) -> dict[str, list[str]]:
    """Rows of the Markdown table whose heading begins so: label -> other cells, without marks."""
    text = (ROOT / page).read_text().replace("\\|", "¦").replace("**", "").replace("`", "")
    _, _, rest = text.partition(f"\n| {first}")
    assert rest, f"{page} has no table that begins {first!r}"
    rows = rest.split("\n\n")[0].splitlines()[2:]
    cells = ([cell.strip() for cell in row.strip("|").split("|")] for row in rows)
    return {label: values for label, *values in cells}


def record(name: str) -> dict[str, Any]:
    return json.loads((RESULTS / f"{name}.json").read_text())


def digits(value: float, like: str) -> str:
    """The value in the notation of a cell: 16.9, 1.9e-3, 115%."""
    mantissa, _, exponent = re.sub(r"[^-0-9.e]", "", like).partition("e")
    places = len(mantissa.partition(".")[2])
    if not exponent:
        return f"{value:.{places}f}"
    number, power = f"{value:.{places}e}".split("e")
    return f"{number}e{int(power)}"


def held(cells: list[str], values: list[float | None]) -> None:
    """Each number of the cells is the value beside it; None is not looked at."""
    numbers = [n for cell in cells for n in re.findall(r"-?\d[\d.]*(?:e-?\d+)?", cell)]
    assert len(numbers) == len(values), (numbers, values)
    for said, value in zip(numbers, values, strict=True):
        if value is not None:
            assert digits(value, said) == digits(float(said), said), (cells, values)


# Labels of the README that are not the record's names.
NAMES = {
    "ours, lse_ref": "ours, with lse_ref",
    "ours, lse_ref, int8 screen": "ours, with lse_ref, screen int8",
    "ours, lse_ref, fp8 screen": "ours, with lse_ref, screen fp8",
    "ours, int8 screen": "ours, screen int8",
    "torch eager, 16-bit product cast to fp32": "torch eager",
    "verl's Triton head": "verl",
    "Liger scaled cross-entropy (SM90)": "Liger scaled cross-entropy",
    "bare product hidden @ weight.T, nothing else": "bare product",
}


def test_the_h100s_table():
    variants, rows = record("h100/lm_head")["variants"], table("README.md", "| ms |")
    assert len(rows) == 15
    for label, cells in rows.items():
        found = variants[NAMES.get(label, label)]
        values = [1e3 * found["total_s"]["median"], found["ratio_to_bare"]["median"]]
        if "errors" in found:
            errors = [found["errors"][e] for e in ("logp_mean_abs", "d_hidden", "d_weight")]
            values += [found["peak_extra_bytes"] / 1e9, *errors]
        held(cells, values)
    shown = {NAMES.get(label, label) for label in rows}
    assert not {v for v in variants if "peak_extra_bytes" in variants[v]} - shown, "one left out"


def test_the_cpus_table():
    one, two = (record(f"cpu_{n}_thread{'s' * (n > 1)}")["variants"] for n in (1, 2))
    rows = table("benchmarks/README.md", "forward + backward, as a multiple")
    for label, cells in rows.items():
        name = NAMES.get(label, label)
        both = [of[name]["ratio_to_bare"]["median"] for of in (one, two) if name in of]
        errors = [one[name]["errors"][e] for e in ("d_hidden", "d_weight")]
        held(cells, [*both, one[name]["peak_extra_bytes"] / 1e6, *errors])
    shown = {NAMES.get(label, label) for label in rows} | {"bare product"}
    assert not set(one) - shown, "one left out"


def arms(name: str) -> dict[str, dict[str, float]]:
    """The means of an evidence record's table, which a test of its own holds to the record."""
    lines = (RESULTS / "evidence" / f"{name}.md").read_text().splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("| arm "))
    columns = [c.strip() for c in lines[start].strip("|").split("|")]
    found = {}
    for line in lines[start + 2 :]:
        if not line:
            break
        label, *cells = (c.strip() for c in line.strip("|").split("|"))
        found[label] = dict(zip(columns[1:], (c.split(" ")[0] for c in cells), strict=True))
        found[label]["spread"] = cells[1].split(" ")[2]  # of the curve mean
    return found


COLUMNS = ("fewer batches to goal", "sooner at 80 % sampling", "uses")


def test_what_gating_is_worth():
    of = arms("main") | {"schedule": arms("schedule")["Uses 8, 4, 2, 1"]}
    names = {
        "gain gate": "Gain gate", "no gate": "schedule", "fixed K = 8": "Fixed K=8",
        "fixed K = 3": "Fixed K=3", "the paper's gate (DGG)": "DGG",
        "control": "DGG's counts, shuffled",
    }  # fmt: skip
    rows = table("README.md", "| fewer batches |")
    assert len(rows) == len(names)
    for label, cells in rows.items():
        found = of[names[re.split(r"[,:]", label)[0]]]
        held(cells, [float(found[column]) for column in COLUMNS])


def test_the_main_table_of_the_evidence():
    of = arms("main")
    with lzma.open(RESULTS / "evidence" / "main.jsonl.xz", "rt") as file:
        settings = json.loads(next(file))["arms"]
    rates = {style(arm)[0]: config["learning_rate"] for arm, config in settings.items()}
    rows = table("docs/evidence.md", "arm | rate | curve mean |")
    assert len(rows) == len(of) == 20
    names = {
        "DGG, the paper's": "DGG", "Random stop, DGG's mean": "Random stop",
        "DGG's counts (squared), shuffled": "DGG's counts, squared norm, shuffled",
    }  # fmt: skip
    for label, (rate, *cells) in rows.items():
        key = names.get(label, label.removesuffix(", K = 8").replace("K = ", "K="))
        assert float(rate) == rates[key]
        assert cells[0] == f"{of[key]['curve mean']} ± {of[key]['spread']}"
        values = [float(of[key][column]) for column in ("last quarter", "final", *COLUMNS)]
        held(cells[1:], values)


def test_the_controls_without_a_clip():
    of = arms("surge_controls")
    rows = table("docs/evidence.md", "no clip of the ratio, 2e-4, seeds 200")
    assert len(rows) == len(of)
    names = {"fixed K = 2": "Fixed K=2", "fixed K = 4": "Fixed K=4", "single use": "Single use"}
    for label, cells in rows.items():
        found = of[names.get(label, label)]
        held(cells[:3], [float(found[c]) for c in ("curve mean", "last quarter", "uses")])


@pytest.mark.parametrize(("said", "value"), [("16.9", 16.94), ("2.0e-3", 0.00196), ("115", 115.4)])
def test_a_figure_is_compared_in_its_own_digits(said, value):
    held([said], [value])
    with pytest.raises(AssertionError):
        held([said], [value * 1.1])
