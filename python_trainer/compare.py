"""Several arms and seeds, one warm start a seed, and the run directory that they fill.

- `<out>/run.json`: what was asked for; `resume` reads it
- `<out>/<arm>/seed-<n>/metrics.jsonl`: every update attempt and every evaluation
- `<out>/<arm>/seed-<n>/checkpoints/`: where it goes on, and the final weights
- `<out>/summary.json`: counters per arm and seed; versions, commit, configuration
- `<out>/*.png` and `report.html`: see `report`
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars

from . import checkpoint
from .config import CheckpointError, ConfigError, EngineError, TaskError, TrainConfig
from .distributed import Ranks, check_parallel
from .engine import make_engine
from .evaluate import Evaluator, shown
from .files import Row, commit, versions, write_json
from .loop import Progress, WarmStart, load_weights, prepare, train
from .model import check_model
from .rollout import play
from .tasks import make_task

# What an arm changes in the shared configuration. DGG and its controls may go up to K=8, where
# fixed re-use is at its most harmful: the rule, not the cap, must do the stopping.
PRESETS: dict[str, dict[str, Any]] = {
    "single_use": {"gate": "off", "num_iterations": 1},
    "fixed_k4": {"gate": "off", "num_iterations": 4},
    "fixed_k8": {"gate": "off", "num_iterations": 8},
    "dgg": {"gate": "dgg"},
    "random": {"gate": "random"},  # at the mean use count that the dgg arm came to
    "kl": {"gate": "kl"},
    "global_norm": {"gate": "global_norm"},
}
Mirrors = Callable[[Path], "list[Callable[[Row], None]]"]
DEFAULT_ARMS = ("single_use", "fixed_k4", "fixed_k8", "dgg", "random")


def arm_configs(config: TrainConfig, names: list[str]) -> dict[str, TrainConfig]:
    """The configuration of each arm, in the order in which they can run.

    Raises:
        ConfigError: an arm is unknown or named twice, or an override does not fit.
    """
    for i, name in enumerate(names):
        if name not in PRESETS:
            raise ConfigError(f"arms: expected some of {', '.join(PRESETS)}, got {name!r}")
        if name in names[:i]:
            raise ConfigError(f"arms: expected each arm once, got {name!r} twice")
    ordered = sorted(names, key=lambda name: name == "random")  # it needs dgg's mean use count
    return {name: replace(config, **PRESETS[name]) for name in ordered}


def begin(
    arms: dict[str, TrainConfig], out: Path, seeds: list[int], match_random: bool = True
) -> None:
    """Check all settings, then write `run.json`; what an earlier run left in `out` is removed.

    Args:
        arms: name -> configuration; of one seed they share the warm start of the first.
        out: the run directory.
        seeds: each arm is run with each of them.
        match_random: set the random arm's `mean_uses` to what the dgg arm came to, if both run.

    Raises:
        ConfigError: a setting is wrong. Nothing was touched.
    """
    first = next(iter(arms.values()))  # in what is looked at here all arms are alike
    make_task(first.task, first.task_options)
    check_model(first)
    check_parallel(first)
    if not Ranks().first:
        return
    for path in [*out.glob("*/seed-*/checkpoints"), *out.glob("*/seed-*/metrics.jsonl"),
                 *(out / name for name in ("summary.json", "report.html")),
                 *out.glob("*.png")]:  # fmt: skip
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    asked = {name: asdict(config) for name, config in arms.items()}
    write_json(out / "run.json", {"arms": asked, "seeds": seeds, "match_random": match_random})


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
    ranks = Ranks()
    console = console if ranks.first else Console(quiet=True)
    runs: dict[tuple[str, int], Progress] = {}
    warmups: dict[str, dict[str, Any]] = _warmups_so_far(out)
    configs: dict[str, TrainConfig] = {}
    status: dict[str, Any] = {"interrupted": False, "error": None}

    def write_summary() -> dict[str, Any]:
        summary = summarise(configs, runs, warmups, status)
        if ranks.first:
            write_json(out / "summary.json", summary)
        return summary

    try:
        for seed in asked["seeds"]:
            start: WarmStart | None = None
            for name, settings in asked["arms"].items():
                config = replace(TrainConfig(**settings), seed=seed)
                dgg = runs.get(("dgg", seed))
                if config.gate == "random" and asked["match_random"] and dgg is not None:
                    uses = min(max(dgg.mean_uses, 1.0), float(config.num_iterations))
                    config = replace(config, mean_uses=uses)
                configs[name] = config
                folder = out / name / f"seed-{seed}"
                done = checkpoint.progress_in(folder / "checkpoints")
                if done is not None and done["finished"]:
                    runs[name, seed] = Progress(**done)
                    continue
                label = name if len(asked["seeds"]) == 1 else f"{name}, seed {seed}"
                if start is None:
                    with progress_bar(console, "warm-up", None):
                        start = prepare(config, make_task(config.task, config.task_options))
                    warmups[str(seed)] = asdict(start.warmup)
                runs[name, seed] = progress = Progress()
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
        summary = write_summary()
    return summary


def _warmups_so_far(out: Path) -> dict[str, dict[str, Any]]:
    """Of seeds that are done, whose warm start is not made again."""
    try:
        return json.loads((out / "summary.json").read_text())["warmups"]
    except (OSError, ValueError, KeyError):
        return {}


def read_run(out: Path) -> dict[str, Any]:
    """What `run.json` asks for.

    Raises:
        ConfigError: `out` is no run directory, or its settings are not this version's.
    """
    try:
        asked = json.loads((out / "run.json").read_text())
        for settings in asked["arms"].values():
            TrainConfig(**settings)
        return {name: asked[name] for name in ("arms", "seeds", "match_random")}
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
    for seed in asked["seeds"]:
        for arm, settings in asked["arms"].items():
            folder = out / arm / f"seed-{seed}" / "checkpoints"
            state, complaints = checkpoint.load(folder)
            for complaint in complaints:
                console.print(complaint)
            if state is None:
                continue
            found = True
            config = replace(TrainConfig(**settings), seed=seed)
            task = make_task(config.task, config.task_options)
            policy = load_weights(config, task, state)
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
                    console.print(f"    {part.strip()}", markup=False, highlight=False)
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

    Per run: `final_accuracy` is the last evaluation's, `late_accuracy` the mean of the last quarter
    of the evaluations (an arm that swings can end high or low by luck).
    `rollouts_to_single_use_final` is the first evaluated number of rollout batches at which an arm
    was as accurate as single use of the same seed at its end (null: never, or single use is not
    among the arms or did not finish).
    """
    rows = []
    for (name, seed), progress in runs.items():
        single = runs.get(("single_use", seed))
        goal = single.accuracy[-1][1] if single is not None and single.finished else None
        accuracies = [accuracy for _, accuracy in progress.accuracy]
        late = accuracies[-max(1, len(accuracies) // 4) :]
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
            "late_accuracy": sum(late) / len(late) if late else None,
            "best_accuracy": max(accuracies, default=None),
            "rollouts_to_single_use_final": reached[0] if reached else None,
            "wall_s": round(sum(progress.seconds.values()), 3),
            "seconds": {part: round(s, 3) for part, s in progress.seconds.items()},
        })  # fmt: skip
    return {
        **status,
        "versions": versions(),
        "commit": commit(),
        "warmups": warmups,
        "runs": rows,
        "config": {name: asdict(config) for name, config in configs.items()},
    }


@contextmanager
def progress_bar(console: Console, name: str, total: int | None) -> Iterator[Any]:
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
