"""Several arms and seeds, one warm start a seed, and the run directory that they fill.

- `<out>/run.json`: what was asked for; `resume` reads it
- `<out>/<arm>/seed-<n>/metrics.jsonl`: every update attempt and every evaluation
- `<out>/<arm>/seed-<n>/checkpoints/`: where it goes on, and the final weights
- `<out>/summary.json`: counters per arm and seed; device, date, versions, commit, configuration
- `<out>/*.png` and `report.html`: see `report`
"""

from __future__ import annotations

import itertools
import json
import re
import shutil
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import torch.distributed as dist
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars

from . import checkpoint
from .config import CheckpointError, ConfigError, EngineError, TaskError, TrainConfig, changed
from .distributed import Ranks, check_parallel
from .engine import make_engine
from .evaluate import Evaluator, readable, shown
from .files import (
    commit,
    device_name,
    now,
    read_metrics,
    use_counts,
    versions,
    write_json,
)
from .loop import Progress, WarmStart, new_policy, prepare, train
from .model import check_model
from .plots import PLOTS
from .results import last_quarter
from .rollout import play
from .stopping import GATED, batches_to_fill
from .tasks import make_task
from .trackers import Tracker

# What an arm changes in the shared configuration. DGG and its controls may go up to K=8, where
# fixed re-use is at its most harmful: the rule, not the cap, must do the stopping.
PRESETS: dict[str, dict[str, Any]] = {
    "single_use": {"gate": "off", "num_iterations": 1},
    "fixed_k4": {"gate": "off", "num_iterations": 4},
    "fixed_k8": {"gate": "off", "num_iterations": 8},
    "dgg": {"gate": "dgg"},
    "random": {"gate": "random", "match": "dgg"},
    "shuffled": {"gate": "shuffled", "match": "dgg"},
    **{gate: {"gate": gate} for gate in (
        "gain", "gain_kl", "log_ratio", "kl", "chi2", "global_norm", "middle_norm", "skip_step",
        "zclip",
    )},
}  # fmt: skip
Mirrors = Callable[[Path], list[Tracker]]
DEFAULT_ARMS = ("single_use", "fixed_k4", "fixed_k8", "dgg", "random", "gain")
# What the start that all arms of a seed share is made of; `warmup_*` are the others.
START = ("task", "task_options", "model", "dtype", "lora_rank", "gradient_checkpointing",
         "vocab_size", "hidden_size", "num_layers", "num_heads", "seed", "device")  # fmt: skip


@dataclass(frozen=True)
class Plan:
    """What a run directory is to hold: `run.json`.

    `match` names, for an arm that controls for how often another one uses its batches, that arm:
    the control gets the mean (gate="random") or the counts (gate="shuffled") that the other came to
    in the same seed.

    Raises:
        ConfigError: there is no arm, arms differ in what they share, or a seed is none.
    """

    arms: dict[str, TrainConfig]
    seeds: list[int]
    match: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.arms:
            raise ConfigError("arms: expected at least one, got none")
        for arm, config in self.arms.items():
            for name, value in asdict(config).items():
                if name not in START and not name.startswith("warmup_"):
                    continue
                if (shared := getattr(self.first, name)) != value:
                    raise ConfigError(
                        f"{name}: expected the same in all arms, whose start is one, got "
                        f"{value!r} in {arm} and {shared!r} in {next(iter(self.arms))}"
                    )
        for seed in self.seeds:
            replace(self.first, seed=seed)  # or it says what is wrong with it
        if len(set(self.seeds)) < len(self.seeds):
            raise ConfigError(f"seeds: expected each once, got {self.seeds!r}")

    @property
    def first(self) -> TrainConfig:
        """The arm of whose settings the start is made, in every seed."""
        return next(iter(self.arms.values()))


