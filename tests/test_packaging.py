"""The source archive, the wheel built from it, what they ask for, and what they must not need."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
VERSION = PROJECT["project"]["version"]
EXTRAS = PROJECT["project"]["optional-dependencies"]
TOP = {"CHANGELOG.md", "LICENSE", "MANIFEST.in", "README.md", "THIRD_PARTY.md", "pyproject.toml",
       "setup.py"}  # fmt: skip
# What the extra [alfworld] brings, by name of the package and of what is imported.
ALFWORLD = {"alfworld", "textworld", "fast-downward-textworld", "jericho", "tatsu", "mementos"}
ALFWORLD_MODULES = ("alfworld", "textworld", "fast_downward", "jericho", "tatsu", "mementos")


def run(*command: object, **options: object) -> str:
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, **options)
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return done.stdout


def files(folder: str, *suffixes: str) -> set[str]:
    return {p.relative_to(ROOT).as_posix() for s in suffixes for p in (ROOT / folder).rglob(s)}


PACKAGES = files("dgg_kernels", "*.py", "py.typed") | files(
    "python_trainer", "*.py", "*.toml", "py.typed"
)
USED = """
import dgg_kernels, torch
hidden, weight = torch.randn(5, 8, requires_grad=True), torch.randn(40, 8, requires_grad=True)
gate = dgg_kernels.GradientGate(dgg_kernels.GateConfig(), weight)
gate.new_batch()
out = dgg_kernels.linear_logprob(hidden, weight, torch.arange(5), gate=gate, grad_eps=0.0)
expected = (hidden @ weight.T).log_softmax(-1)[torch.arange(5), torch.arange(5)]
torch.testing.assert_close(out.logp, expected)
out.logp.sum().backward()
gate.decide()
print(gate.is_shut(), dgg_kernels.replay([[1.0]], gate.config)[0][0].shut, dgg_kernels.__file__)
"""


def test_the_wheel_built_from_the_source_archive_is_whole_and_works_for_every_python(tmp_path):
    plain = {k: v for k, v in os.environ.items() if k not in ("FORCE_CUDA", "PYTHONPATH")}
    run(sys.executable, "setup.py", "-q", "egg_info", "--egg-base", tmp_path,
        "sdist", "--dist-dir", tmp_path, cwd=ROOT, env=plain)  # fmt: skip
    (archive,) = tmp_path.glob("*.tar.gz")
    base = f"dgg_kernels-{VERSION}"
    with tarfile.open(archive) as tar:
        names = {m.name.removeprefix(base + "/") for m in tar.getmembers() if m.isfile()}
        tar.extractall(tmp_path, filter="data")
    made = {name for name in names if name in ("PKG-INFO", "setup.cfg") or ".egg-info/" in name}
    assert names - made == TOP | PACKAGES | files("csrc", "*.h", "*.cpp", "*.cu")

    run(sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation",
        "--no-index", "-w", tmp_path, tmp_path / base, env=plain)  # fmt: skip
    (wheel,) = tmp_path.glob("*.whl")
    assert re.fullmatch(rf"{base}-cp311-abi3-linux_\w+\.whl", wheel.name)
    info = f"{base}.dist-info/"
    with zipfile.ZipFile(wheel) as package:
        metadata = {f"{info}{name}" for name in ("METADATA", "RECORD", "WHEEL", "top_level.txt")}
        licences = {f"{info}licenses/{name}" for name in ("LICENSE", "THIRD_PARTY.md")}
        library = "dgg_kernels/_ops.abi3.so"
        assert set(package.namelist()) == PACKAGES | {library} | metadata | licences

    site = tmp_path / "site"
    run(sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-index", "--target", site,
        wheel, env=plain)  # fmt: skip
    symbols = run("nm", "-D", "--undefined-only", site / library)
    assert "aoti_torch" in symbols and not re.findall(r"\b_?Py\w+", symbols)
    assert "libtorch_python" not in run("readelf", "-d", site / library)
    elsewhere = {"cwd": tmp_path, "env": plain | {"PYTHONPATH": str(site)}}
    told = run(sys.executable, "-c", USED, **elsewhere).split()
    assert told == ["False", "False", str(site / "dgg_kernels" / "__init__.py")]
    told = run(sys.executable, "-m", "dgg_kernels.info", **elsewhere)
    assert told.startswith(f"dgg_kernels {VERSION}: {site / library}\n")


@pytest.mark.parametrize("stale", ["layout", "older", "missing"])
def test_a_library_that_is_not_of_these_sources_is_refused_in_one_line(stale, tmp_path):
    shutil.copytree(ROOT / "dgg_kernels", tmp_path / "dgg_kernels")
    gate = tmp_path / "dgg_kernels" / "gate.py"
    library = tmp_path / "dgg_kernels" / "_ops.abi3.so"
    source, says = gate.read_text(), "was built from other sources"
    if stale == "layout":
        gate.write_text(source.replace("POSITION LATCH", "LATCH POSITION"))
    elif stale == "older":
        gate.write_text(source.replace('"gate_layout"', '"an_op_that_it_lacks"'))
    else:
        library.unlink()
        says = "are missing in"
    done = subprocess.run([sys.executable, "-c", "import dgg_kernels"], cwd=tmp_path,
                          capture_output=True, text=True)  # fmt: skip
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert last.startswith("ImportError: dgg_kernels: ") and says in last and str(tmp_path) in last


def asked_for(requirements: list[str], found: dict[str, str]) -> None:
    """Adds to `found` what the requirements ask for, and what that asks for: name -> licence."""
    for requirement in map(Requirement, requirements):
        name = canonicalize_name(requirement.name)
        extras = requirement.extras or {""}
        if name == "dgg-kernels":
            for extra in extras:
                asked_for(EXTRAS[extra], found)
        elif name not in found:
            try:
                told = distribution(name)
            except PackageNotFoundError:  # as an extra that is not installed here
                found[name] = ""
                continue
            licence, *_ = (told.metadata.get("License") or "").partition("\n")  # may be all of it
            texts = [licence, *(told.metadata.get_all("License-Expression") or []),
                     *(told.metadata.get_all("Classifier") or [])]  # fmt: skip
            found[name] = "\n".join(texts)
            asked_for([
                str(r).partition(";")[0] for r in map(Requirement, told.requires or [])
                if not r.marker or any(r.marker.evaluate({"extra": e}) for e in extras)
            ], found)  # fmt: skip


def test_only_the_extra_alfworld_asks_for_software_under_the_gpl():
    found: dict[str, str] = {}
    asked_for(PROJECT["project"]["dependencies"], found)
    for extra in EXTRAS.keys() - {"alfworld"}:
        asked_for(EXTRAS[extra], found)
    assert len(found) > 50 and {"torch", "numpy", "sympy", "trl"} <= found.keys()
    assert not found.keys() & ALFWORLD
    gpl = re.compile(r"\bL?GPL|GNU .*GENERAL PUBLIC", re.IGNORECASE)
    assert {name for name, licence in found.items() if gpl.search(licence)} == set()
    theirs: dict[str, str] = {}
    asked_for(EXTRAS["alfworld"], theirs)
    assert theirs.keys() >= ALFWORLD  # the search finds what it looks for, where it is
    assert gpl.search(theirs["fast-downward-textworld"]) and gpl.search(theirs["jericho"])


IMPORTED = """
import importlib, pkgutil, sys
sys.modules |= dict.fromkeys({blocked})
import dgg_kernels, python_trainer
without = {{"python_trainer.tasks.alfworld", "dgg_kernels.integrations.verl"}}
for package in (dgg_kernels, python_trainer):
    for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
        if module.name not in without and not module.name.endswith("_ops"):
            importlib.import_module(module.name)
print(len([name for name in sys.modules if name.startswith(("dgg_kernels.", "python_trainer."))]))
"""


def test_everything_but_the_task_alfworld_imports_without_what_that_extra_brings():
    count = int(run(sys.executable, "-c", IMPORTED.format(blocked=ALFWORLD_MODULES), cwd=ROOT))
    assert count > 40


def test_third_party_names_what_is_asked_for_and_no_more():
    rows = re.findall(
        r"^\| \**([\w-]+)\** \| (.*?) \|", (ROOT / "THIRD_PARTY.md").read_text(), re.M
    )
    asked = {"core": PROJECT["project"]["dependencies"],
             "the build": PROJECT["build-system"]["requires"],
             **{f"`[{extra}]`": names for extra, names in EXTRAS.items()}}  # fmt: skip
    expected: dict[str, set[str]] = {}
    for by, names in asked.items():
        for name in (canonicalize_name(Requirement(r).name) for r in names):
            expected.setdefault(name, set()).add(by)
    got = {name: set(by.split(", ")) for name, by in rows if name != "package"}
    expected.pop("dgg-kernels")
    expected["torch"] = {"core"}  # and so of everything
    assert got == expected
