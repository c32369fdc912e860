"""Who imports whom: the arrows of the layout, and what importing the package costs."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# module of dgg_kernels -> modules of dgg_kernels it may import
ARROWS = {
    "reference": set(),
    "configs": set(),
    "optim": set(),
    "monitor": set(),
    "_library": set(),
    "lm_head_chunked": set(),
    "lm_head_forward": {"configs", "lm_head_screen"},  # the latter where a screen is asked for
    "lm_head_backward": {"configs", "lm_head_forward"},
    "lm_head_screen": {"configs", "lm_head_forward", "screen"},
    "screen": {"lm_head_screen"},  # at its first call
    "lm_head": {"lm_head_chunked", "gate", "screen"},  # and the Triton files, at their first call
    "cross_entropy": {"lm_head"},
    "distributed": {"lm_head", "monitor"},
    "gate": {"_library", "monitor", "optim"},
    "info": {"__init__", "_library", "gate", "lm_head"},
    "replay_log": {"__init__", "gate"},
    "__init__": {"_library", "cross_entropy", "gate", "lm_head", "optim"},
}


def imports(path: Path) -> list[str]:
    """Absolute dotted names of what a file imports, relative ones resolved in its package."""
    package = path.parent.relative_to(ROOT).as_posix().replace("/", ".")
    names = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package if node.level else ""
            full = ".".join(filter(None, (base, node.module)))
            names += [f"{full}.{alias.name}" for alias in node.names]
    return names


@pytest.mark.parametrize("path", sorted((ROOT / "dgg_kernels").glob("*.py")), ids=lambda p: p.stem)
def test_arrows_inside_dgg_kernels(path):
    ours = [name.split(".") for name in imports(path) if name.split(".")[0] == "dgg_kernels"]
    found = {parts[1] if len(parts) > 1 else "__init__" for parts in ours}
    modules = {p.stem for p in path.parent.glob("*.py")}
    found = {name if name in modules else "__init__" for name in found} - {path.stem}
    assert found <= ARROWS[path.stem], f"{path.name} imports {found - ARROWS[path.stem]}"


def test_the_trainer_uses_public_names_only_and_nothing_imports_tests_or_benchmarks():
    for folder in ("dgg_kernels", "python_trainer"):
        for path in (ROOT / folder).rglob("*.py"):
            for name in imports(path):
                top = name.split(".")[0]
                assert top not in ("tests", "benchmarks"), f"{path}: {name}"
                if folder == "dgg_kernels":
                    assert top != "python_trainer", f"{path}: {name}"
                elif top == "dgg_kernels":
                    hidden = [part for part in name.split(".") if part.startswith("_")]
                    assert not hidden, f"{path}: {name}"


def test_integrations_use_public_names_only_and_the_package_does_without_them():
    for path in (ROOT / "dgg_kernels").rglob("*.py"):
        inside = path.parent.name == "integrations"
        for name in imports(path):
            parts = name.split(".")
            if parts[0] != "dgg_kernels":
                continue
            if inside:
                assert not [part for part in parts if part.startswith("_")], f"{path}: {name}"
            else:
                assert "integrations" not in parts, f"{path}: {name}"


LIBRARIES = ("transformers", "trl", "verl", "peft", "accelerate", "datasets")


def run(code: str) -> str:
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    ).stdout.strip()


def test_importing_the_kernels_imports_no_trainer_library():
    heavy = (*LIBRARIES, "matplotlib", "reasoning_gym", "python_trainer")
    code = f"import sys, dgg_kernels; print([m for m in {heavy} if m in sys.modules])"
    assert run(code) == "[]"


BLOCKED = """
import sys
sys.modules |= dict.fromkeys({blocked})
import torch, dgg_kernels, dgg_kernels.distributed, dgg_kernels.monitor, dgg_kernels.replay_log
head = torch.randn(9, 4, requires_grad=True)
gate = dgg_kernels.GradientGate(dgg_kernels.GateConfig(), head)
gate.new_batch()
out = dgg_kernels.linear_logprob(torch.randn(3, 4), head, torch.arange(3), gate=gate)
out.logp.sum().backward()
gate.decide()
from dgg_kernels.integrations.verl_head import linear_cross_entropy
linear_cross_entropy(torch.randn(3, 4), head, torch.arange(3))
"""
TRAINED = """
from dgg_kernels.integrations.transformers import DGGCallback, patch_lm_head
from python_trainer import compare, config, loop, model
policy = model.load_policy(config.TrainConfig(num_layers=1), ["1 2"])
patch_lm_head(policy.model)
tokens = torch.arange(6)[None]
print(policy.model(tokens, labels=tokens).log_probs.shape[1])
"""


def test_a_library_that_is_not_installed_breaks_nothing_else():
    run(BLOCKED.format(blocked=LIBRARIES))
    others = tuple(name for name in LIBRARIES if name != "transformers")
    assert run(BLOCKED.format(blocked=others) + TRAINED) == "5"