def plan(
    config: TrainConfig,
    names: Sequence[str],
    seeds: list[int],
    defined: dict[str, dict[str, Any]] | None = None,
    grid: dict[str, list[Any]] | None = None,
) -> Plan:
    """The arms in the order in which they can run: those that match another one after it.

    Args:
        config: what the arms share.
        names: of PRESETS, or of `defined`.
        seeds: each arm is run with each of them.
        defined: name -> what an arm changes in `config`, with "match" for the arm to be matched.
        grid: field -> values, in every combination of which every arm is run; `arm@value` is what
            it is called then.

    Raises:
        ConfigError: an arm is unknown, named twice, or matches none or, at last, itself; its name
            is none for a folder; or an override does not fit.
    """
    known = PRESETS | (defined or {})
    for name, values in (grid or {}).items():
        if not values:
            raise ConfigError(f"grid.{name}: expected at least one value, got none")
    cells = [dict(zip(grid or {}, values, strict=True))
             for values in itertools.product(*(grid or {}).values())]  # fmt: skip
    found, match = {}, {}
    for i, name in enumerate(names):
        if name not in known:
            raise ConfigError(f"arms: expected some of {', '.join(known)}, got {name!r}")
        if name in names[:i]:
            raise ConfigError(f"arms: expected each arm once, got {name!r} twice")
        changes = dict(known[name])
        other = changes.pop("match", None)
        if other is not None and other not in names:
            raise ConfigError(f"arms: expected {other} beside {name}, which matches it, got none")
        for cell in cells:
            suffix = "".join(f"@{value}" for value in cell.values())
            if not re.fullmatch(r"[^./\\\0][^/\\\0]*", name + suffix):  # a folder's, below `out`
                raise ConfigError(f"arms: expected names of folders, got {name + suffix!r}")
            found[name + suffix] = changed(config, changes | cell, "arms")
            if other is not None:
                match[name + suffix] = other + suffix

    def matched_before(name: str) -> int:
        """How many arms must have run."""
        chain = [name]
        while chain[-1] in match:
            chain.append(match[chain[-1]])
            if chain[-1] in chain[:-1]:
                raise ConfigError(f"arms: expected none that matches itself, got {chain!r}")
        return len(chain)

    return Plan({name: found[name] for name in sorted(found, key=matched_before)}, seeds, match)


def begin(asked: Plan, out: Path, overwrite: bool = False) -> None:
    """Check all settings, then write `run.json`.

    With `overwrite`, the logs and checkpoints of an earlier run in `out` are removed before.

    Raises:
        ConfigError: a setting is wrong, or `out` holds a run or a report. Nothing was touched.
    """
    for name, config in asked.arms.items():
        if config.gate == "shuffled":
            other = asked.match.get(name)
            counts = len(config.use_counts) if other is None else asked.arms[other].rollout_batches
            if counts < config.rollout_batches:
                raise ConfigError(
                    f"arms: expected an arm whose uses {name} is to match, got none"
                    if other is None
                    else f"rollout_batches: expected at most {counts} in {name}, as in {other}, "
                    f"whose uses it matches, got {config.rollout_batches}"
                )
        check_parallel(config)
    make_task(asked.first.task, asked.first.task_options)
    check_model(asked.first)
    written = ["summary.json", "report.html", *(f"{name}.png" for name in PLOTS)]
    old = [*out.glob("*/seed-*/checkpoints"), *out.glob("*/seed-*/metrics.jsonl"),
           *(path for name in written if (path := out / name).exists())]  # fmt: skip
    if old and not overwrite:
        raise ConfigError(
            f"out: expected a folder without a run, got {str(out)!r}, which holds one: `resume` "
            "goes on with it, --overwrite removes it; or give another --out"
        )
    ranks = Ranks(asked.first.device)
    if ranks.first:
        for path in old:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        write_json(out / "run.json", asdict(asked))
    if ranks.world > 1:  # or the others would find what was there before, if anything
        dist.barrier()


