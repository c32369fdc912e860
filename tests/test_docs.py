"""Every code block of the README and the docs runs, is tried, or is listed here with the reason.

- python runs: the blocks of a page in order, in one namespace, with what the page takes for granted
  (`GIVEN`). What a block prints stands in a text block after it; numbers may differ by machine.
- sh is run by bash with programs that only note how they were called. Each call is then checked:
  the module that it names parses its options, and is stopped there; files, targets of make and
  extras must exist.
- toml is a plan of `python -m python_trainer compare`; of a diff, what comes of it is Python.
"""

from __future__ import annotations

import ast
import re
import runpy
import subprocess
import sys
import textwrap
import tomllib
from argparse import ArgumentParser, Namespace
from itertools import pairwise
from pathlib import Path
from types import CodeType, SimpleNamespace
from typing import Any, NamedTuple

import pytest
import tiny_models
import torch
import torch.distributed as dist
from markdown_it import MarkdownIt

import dgg_kernels
from dgg_kernels.distributed import sharded_norm
from python_trainer import __main__ as trainer

ROOT = Path(__file__).parent.parent
PAGES = [
    path.relative_to(ROOT).as_posix()
    for pages in ("*.md", "docs/*.md", "benchmarks/*.md")
    for path in sorted(ROOT.glob(pages))
]
# (page, first line of the block) -> why it does not run here; python is compiled all the same.
NOT_RUN = {
    ("docs/gate.md", "optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True, "
     "capturable=True)"): "needs a GPU; tests/gpu/test_on_gpu.py captures such an update",
    ("docs/verl.md", "pip install --no-deps --no-build-isolation .  # in a checkout, where the "
     "actor's workers run"):
        "verl is not of this environment; tests/test_integration_verl.py builds its keys",
}  # fmt: skip
LANGUAGES = {"", "text", "python", "sh", "toml", "diff"}
# Files that a reader is to have, and what stands in for them.
YOURS = {"my.toml": "python_trainer/configs/math.toml"}
OF_A_RUN = re.compile(r"runs/\w+/\w+/seed-\d+/metrics\.jsonl")


class Block(NamedTuple):
    page: str
    line: int  # of the page, where the fence opens
    language: str
    source: str

    @property
    def key(self) -> tuple[str, str]:
        return self.page, self.source.partition("\n")[0]

    @property
    def where(self) -> str:
        return f"{self.page}:{self.line}"


def blocks_of(page: str) -> list[Block]:
    tokens = MarkdownIt().parse((ROOT / page).read_text())
    return [
        Block(page, (token.map or [0])[0] + 1, token.info, token.content)
        for token in tokens
        if token.type == "fence"
    ]


BLOCKS = [block for page in PAGES for block in blocks_of(page)]


def pages_with(language: str) -> list[str]:
    return [page for page in PAGES if any(b[0] == page and b[2] == language for b in BLOCKS)]


def runnable(language: str) -> Any:
    found = [b for b in BLOCKS if b.language == language and b.key not in NOT_RUN]
    return pytest.mark.parametrize("block", found, ids=lambda block: block.where)


def test_no_block_is_left_out():
    assert {b.where: b.language for b in BLOCKS if b.language not in LANGUAGES} == {}
    gone = NOT_RUN.keys() - {block.key for block in BLOCKS}
    assert not gone, "listed as not run, but no longer there"
    assert len(BLOCKS) > 25


# -- python ---------------------------------------------------------------------------------------


def update(**changes: Any) -> dict[str, Any]:
    """A model, its optimizer, a batch and a loss: what an excerpt of a loop takes for granted."""
    torch.manual_seed(0)
    model = tiny_models.build("Llama").train()
    tokens = torch.randint(tiny_models.V, (4, 9))
    batch = SimpleNamespace(tokens=tokens[:, :-1], targets=tokens[:, 1:])
    return {
        "torch": torch,
        "model": model,
        "optimizer": torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True),
        "rollouts": [batch] * 3,
        "batch": batch,
        "my_loss": lambda logp, entropy, batch: -logp.mean(),
        **changes,
    }


def update_under_way() -> dict[str, Any]:
    """The same with a gate and a finished backward, on the only rank of a process group."""
    given = update(sharded_norm=sharded_norm, linear_logprob=dgg_kernels.linear_logprob)
    head = given["model"].lm_head.weight
    gate = dgg_kernels.GradientGate(dgg_kernels.GateConfig(), head)
    gate.attach(given["optimizer"], max_grad_norm=1.0)
    gate.new_batch()
    hidden = given["model"].model(given["batch"].tokens).last_hidden_state
    out = dgg_kernels.linear_logprob(hidden, head, given["batch"].targets, gate=gate)
    out.logp.mean().backward(retain_graph=True)
    if not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    return {**given, "gate": gate, "hidden": hidden}


def transformers_objects() -> dict[str, Any]:
    from transformers import Trainer, TrainingArguments

    from dgg_kernels.integrations.transformers import DGGCallback

    class MyTrainer(Trainer):
        def __init__(self, model: Any, args: Any, *_: Any) -> None:
            super().__init__(model, args)

    ids = torch.randint(tiny_models.V, (2, 9))
    return {
        "model": tiny_models.build("Llama"),
        "input_ids": ids,
        "mask": torch.ones_like(ids),
        "labels": ids,
        "args": TrainingArguments("out", report_to=[], use_cpu=True),
        "MyTrainer": MyTrainer,
        "DGGCallback": DGGCallback,
        "GateConfig": dgg_kernels.GateConfig,
        "GradientGate": dgg_kernels.GradientGate,
    }


