"""What `make coverage` measured, as a record beside the benchmarks'.

`python tests/coverage_record.py PYTHON.json CPP.json NAME`: the reports of `coverage json` and of
`gcovr --json-summary`, of each file the share that was run, with device, versions, commit and date.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks import common

# verl is not of the environment that measures (tests/integrations/verl.txt).
ELSEWHERE = "dgg_kernels/integrations/verl.py"


def share(files: list[dict[str, Any]]) -> dict[str, Any]:
    """Lines and branches that were run, of several files; percent is of both together."""
    total = {
        name: sum(file[name] for file in files)
        for name in ("covered_lines", "num_statements", "covered_branches", "num_branches")
    }
    run = total["covered_lines"] + total["covered_branches"]
    every = total["num_statements"] + total["num_branches"]
    return total | {"percent": round(100 * run / every, 2)}


def main(python: str, cpp: str, name: str) -> None:
    files = json.loads(Path(python).read_text())["files"]
    by_file = {path: file["summary"] for path, file in files.items()}
    lines = json.loads(Path(cpp).read_text())
    record = {
        "stamp": common.stamp(torch.device("cpu")),
        "not counted": ELSEWHERE,
        "packages": {
            package: share(
                [f for path, f in by_file.items() if path.startswith(package) and path != ELSEWHERE]
            )
            for package in ("dgg_kernels", "python_trainer")
        },
        "python, percent of lines and branches": {
            path: round(file["percent_covered"], 1) for path, file in sorted(by_file.items())
        },
        "csrc, percent of lines": {"all": lines["line_percent"]}
        | {file["filename"]: file["line_percent"] for file in lines["files"]},
    }
    print(common.save(name, record))


if __name__ == "__main__":
    main(*sys.argv[1:])
