"""Command line: `python -m python_trainer train|compare`."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

from .config import ConfigError, TaskError, TrainConfig

DESCRIPTION = "A thin GRPO trainer with gated re-use of rollout batches."
EXAMPLES = """\
examples:
  # the demo: five arms from one warm start, a table, plots and a report (minutes on a CPU)
  python -m python_trainer compare --out runs/demo

  # the same with every control, another seed
  python -m python_trainer compare --out runs/all --seed 1 \\
      --arms single_use fixed_k4 fixed_k8 dgg random kl global_norm

  # one gated run, on additions and subtractions
  python -m python_trainer train --out runs/sums --gate dgg --gate-threshold 0.5 \\
      --task-option dataset=chain_sum --task-option max_digits=2

  # one run without a gate that uses every rollout batch four times
  python -m python_trainer train --out runs/k4 --gate off --num-iterations 4

  # draw the report of a finished or interrupted run again
  python -m python_trainer report --out runs/demo

files: <out>/<arm>/metrics.jsonl (a row per update attempt and per evaluation), <out>/summary.json,
<out>/*.png and <out>/report.html. Exit codes: 0 done, 1 the task failed, 2 a setting is wrong
(nothing is written), 130 interrupted (the directory stays readable).
"""
TYPES = {"int": int, "float": float, "str": str, "float | None": float, "str | None": str}


def parser() -> argparse.ArgumentParser:
    """Every field of TrainConfig is an option of its own name."""
    settings = argparse.ArgumentParser(add_help=False)
    settings.add_argument("--out", type=Path, required=True, help="run directory")
    group = settings.add_argument_group("settings (names as in TrainConfig)")
    for f in fields(TrainConfig):
        if f.name == "task_options":
            group.add_argument(
                "--task-option", action="append", default=[], metavar="NAME=VALUE",
                help="option of the task or of its generator (repeatable); VALUE is JSON or text",
            )  # fmt: skip
            continue
        kind = TYPES[str(f.type)]
        default = "" if f.default is MISSING else f" (default {f.default})"
        group.add_argument(
            f"--{f.name.replace('_', '-')}", type=kind, default=None, metavar=kind.__name__.upper(),
            help=kind.__name__ + default,
        )  # fmt: skip

    top = argparse.ArgumentParser(
        prog="python -m python_trainer", description=DESCRIPTION, epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    commands = top.add_subparsers(dest="command", required=True, metavar="train|compare|report")
    common: dict[str, Any] = dict(
        epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands.add_parser("train", parents=[settings], help="train one arm", **common)
    compare = commands.add_parser(
        "compare", parents=[settings], help="train several arms from one warm start", **common
    )
    compare.add_argument(
        "--arms", nargs="+", default=None, metavar="ARM",
        help="single_use fixed_k4 fixed_k8 dgg random (default), kl, global_norm",
    )  # fmt: skip
    report = commands.add_parser("report", help="plots and report.html of a run", **common)
    report.add_argument("--out", type=Path, required=True, help="run directory")
    return top


def task_options(pairs: list[str]) -> dict[str, Any]:
    """["a=1", "b=x"] -> {"a": 1, "b": "x"}."""
    options: dict[str, Any] = {}
    for pair in pairs:
        name, sign, text = pair.partition("=")
        if not (name and sign):
            raise ConfigError(f"task_options: expected NAME=VALUE, got {pair!r}")
        try:
            options[name] = json.loads(text)
        except json.JSONDecodeError:
            options[name] = text
    return options


def config_of(args: argparse.Namespace) -> TrainConfig:
    """TrainConfig from the options that were given."""
    given = {
        f.name: getattr(args, f.name)
        for f in fields(TrainConfig)
        if f.name != "task_options" and getattr(args, f.name) is not None
    }
    if args.task_option:
        given["task_options"] = task_options(args.task_option)
    return TrainConfig(**given)


def arm_name(config: TrainConfig) -> str:
    """What `train` calls its only arm: as `compare` would."""
    if config.gate != "off":
        return config.gate
    return "single_use" if config.num_iterations == 1 else f"fixed_k{config.num_iterations}"


def execute(args: argparse.Namespace) -> None:
    # Imported late: --help and a wrong option should not wait for torch.
    from rich.console import Console

    from . import compare, report

    console = Console()
    if args.command == "report":
        report.write(args.out)
        console.print(f"{args.out / 'report.html'}", highlight=False, soft_wrap=True)
        return
    config = config_of(args)
    if args.command == "train":
        arms, match_random = {arm_name(config): config}, False
    else:
        names: list[str] = list(args.arms or compare.DEFAULT_ARMS)
        arms, match_random = compare.arm_configs(config, names), args.mean_uses is None
        if "random" in names and match_random and "dgg" not in names:
            raise ConfigError("arms: expected dgg beside random (or --mean-uses), got no dgg")
    summary = compare.run(arms, args.out, console, match_random)
    report.write(args.out)
    report.print_table(summary, console)
    console.print(f"{args.out / 'report.html'}", highlight=False, soft_wrap=True)


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    args = parser().parse_args(argv)
    try:
        execute(args)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except TaskError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"error: out: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"interrupted: what was done is in {args.out}", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
