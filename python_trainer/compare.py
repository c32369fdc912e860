"""Several arms from one warm start, and the run directory that they fill.

- `<out>/<arm>/metrics.jsonl`: every update attempt and every evaluation
- `<out>/summary.json`: counters per arm; seed, versions, commit, configuration
- `<out>/*.png` and `report.html`: see `report`
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from .config import ConfigError, TaskError, TrainConfig
from .files import MetricsLog, commit, versions, write_json
from .loop import ArmResult, WarmStart, prepare, train
from .model import CharTokenizer, check_device
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


def run(
    arms: dict[str, TrainConfig], out: Path, console: Console, match_random: bool = True
) -> dict[str, Any]:
    """Warm up once, train every arm, and keep `summary.json` up to date after each.

    Args:
        arms: name -> configuration; they share the warm start of the first one.
        out: the run directory. Results of an earlier run in it are removed first.
        console: where progress is shown (nothing is, unless it is a terminal).
        match_random: set the random arm's `mean_uses` to what the dgg arm came to, if both run.

    Returns:
        The summary. On Ctrl-C and on any error it is written (with `interrupted` or `error` set)
        before the exception goes on.
    """
    first = next(iter(arms.values()))
    # Whatever can be wrong with the settings comes to light here, before any file exists.
    task = make_task(first.task, first.task_options)
    CharTokenizer(first.vocab_size)
    check_device(first.device)
    results: dict[str, ArmResult] = {}
    clear(out)
    start: WarmStart | None = None
    status: dict[str, Any] = {"interrupted": False, "error": None}
    try:
        with progress_bar(console, "warm-up", None):
            start = prepare(first, task)
        for name, config in arms.items():
            if config.gate == "random" and match_random and "dgg" in results:
                uses = min(max(results["dgg"].mean_uses, 1.0), float(config.num_iterations))
                arms[name] = config = replace(config, mean_uses=uses)
            results[name] = ArmResult()
            log = MetricsLog(out / name / "metrics.jsonl")
            with progress_bar(console, name, config.rollout_batches) as tick:
                train(config, start, log, results[name], tick)
            log.close()
            write_json(out / "summary.json", summarise(arms, results, start, status))
            if not console.is_terminal:  # no bar is shown: a line per arm tells that it goes on
                console.print(f"{name}: done in {sum(results[name].seconds.values()):.0f} s")
    except KeyboardInterrupt:
        status["interrupted"] = True
        raise
    except Exception as error:
        status["error"] = str(error) if isinstance(error, TaskError) else repr(error)
        raise
    finally:
        summary = summarise(arms, results, start, status)
        write_json(out / "summary.json", summary)
    return summary


def clear(out: Path) -> None:
    """Remove what an earlier run wrote, so that no old arm is taken for a new one."""
    patterns = ("summary.json", "report.html", "*.png", "*/metrics.jsonl")
    for path in [p for pattern in patterns for p in out.glob(pattern)]:
        path.unlink()


def summarise(
    arms: dict[str, TrainConfig],
    results: dict[str, ArmResult],
    start: WarmStart | None,
    status: dict[str, Any],
) -> dict[str, Any]:
    """The content of `summary.json`.

    `final_accuracy` is the last evaluation's, `late_accuracy` the mean of the last quarter of the
    evaluations (an arm that swings can end high or low by luck). `rollouts_to_single_use_final` is
    the first evaluated number of rollout batches at which an arm was as accurate as single use at
    its end (null: never, or single use is not among the arms or did not finish).
    """
    single = results.get("single_use")
    goal = single.accuracy[-1][1] if single is not None and single.finished else None
    first = next(iter(arms.values()))
    rows = {}
    for name, result in results.items():
        accuracies = [accuracy for _, accuracy in result.accuracy]
        late = accuracies[-max(1, len(accuracies) // 4) :]
        reached = [n for n, accuracy in result.accuracy if goal is not None and accuracy >= goal]
        rows[name] = {
            "gate": arms[name].gate,
            "num_iterations": arms[name].num_iterations,
            "finished": result.finished,
            "rollouts": result.rollouts,
            "sequences": result.sequences,
            "updates_attempted": result.updates_attempted,
            "updates_applied": result.updates_applied,
            "mean_uses": result.mean_uses,
            "final_accuracy": accuracies[-1] if accuracies else None,
            "late_accuracy": sum(late) / len(late) if late else None,
            "best_accuracy": max(accuracies, default=None),
            "rollouts_to_single_use_final": reached[0] if reached else None,
            "wall_s": round(sum(result.seconds.values()), 3),
            "seconds": {part: round(s, 3) for part, s in result.seconds.items()},
        }
    return {
        **status,
        "seed": first.seed,
        "versions": versions(),
        "commit": commit(),
        "warmup": None if start is None else asdict(start.warmup),
        "arms": rows,
        "config": {name: asdict(config) for name, config in arms.items()},
    }


@contextmanager
def progress_bar(console: Console, name: str, total: int | None) -> Iterator[Any]:
    """A transient bar on a terminal, nothing elsewhere; yields the callback that moves it."""
    columns = (
        TextColumn("{task.description:<12}"), BarColumn(), MofNCompleteColumn(),
        TimeElapsedColumn(), TextColumn("{task.fields[note]}"),
    )  # fmt: skip
    hidden = not console.is_terminal
    with Progress(*columns, console=console, transient=True, disable=hidden) as progress:
        bar = progress.add_task(name, total=total, note="")

        def tick(result: ArmResult) -> None:
            note = f"accuracy {result.accuracy[-1][1]:.3f}  uses {result.mean_uses:.2f}"
            progress.update(bar, completed=result.rollouts, note=note)

        yield tick
