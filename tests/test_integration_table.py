"""The compatibility table of docs/integrations.md is made of the tests: of their docstrings.

`python tests/test_integration_table.py` writes it anew.
"""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "integrations.md"
BEGIN, END = "<!-- made by tests/test_integration_table.py -->\n", "<!-- end -->\n"


def table() -> str:
    """A line for each docstring of a test in tests/test_integration_*.py."""
    lines = ["| library | version tested | what works | tested by |", "|---|---|---|---|"]
    for path in sorted(ROOT.glob("tests/test_integration_*.py")):
        library = path.stem.removeprefix("test_integration_")
        own = ROOT / "tests" / "integrations" / f"{library}.txt"  # an environment of its own
        pins = (own if own.exists() else ROOT / "constraints.txt").read_text().splitlines()
        versions = dict(pin.split("==") for pin in pins if "==" in pin)
        for node in ast.parse(path.read_text()).body:
            works = ast.get_docstring(node) if isinstance(node, ast.FunctionDef) else None
            if works and node.name.startswith("test_") and library in versions:
                works = " ".join(works.split())
                lines.append(f"| {library} | {versions[library]} | {works} | `{node.name}` |")
    return "\n".join(lines) + "\n"


def with_table(page: str) -> str:
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    return before + BEGIN + table() + END + after


def test_the_compatibility_table_is_made_of_the_tests_of_today():
    page = PAGE.read_text()
    assert with_table(page) == page, "run: python tests/test_integration_table.py"
    assert table().count("\n") > 12


if __name__ == "__main__":
    PAGE.write_text(with_table(PAGE.read_text()))