# What a page takes for granted, put anew into the namespace before each of its blocks.
GIVEN = {
    "README.md": update,
    "docs/gate.md": update_under_way,
    "docs/integrations.md": transformers_objects,
}


@pytest.fixture
def no_process_group():
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


def compiled(block: Block) -> CodeType:
    """With the page's own line numbers; an excerpt of a loop's body becomes one."""
    try:
        return compile("\n" * block.line + block.source, block.page, "exec")
    except SyntaxError as error:
        if "outside loop" not in error.msg:
            raise
    body = textwrap.indent(block.source, " ")
    return compile("\n" * (block.line - 1) + "for _ in [0]:\n" + body, block.page, "exec")


def without_numbers(text: str) -> list[str]:
    return re.sub(r"\d[\d.]*", "0", text).split()


@pytest.mark.parametrize("page", pages_with("python"))
def test_python_runs(page, tmp_path, monkeypatch, capsys, no_process_group):
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, Any] = {"__name__": page}
    for block, after in pairwise([*blocks_of(page), Block(page, 0, "", "")]):
        if block.language != "python":
            continue
        code = compiled(block)
        if block.key in NOT_RUN:
            continue
        if page in GIVEN:
            own_gate = "gate.attach(" in block.source
            namespace |= update() if own_gate else GIVEN[page]()
        capsys.readouterr()
        exec(code, namespace)
        shown = after.source if after.language == "text" else ""
        printed = capsys.readouterr().out
        assert without_numbers(printed) == without_numbers(shown), block.where


@runnable("diff")
def test_what_comes_of_a_diff_is_python(block):
    assert all(line[:1] in ("+", "-", " ") for line in block.source.splitlines())
    ast.parse("\n".join(line[1:] for line in block.source.splitlines() if line[0] != "-"))


# -- sh and toml ----------------------------------------------------------------------------------

PROGRAMS = ("python", "torchrun", "make", "pip", "pre-commit")
NOTE = '#!/bin/bash\nprintf "%s\\0" "${0##*/}" "$@" >> "$CALLS"; echo >> "$CALLS"\n'


def calls_of(block: Block, folder: Path) -> list[list[str]]:
    """Program and arguments of every call that the block makes."""
    programs, calls = folder / ".venv" / "bin", folder / "calls"
    programs.mkdir(parents=True)
    for name in PROGRAMS:
        (programs / name).write_text(NOTE)
        (programs / name).chmod(0o755)
    run = subprocess.run(
        ["/bin/bash", "-eu", "-c", block.source],
        cwd=folder, env={"PATH": str(programs), "CALLS": str(calls)},
        capture_output=True, text=True, timeout=20,
    )  # fmt: skip
    assert run.returncode == 0, f"{block.where}: {run.stderr}"
    return [call.split("\0") for call in calls.read_text().split("\0\n")[:-1]]


class Parsed(BaseException):
    """Ends a program that has parsed its options; not to be caught by it."""


def parse_only(parser: ArgumentParser, args: Any = None, namespace: Any = None) -> None:
    raise Parsed(_parse_args(parser, args, namespace))


_parse_args = ArgumentParser.parse_args


def dry_run(module: str, args: list[str], monkeypatch: pytest.MonkeyPatch) -> Namespace:
    """Start `python -m module ARGS` and stop it once its options are parsed; one without runs."""
    with monkeypatch.context() as patch:
        patch.setattr(ArgumentParser, "parse_args", parse_only)
        patch.setattr(sys, "argv", [module, *args])
        try:
            runpy.run_module(module, run_name="__main__", alter_sys=True)
        except Parsed as end:
            return end.args[0]
    return Namespace()


def check_trainer(options: Namespace) -> None:
    """Settings, arms and grid of the options and of the file that they name."""
    if options.command in ("train", "compare"):
        name = options.config or options.task or trainer.TrainConfig().task
        file = trainer.read_toml(str(ROOT / YOURS[name]) if name in YOURS else name)
        config = trainer.config_of(options, file)
        if options.command == "compare":
            trainer.plan_of(options, file, config)


def check(program: str, args: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    for arg in args:
        if re.fullmatch(r"[\w./-]+\.(toml|jsonl|py|txt)", arg):
            there = (ROOT / arg).is_file() or arg in YOURS or OF_A_RUN.fullmatch(arg)
            assert there, f"{arg}: no such file"
    if program == "make":
        makefile = (ROOT / "Makefile").read_text()
        for arg in args:
            kind = r"{} *\?=" if "=" in arg else "{}:"
            assert re.search("^" + kind.format(arg.partition("=")[0]), makefile, re.M), arg
    elif program == "pip":
        project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
        for extra in re.findall(r"\[(\w+)\]", " ".join(args)):
            assert extra in project["optional-dependencies"], extra
    elif program == "torchrun":
        from torch.distributed.run import get_args_parser

        given = _parse_args(get_args_parser(), args)
        module = ["-m"] * given.module
        check("python", [*module, given.training_script, *given.training_script_args], monkeypatch)
    elif program == "python" and args[0] == "-m":
        options = dry_run(args[1], args[2:], monkeypatch)
        if args[1] == "python_trainer":
            check_trainer(options)


# In a process of its own each module would be new; here it may be imported already.
@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")
@runnable("sh")
def test_shell_blocks_call_what_exists(block, tmp_path, monkeypatch):
    calls = calls_of(block, tmp_path)
    assert calls
    monkeypatch.chdir(ROOT)
    for program, *args in calls:
        check(program, args, monkeypatch)


@runnable("toml")
def test_toml_blocks_are_plans(block):
    options = trainer.parser().parse_args(["compare", "--out", "unused"])
    file = tomllib.loads(block.source)
    trainer.plan_of(options, file, trainer.config_of(options, file))