def go_on(out: Path, console: Console, mirrors: Mirrors = lambda _: []) -> dict[str, Any]:
    """Run, or take up again, what `run.json` asks for.

    Arms that are done are left alone, others go on at their newest checkpoint. `summary.json` is
    kept up to date after each.

    Args:
        out: the run directory.
        console: where progress is shown (nothing is, unless it is a terminal).
        mirrors: what else takes the rows of a run in this folder.

    Returns:
        The summary. On Ctrl-C and on any error it is written (with `interrupted` or `error` set)
        before the exception goes on.
    """
    asked = read_run(out)
    for config in asked.arms.values():
        check_parallel(config)
    ranks = Ranks(asked.first.device)
    console = console if ranks.first else Console(quiet=True)
    runs: dict[tuple[str, int], Progress] = {}
    before = _summary_so_far(out)
    warmups: dict[str, dict[str, Any]] = before.get("warmups", {})  # of seeds that are done
    # Where and when: as it was, until something is run.
    stamp = {key: before[key] for key in ("device", "date", "versions", "commit") if key in before}
    configs: dict[str, TrainConfig] = {}
    status: dict[str, Any] = {"interrupted": False, "error": None, "match": asked.match}

    def write_summary() -> dict[str, Any]:
        summary = summarise(configs, runs, warmups, status) | stamp
        if ranks.first:
            write_json(out / "summary.json", summary)
        return summary

    try:
        for seed in asked.seeds:
            start: WarmStart | None = None
            for name, shared in asked.arms.items():
                config = replace(shared, seed=seed)
                configs[name] = shared
                folder = out / name / f"seed-{seed}"
                if name in asked.match:
                    config = matched(config, folder.parents[1] / asked.match[name] / folder.name)
                done = checkpoint.progress_in(folder / "checkpoints", config)
                if done is not None and done["finished"]:
                    runs[name, seed] = Progress(**done)
                    continue
                label = name if len(asked.seeds) == 1 else f"{name}, seed {seed}"
                if start is None:
                    first = replace(asked.first, seed=seed)  # also where it is done already
                    with progress_bar(console, "warm-up", None):
                        start = prepare(first, make_task(first.task, first.task_options))
                    warmups[str(seed)] = asdict(start.warmup)
                if config.gate in GATED and batches_to_fill(config) > config.rollout_batches:
                    console.print(
                        f"{label}: a gate's window of {config.score.window} does not fill in "
                        f"{config.rollout_batches} rollout batches: it shuts nothing by its score "
                        "(--gate-window)"
                    )
                runs[name, seed] = progress = Progress()
                stamp.clear()
                write_summary()
                with progress_bar(console, label, config.rollout_batches) as tick:
                    train(config, start, folder, progress, tick, console.print, mirrors(folder))
                write_summary()
                if not console.is_terminal:  # no bar is shown: a line tells that it goes on
                    console.print(f"{label}: done in {sum(progress.seconds.values()):.0f} s")
    except KeyboardInterrupt:
        status["interrupted"] = True
        raise
    except Exception as error:
        known = (TaskError, EngineError, CheckpointError)
        status["error"] = str(error) if isinstance(error, known) else repr(error)
        raise
    finally:
        try:
            summary = write_summary()
        except KeyboardInterrupt:  # asked to end while it was ending, as torchrun may
            status["interrupted"] = True
            write_summary()
            raise
    return summary


def _summary_so_far(out: Path) -> dict[str, Any]:
    """Of what was done before; empty if there is none."""
    try:
        summary = json.loads((out / "summary.json").read_text())
    except (OSError, ValueError):
        return {}
    return summary if isinstance(summary, dict) else {}


def matched(config: TrainConfig, other: Path) -> TrainConfig:
    """A control's configuration, from the log of the run whose use counts it is to match."""
    counts = use_counts(read_metrics(other / "metrics.jsonl"))
    if config.gate == "shuffled":
        return replace(config, use_counts=tuple(counts))
    passes = fmean(counts) / config.mini_batches
    uses = min(max(passes, 1.0), float(config.num_iterations))
    return replace(config, mean_uses=uses)


