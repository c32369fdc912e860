"""What a run came to, in numbers and in words, from its summary.json.

Where an arm has several seeds, those that finished count, and numbers are their means.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from statistics import fmean, stdev
from typing import Any

from .files import Row
from .plots import STYLES, style
from .stopping import GATED

Summary = dict[str, Any]  # as `compare.summarise` makes it

# Heading and meaning: headings are short so that the table fits a terminal of 80 columns.
COLUMNS = {
    "arm": "",
    "tried": "updates attempted",
    "applied": "updates applied",
    "uses": "updates applied per rollout batch",
    "final": "accuracy at the end, %",
    "late": "mean accuracy over the last quarter of the evaluations, %",
    "best": "best accuracy, %",
    "to goal": "rollout batches until as accurate as single use at its end",
    "wall s": "seconds, wall clock",
}
MEASURES = {"at the end": "final_accuracy", "over the last quarter": "late_accuracy"}
# Student's t at which the two-sided p is 0.05, from one degree of freedom; the last for all more.
T_95 = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23)


def in_order(summary: Summary) -> list[str]:
    """Arms in the order of STYLES, whatever order they ran in."""
    names = list(STYLES)
    arms = dict.fromkeys(run["arm"] for run in summary["runs"])
    known = {arm: arm.partition("@")[0] for arm in arms}
    return sorted(arms, key=lambda a: names.index(known[a]) if known[a] in names else len(names))


def seeds_of(summary: Summary) -> list[int]:
    return sorted({run["seed"] for run in summary["runs"]})


def finished(summary: Summary, arm: str) -> dict[int, Row]:
    """Runs of an arm that finished, by seed."""
    return {r["seed"]: r for r in summary["runs"] if r["arm"] == arm and r["finished"]}


def last_quarter(accuracies: Sequence[float]) -> float:
    """Their mean over the last quarter: an arm that swings can end high or low by luck."""
    return fmean(accuracies[-max(1, len(accuracies) // 4) :])


def counted(summary: Summary, arm: str) -> list[Row]:
    """Runs of an arm that count: those that finished, or what there is if none did."""
    done = list(finished(summary, arm).values())
    return done or [run for run in summary["runs"] if run["arm"] == arm]


# -- table ----------------------------------------------------------------------------------------


def table(summary: Summary) -> list[list[str]]:
    """One line of text per arm, under COLUMNS."""
    arms = {arm: counted(summary, arm) for arm in in_order(summary)}
    most = max(map(len, arms.values()), default=0)
    goals = finished(summary, "single_use")
    lines = []
    for arm, runs in arms.items():
        name = style(arm)[0]
        if not runs[0]["finished"]:
            name += f" (cut at {runs[0]['rollouts']})"
        elif len(runs) < most:
            name += f" ({len(runs)} of {most} seeds)"
        lines.append(line(name, runs, [run for run in runs if run["seed"] in goals]))
    return lines


def line(name: str, runs: Sequence[Row], with_goal: Sequence[Row]) -> list[str]:
    """`runs` of one arm under COLUMNS; there is a goal in the seeds that single use finished."""
    seconds = _mean(runs, "wall_s")
    return [
        name,
        f"{_mean(runs, 'updates_attempted'):.0f}",
        f"{_mean(runs, 'updates_applied'):.0f}",
        _spread(runs, "mean_uses", 2),
        _spread(runs, "final_accuracy", 1, 100),
        _spread(runs, "late_accuracy", 1, 100),
        _spread(runs, "best_accuracy", 1, 100),
        _to_goal(with_goal) if with_goal else "-",
        f"{seconds:.{0 if seconds > 999 else 1}f}",
    ]


def _mean(runs: Iterable[Row], key: str) -> float:
    return fmean(run[key] for run in runs)


def _spread(runs: Sequence[Row], key: str, digits: int, scale: float = 1.0) -> str:
    """The mean, and the sample standard deviation of several."""
    values = [scale * run[key] for run in runs if run[key] is not None]
    if not values:
        return "-"
    text = f"{fmean(values):.{digits}f}"
    return text if len(values) == 1 else f"{text}±{stdev(values):.{digits}f}"


def _to_goal(runs: Sequence[Row], fewer: bool = False) -> str:
    """Batches to the goal; of one seed, or with `fewer`, how many times fewer than all that is."""
    key = "rollouts_to_single_use_final"
    reached = [run for run in runs if run[key] is not None]
    if not reached:
        return "never"
    if len(reached) < len(runs):
        return f"in {len(reached)} of {len(runs)}"
    if len(runs) > 1 and not fewer:
        return _spread(runs, key, 0)
    needed, total = _mean(runs, key), _mean(runs, "rollouts")
    return f"{needed:.0f} ({total / needed:.1f}x)" if 0 < needed < total else f"{needed:.0f}"


def meanings(summary: Summary) -> str:
    """What the columns are, in one sentence without its full stop."""
    text = "; ".join(f"{name}: {meaning}" for name, meaning in COLUMNS.items() if meaning)
    rollouts = {run["rollouts"] for run in summary["runs"] if run["finished"]}
    if len(rollouts) == 1:
        text += f"; {rollouts.pop()} rollout batches each"
    seeds = seeds_of(summary)
    if len(seeds) > 1:
        return f"{text}; mean ± standard deviation over seeds {listed(seeds)}"
    return f"{text}; seed {listed(seeds)}" if seeds else text


def listed(items: Iterable[Any]) -> str:
    return ", ".join(map(str, items))


def what_accuracy_is(summary: Summary) -> str:
    """In words that hold for every task: a summary does not say which of the two it was."""
    config = next(iter(summary["config"].values()), None)
    if config is None:
        return ""
    n = config["eval_prompts"]
    return (
        f"Accuracy is measured on {n} held-out prompts of the task {config['task']}. Where a "
        "prompt has one right answer and nothing else scores, it is the exact expected accuracy: "
        "the policy's mean probability of the whole right answer. Elsewhere it is the mean reward, "
        "from 0 to 1, of one sampled episode per prompt, whose sampling alone may move a single "
        f"evaluation by up to {50 / n**0.5:.1f} points (one standard error)."
    )


# -- verdict --------------------------------------------------------------------------------------


def verdict(summary: Summary) -> list[str]:
    """What the numbers say, whoever wins; a list of sentences."""
    done = {arm: finished(summary, arm) for arm in in_order(summary)}
    done = {arm: runs for arm, runs in done.items() if runs}
    if len(done) < 2:
        return ["There is no second finished arm to compare with."]
    seeds = sorted(set.intersection(*(set(runs) for runs in done.values())))
    if not seeds:
        return ["There is no seed in which all of these arms finished."]
    arms = {arm: [runs[seed] for seed in seeds] for arm, runs in done.items()}
    return [
        *_ranking(arms),
        *_differences(summary, arms),
        *_warm_ups(summary),
        *_caution(seeds),
    ]


def _ranking(arms: dict[str, list[Row]]) -> list[str]:
    n = len(next(iter(arms.values())))
    final = {arm: 100 * _mean(runs, "final_accuracy") for arm, runs in arms.items()}
    late = max(arms, key=lambda arm: _mean(arms[arm], "late_accuracy"))
    sentences = [
        f"Final accuracy{f', mean of {n} seeds' if n > 1 else ''}, best first: "
        + listed(f"{style(a)[0]} {final[a]:.1f}%" for a in sorted(final, key=lambda a: -final[a]))
        + f". Best over the last quarter: {style(late)[0]}."
    ]
    if "single_use" in arms:
        sentences.append(
            "Rollout batches to single use's final accuracy (and how many times fewer): "
            + "; ".join(f"{style(arm)[0]}: {_to_goal(runs, True)}" for arm, runs in arms.items())
            + "."
        )
    return sentences


def _differences(summary: Summary, arms: dict[str, list[Row]]) -> list[str]:
    sentences, pairs = [], paired(summary)
    for (arm, other), measures in pairs.items():
        name = style(other)[0]
        if other in summary["match"]:
            uses = [f"{_mean(arms[a], 'mean_uses'):.2f}" for a in (arm, other)]
            name += f" ({uses[0]} against {uses[1]} uses per batch)"
        found = listed(f"{points(by_seed)} {when}" for when, by_seed in measures.items())
        sentences.append(f"{style(arm)[0]} minus {name}: {found}.")
    if any(len(by_seed) > 1 for measures in pairs.values() for by_seed in measures.values()):
        sentences.append(
            "These differences are paired by seed, in points of accuracy, ± their standard error; "
            "beyond chance: a paired t-test gives p < 0.05."
        )
    return sentences


def _warm_ups(summary: Summary) -> list[str]:
    early = listed(
        f"{100 * warmup['accuracy']:.1f}% (seed {seed})"
        for seed, warmup in summary["warmups"].items()
        if not warmup["reached"]
    )
    return [f"The warm-up ended early, at {early}."] if early else []


def _caution(seeds: list[int]) -> list[str]:
    if len(seeds) > 1:
        return []
    return [f"This is one seed, {seeds[0]}: run several before trusting a small difference."]


def gated(summary: Summary) -> list[str]:
    """Arms whose rule is on trial: those that score a signal, and those that have a control."""
    arms, match = summary["config"], summary["match"]
    return [a for a in in_order(summary) if arms[a]["gate"] in GATED or a in match.values()]


def paired(summary: Summary) -> dict[tuple[str, str], dict[str, dict[int, float]]]:
    """(gated arm, other) -> measure -> seed -> the first minus the other, in points of accuracy.

    Of what it must beat, single use and its own controls, in the seeds in which both finished. In
    one seed both start from the same weights and meet the same prompts: the error of such a
    difference is smaller than that of a difference of means.
    """
    match, found = summary["match"], {}
    for arm in gated(summary):
        mine = finished(summary, arm)
        for other in ("single_use", *(a for a in in_order(summary) if match.get(a) == arm)):
            theirs = finished(summary, other)
            if seeds := sorted(set(mine) & set(theirs)):
                found[arm, other] = {
                    when: {seed: 100 * (mine[seed][key] - theirs[seed][key]) for seed in seeds}
                    for when, key in MEASURES.items()
                }
    return found


def points(by_seed: dict[int, float]) -> str:
    """+1.2 points; of several seeds with their standard error, and whether that is anything."""
    mean, n = fmean(by_seed.values()), len(by_seed)
    if n == 1:
        return f"{mean:+.1f} points"
    error = stdev(by_seed.values()) / n**0.5
    beyond = abs(mean) > T_95[min(n - 1, len(T_95)) - 1] * error
    return f"{mean:+.1f} ± {error:.1f} ({'beyond' if beyond else 'within'} chance)"