def read_run(out: Path) -> Plan:
    """What `run.json` asks for.

    Raises:
        ConfigError: `out` is no run directory, or its settings are not this version's.
    """
    try:
        asked = json.loads((out / "run.json").read_text())
        arms = {name: TrainConfig(**settings) for name, settings in asked["arms"].items()}
        return Plan(arms, asked["seeds"], asked["match"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(
            f"out: expected a run directory with run.json, got {str(out)!r} ({error})"
        ) from error


def evaluate(out: Path, show: int, console: Console) -> None:
    """Print the held-out accuracy of each arm's newest weights, and some episodes of it.

    Raises:
        ConfigError: `out` is no run directory, or holds no checkpoint.
    """
    asked, found = read_run(out), False
    for seed in asked.seeds:
        for arm, shared in asked.arms.items():
            folder = out / arm / f"seed-{seed}" / "checkpoints"
            state, complaints = checkpoint.load(folder)
            for complaint in complaints:
                console.print(complaint)
            if state is None:
                continue
            found = True
            config = replace(shared, seed=seed)
            task = make_task(config.task, config.task_options)
            policy = new_policy(config, task)
            checkpoint.restore_weights(policy, state)
            engine = make_engine(policy, config)
            accuracy = Evaluator(task, policy, config, Ranks.alone()).accuracy(policy, engine)
            console.print(
                f"{arm}, seed {seed}: accuracy {accuracy:.4f} on {config.eval_prompts} held-out "
                f"examples, after {state['progress']['updates_applied']} updates"
            )
            engine.refresh()
            examples = task.sample(max(show, 1), "held-out", held_out=True)[:show]
            for played in play(engine, policy.tokenizer, task, examples, config, "shown"):
                for part in shown(played, policy.tokenizer):
                    text = readable(part.strip())  # a policy's: it must not steer the terminal
                    console.print(f"    {text}", markup=False, highlight=False)
                console.print(f"    (reward {played.reward:.2f})\n", highlight=False)
    if not found:
        raise ConfigError(f"out: expected a run with checkpoints, got {str(out)!r}")


def summarise(
    configs: dict[str, TrainConfig],
    runs: dict[tuple[str, int], Progress],
    warmups: dict[str, dict[str, Any]],
    status: dict[str, Any],
) -> dict[str, Any]:
    """The content of `summary.json`.

    `config` is what the seeds of an arm share; what an arm in `match` has of another one is not in
    it, but in its runs' `mean_uses`: applied updates a batch, of which `mini_batches` are one of
    the passes that the setting of that name counts.

    Per run: `final_accuracy` is the last evaluation's, `late_accuracy` that of the last quarter.
    `rollouts_to_single_use_final` is the first evaluated number of rollout batches at which an arm
    was as accurate as single use of the same seed at its end (null: never, or single use is not
    among the arms or did not finish).
    """
    rows = []
    for (name, seed), progress in runs.items():
        single = runs.get(("single_use", seed))
        goal = single.accuracy[-1][1] if single is not None and single.finished else None
        accuracies = [accuracy for _, accuracy in progress.accuracy]
        reached = [n for n, accuracy in progress.accuracy if goal is not None and accuracy >= goal]
        rows.append({
            "arm": name,
            "seed": seed,
            "gate": configs[name].gate,
            "num_iterations": configs[name].num_iterations,
            "finished": progress.finished,
            "rollouts": progress.rollouts,
            "sequences": progress.sequences,
            "updates_attempted": progress.updates_attempted,
            "updates_applied": progress.updates_applied,
            "mean_uses": progress.mean_uses,
            "final_accuracy": accuracies[-1] if accuracies else None,
            "late_accuracy": last_quarter(accuracies) if accuracies else None,
            "best_accuracy": max(accuracies, default=None),
            "rollouts_to_single_use_final": reached[0] if reached else None,
            "wall_s": round(sum(progress.seconds.values()), 3),
            "seconds": {part: round(s, 3) for part, s in progress.seconds.items()},
        })  # fmt: skip
    device = next((config.device for config in configs.values()), "cpu")  # all arms have the same
    return {
        **status,
        "device": device_name(device),
        "date": now(),
        "versions": versions(),
        "commit": commit(),
        "warmups": warmups,
        "runs": rows,
        "config": {name: asdict(config) for name, config in configs.items()},
    }


@contextmanager
def progress_bar(console: Console, name: str, total: int | None) -> Generator[Any]:
    """A transient bar on a terminal, nothing elsewhere; yields the callback that moves it."""
    columns = (
        TextColumn("{task.description:<12}"), BarColumn(), MofNCompleteColumn(),
        TimeElapsedColumn(), TextColumn("{task.fields[note]}"),
    )  # fmt: skip
    hidden = not console.is_terminal
    with Bars(*columns, console=console, transient=True, disable=hidden) as bars:
        bar = bars.add_task(name, total=total, note="")

        def tick(progress: Progress) -> None:
            note = f"accuracy {progress.accuracy[-1][1]:.3f}  uses {progress.mean_uses:.2f}"
            bars.update(bar, completed=progress.rollouts, note=note)

        yield tick
