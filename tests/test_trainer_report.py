"""Table, verdict, plots and page, from run directories written by hand."""

import io
import json
import math
import re
from dataclasses import asdict, replace

import pytest
from rich.console import Console
from trainer_toys import TINY

from python_trainer import plots, report, results
from python_trainer.__main__ import main
from python_trainer.compare import plan
from python_trainer.config import ConfigError
from python_trainer.files import MetricsLog, write_json
from python_trainer.results import points, table, verdict

ARMS = ("single_use", "fixed_k4", "dgg", "random")
BATCHES = 8
# Final accuracy by arm and seed: DGG is 2, 2.2, 1.8 points above single use, and now above, now
# below random stop.
FINAL = {
    "single_use": (0.40, 0.42, 0.44),
    "fixed_k4": (0.30, 0.35, 0.25),
    "dgg": (0.42, 0.442, 0.458),
    "random": (0.43, 0.42, 0.462),
    "gain": (0.45, 0.44, 0.46),
}
EPISODE = ["sort 31>", "13", "no", "31"]


def log_rows(arm, seed, batches):
    """What the loop logs, in the shape of `loop.update_row` and its neighbours."""
    final = FINAL[arm][seed]
    uses = {"single_use": 1, "fixed_k4": 4, "dgg": 3, "random": 2, "gain": 3}[arm]
    step = 0
    for batch in range(1, batches + 1):
        if batch % 2 == 1:
            yield {"type": "eval", "rollouts": batch - 1, "accuracy": final * (batch - 1) / BATCHES}
            yield {"type": "episode", "rollouts": batch, "reward": 0.5, "text": EPISODE}
        for use in range(1, uses + 1):
            step += 1
            shut = arm == "dgg" and use == 3
            yield {
                "type": "update", "step": step, "rollouts": batch, "reward": 0.1 * seed,
                "gate/shut": shut, "gate/energy": 1.0 + use, "gate/z": 30.0 if shut else math.nan,
                "dwd/lm_head": 0.01, "dwd/middle": 0.02,
                "dwd_total/lm_head": 0.1 * batch, "dwd_total/middle": 0.2 * batch,
            }  # fmt: skip
    if batches == BATCHES:
        yield {"type": "eval", "rollouts": batches, "accuracy": final}


def run_row(arm, seed, finished=True):
    final = FINAL[arm][seed]
    single = FINAL["single_use"][seed]
    return {
        "arm": arm, "seed": seed, "gate": arm, "num_iterations": 4, "finished": finished,
        "rollouts": BATCHES if finished else 3, "sequences": 128, "updates_attempted": 24,
        "updates_applied": 16, "mean_uses": 2.0 + 0.1 * seed,
        "final_accuracy": final, "late_accuracy": final - 0.01, "best_accuracy": final + 0.01,
        "rollouts_to_single_use_final": 4 + 2 * seed if finished and final >= single else None,
        "wall_s": 12.3, "seconds": {"rollout": 7.0, "update": 5.0, "evaluate": 0.3, "save": 0.0},
    }  # fmt: skip


@pytest.fixture
def make(tmp_path):
    def make(seeds, arms=ARMS, cut=(), **status):
        """A run directory; `cut` names the (arm, seed) that did not get to its end."""
        asked = plan(replace(TINY, num_generations=4), arms, list(seeds))
        runs = [run_row(arm, seed, (arm, seed) not in cut) for seed in seeds for arm in arms]
        for run in runs:
            arm, seed = run["arm"], run["seed"]
            log = MetricsLog(tmp_path / arm / f"seed-{seed}" / "metrics.jsonl")
            for row in log_rows(arm, seed, run["rollouts"]):
                log.write(row)
            log.close()
        summary = {
            "interrupted": False, "error": None, "match": asked.match,
            "versions": {"torch": "2"}, "commit": None,
            "warmups": {str(s): {"steps": 5, "accuracy": 0.2, "reached": True} for s in seeds},
            "runs": runs, "config": {arm: asdict(config) for arm, config in asked.arms.items()},
            **status,
        }  # fmt: skip
        write_json(tmp_path / "summary.json", summary)
        write_json(tmp_path / "run.json", asdict(asked))
        return summary

    make.out = tmp_path
    return make


@pytest.fixture
def no_pictures(monkeypatch):
    """For tests of the page alone: drawing takes most of the time."""
    monkeypatch.setattr(report, "draw", lambda logs, summary: {})


def written(out):
    """The page as a reader gets it, without the pixels."""
    report.write(out)
    page = (out / "report.html").read_text()
    images = page.count("data:image/png;base64,")
    return re.sub(r"base64,[A-Za-z0-9+/=]+", "", page), images


def terminal(summary):
    console = Console(width=80, file=io.StringIO())
    report.print_table(summary, console)
    return console.file.getvalue()


def one_line(text):
    return " ".join(text.split())


def test_one_seed_says_that_it_is_one(make):
    summary = make([0])
    lines = {cells[0]: cells for cells in table(summary)}
    assert list(lines) == ["Single use", "Fixed K=4", "DGG", "Random stop"]
    assert lines["DGG"] == ["DGG", "24", "16", "2.00", "42.0", "41.0", "43.0", "4 (2.0x)", "12.3"]
    assert lines["Fixed K=4"][7] == "never"
    said = " ".join(verdict(summary))
    assert "best first: Random stop 43.0%, DGG 42.0%, Single use 40.0%, Fixed K=4 30.0%" in said
    assert "DGG minus Single use: +2.0 points at the end" in said
    assert "DGG minus Random stop (2.00 against 2.00 uses per batch): -1.0 points" in said
    assert said.endswith("This is one seed, 0: run several before trusting a small difference.")
    assert "±" not in said and "chance" not in said
    page, images = written(make.out)
    assert images == len(list(make.out.glob("*.png"))) == 4
    assert "did not finish" not in page and "Every run" not in page
    assert "one seed" in one_line(terminal(summary))


def test_several_seeds_give_means_spreads_and_paired_differences(make):
    summary = make([0, 1, 2])
    lines = {cells[0]: cells for cells in table(summary)}
    # mean and sample standard deviation of 42.0, 44.2, 45.8; of 2.0, 2.1, 2.2; of 4, 6, 8
    assert lines["DGG"][3:5] == ["2.10±0.10", "44.0±1.9"] and lines["DGG"][7] == "6±2"
    assert lines["Random stop"][7] == "6±2" and lines["Fixed K=4"][7] == "never"
    said = " ".join(verdict(summary))
    # 2.0, 2.2, 1.8: mean 2, standard error 0.2 / sqrt(3). -1.0, 2.2, -0.4: 0.27 ± 0.98.
    assert "DGG minus Single use: +2.0 ± 0.1 (beyond chance) at the end" in said
    assert "+0.3 ± 1.0 (within chance) at the end" in said
    assert "paired by seed" in said and "one seed" not in said
    assert "DGG: 6 (1.3x)" in said  # 8 batches over a mean of 6
    page, images = written(make.out)
    assert images == 4 and "seeds 0, 1, 2" in page
    cells = ["+2.0", "+2.2", "+1.8", "+2.0 ± 0.1 (beyond chance)"]
    cells = ["DGG minus Single use, at the end", *cells]
    assert "".join(f"<td>{cell}</td>" for cell in cells) in page
    assert page.count("<td>DGG</td>") == 1 + 3  # the mean, and each seed


def test_every_gated_arm_is_held_against_its_own_control(make, no_pictures):
    summary = make([0], ("single_use", "dgg", "gain", "random"))
    summary["match"] = {"random": "gain"}
    write_json(make.out / "summary.json", summary)
    said = [sentence for sentence in verdict(summary) if "minus" in sentence]
    assert [sentence[: sentence.index(" points")] for sentence in said] == [
        "DGG minus Single use: +2.0",
        "Gain gate minus Single use: +5.0",
        "Gain gate minus Random stop (2.00 against 2.00 uses per batch): +2.0",
    ]
    page, _ = written(make.out)
    assert re.findall("Sampled episodes of (.*?),", page) == ["DGG", "Gain gate"]


@pytest.mark.parametrize("seeds", [[0], [0, 1, 2]])
def test_table_fits_a_terminal(make, seeds):
    arms = ("single_use", "dgg", "random", "fixed_k4")
    summary = make(seeds, arms)
    for run in summary["runs"]:  # the longest of what is usual
        run.update(updates_attempted=12800, updates_applied=12800, wall_s=12345.6)
        run.update(rollouts=1600, rollouts_to_single_use_final=1000 + 100 * run["seed"])
    text = terminal(summary)
    assert all(len(line) <= 80 for line in text.splitlines())
    assert "…" not in text
    for cells in table(summary):  # every cell is there, on the arm's own line
        line = next(line for line in text.splitlines() if line.startswith(cells[0] + " "))
        assert all(cell in line for cell in cells)


def test_standard_error_and_t_of_two_seeds():
    # With one degree of freedom p = 0.05 is at t = 12.71: the mean over 0.08, and over 0.07.
    assert points({0: 1.08, 1: 0.92}) == "+1.0 ± 0.1 (within chance)"
    assert points({0: 1.07, 1: 0.93}) == "+1.0 ± 0.1 (beyond chance)"
    assert points({0: -1.0}) == "-1.0 points"
    many = {seed: 1.0 + (seed % 2) for seed in range(40)}
    assert points(many).endswith("(beyond chance)")


def test_interrupted_in_the_second_seed(make, no_pictures):
    summary = make([0, 1], cut=[("dgg", 1), ("random", 1)], interrupted=True)
    lines = {cells[0]: cells for cells in table(summary)}
    assert lines["DGG (1 of 2 seeds)"][4] == "42.0"  # the cut one does not count
    assert "±" in lines["Single use"][4]
    said = " ".join(verdict(summary))
    assert "one seed" in said and "Single use 40.0%" in said  # the seed that all arms finished
    page, _ = written(make.out)
    assert "did not finish: interrupted. Not finished: DGG (seed 1), Random stop (seed 1)" in page


def test_a_cut_arm_is_shown_and_not_ranked(make, no_pictures):
    summary = make([0], cut=[("random", 0)], error="task digits: no luck <b>")
    lines = [cells[0] for cells in table(summary)]
    assert lines[-1] == "Random stop (cut at 3)"
    assert "Random stop" not in " ".join(verdict(summary))
    page, _ = written(make.out)
    assert "did not finish: task digits: no luck &lt;b&gt;." in page


def test_killed_before_the_summary_knew(make, no_pictures):
    summary = make([0])
    summary["runs"] = summary["runs"][:2]  # two arms were still to come
    write_json(make.out / "summary.json", summary)
    page, _ = written(make.out)
    assert "it was cut off. Not finished: DGG (seed 0), Random stop (seed 0)." in page


def test_arms_without_rows_and_missing_files(make):
    summary = make([0])
    (make.out / "dgg" / "seed-0" / "metrics.jsonl").unlink()
    (make.out / "random" / "seed-0" / "metrics.jsonl").write_text("")
    (make.out / "run.json").unlink()
    page, images = written(make.out)
    assert images == 3 and "<td>DGG</td>" in page  # no gate left to draw
    assert "Sampled episodes of Single use" in page

    for arm in ("single_use", "fixed_k4"):
        (make.out / arm / "seed-0" / "metrics.jsonl").unlink()
    for path in make.out.glob("*.png"):
        path.unlink()
    page, images = written(make.out)
    assert images == 0 and not list(make.out.glob("*.png"))

    # Ended before the first evaluation, and before the first arm.
    for run in summary["runs"]:
        run.update(finished=False, rollouts=0, final_accuracy=None, late_accuracy=None,
                   best_accuracy=None, rollouts_to_single_use_final=None)  # fmt: skip
    assert table(summary)[0] == [
        "Single use (cut at 0)", "24", "16", "2.00", "-", "-", "-", "-", "12.3"
    ]  # fmt: skip
    assert verdict(summary) == ["There is no second finished arm to compare with."]
    nothing = {**summary, "runs": [], "config": {}, "warmups": {}}
    write_json(make.out / "summary.json", nothing)
    assert "no second finished arm" in written(make.out)[0] and terminal(nothing)


@pytest.mark.parametrize(
    "name, text, wanted",
    [
        ("summary.json", None, "expected a run directory with summary.json"),
        ("summary.json", "{", "expected a summary.json of this version"),
        ("summary.json", '{"arms": {}}', "expected a summary.json of this version"),
        ("summary.json", "[]", "expected a summary.json of this version"),
        (
            "summary.json",
            '{"runs": [], "warmups": {}, "match": {}, "config": {"dgg": {"speed": 3}}}',
            "expected a summary.json of this version",
        ),
        ("dgg/seed-0/metrics.jsonl", '{"type": "ev\n', "expected a row of JSON a line in"),
        ("dgg/seed-0/metrics.jsonl", b"\xff\n", "expected a row of JSON a line in"),
    ],
)
def test_unreadable_files_give_one_line(make, name, text, wanted, capsys):
    make([0])
    path = make.out / name
    path.unlink() if text is None else path.write_bytes(
        text.encode() if type(text) is str else text
    )
    assert main(["report", "--out", str(make.out)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: out: ") and wanted in error and error.count("\n") == 1


HOSTILE = [
    "</div></body><script>alert(1)</script>",
    "<img src=x onerror=alert(1)> {title} %s \"'&",
    "\x00\x1b[31m\u202eevil\u200b\ud800\r\t\x7f\u2028",
    "x" * 100_000,
    "two\nlines, é and 漢字",
    "",
]


def test_hostile_episodes_stay_text(make, no_pictures):
    make([0])
    log = make.out / "dgg" / "seed-0" / "metrics.jsonl"
    row = {"type": "episode", "rollouts": 9, "reward": 1.0, "text": HOSTILE}
    log.write_text(log.read_text() + json.dumps(row) + "\n")
    page, _ = written(make.out)
    assert "<script" not in page and "<img" not in page and "onerror=alert(1)&gt;" in page
    assert page.count("</body>") == 1 and "{title} %s &quot;&#x27;&amp;" in page
    assert r"\x00\x1b[31m\u202eevil\u200b\ud800\r\t\x7f\u2028" in page
    assert not re.search("[\x00-\x09\x0b-\x1f\x7f\u202e]", page)
    assert "x … (98000 more characters)" in page and "x" * 2001 not in page
    assert "two\nlines, é and 漢字" in page
    # Prompt, then policy and environment in turn.
    shown = page[page.index("Rollout batch 9") :]
    assert re.findall('<div class="(.*?)"', shown) == [
        "prompt", "policy", "environment", "policy", "environment", "policy"
    ]  # fmt: skip


def test_a_seed_whose_single_use_was_cut_has_no_goal_to_miss(make):
    summary = make([0, 1], arms=("single_use", "dgg"), cut=[("single_use", 1)])
    lines = {line[0]: line for line in table(summary)}
    at = list(results.COLUMNS).index("to goal")
    assert lines["DGG"][at] == "4 (2.0x)" and lines["Single use (1 of 2 seeds)"][at] == "4 (2.0x)"


def test_arms_of_other_batches_are_not_said_to_meet_the_same_prompts(make, no_pictures):
    said = "meets the same prompts, in as many rollout batches"
    make([0])
    assert said in written(make.out)[0]
    summary = json.loads((make.out / "summary.json").read_text())
    summary["config"]["dgg"]["prompts_per_batch"] = 2
    write_json(make.out / "summary.json", summary)
    assert said not in written(make.out)[0]


def test_page_needs_nothing_from_outside(make):
    summary = make([0, 1], arms=("single_use", "dgg"), cut=[("dgg", 1)])
    summary["config"]["dgg"]["task_options"] = {"data": "</pre><script src=//x>"}
    write_json(make.out / "summary.json", summary)
    page, _ = written(make.out)
    assert re.findall(r'src="(.*?)"', page) == ["data:image/png;"] * 4
    for word in ("<script", "<link", "<iframe", "@import", "url(", "http:", "https:"):
        assert word not in page
    settings = report.settings(summary)
    assert settings["all arms"]["task"] == "digits" and "gate" not in settings["all arms"]
    assert settings["by arm"]["single_use"]["gate"] == "off"
    assert "mean reward" in page and "exact expected accuracy" in page and "task digits" in page


def test_means_bands_and_smoothing():
    means, errors = plots.mean_and_error([{0: 1.0, 2: 2.0, 4: 9.0}, {0: 3.0, 2: 2.0}])
    assert means == {0: 2.0, 2: 2.0}  # only where both seeds have a value
    assert errors[0] == pytest.approx(1.0) and errors[2] == 0.0  # sd 1.414 / sqrt(2)
    assert plots.mean_and_error([{0: 1.0}]) == ({0: 1.0}, {0: 0.0})
    curve = plots.smooth({1: 1.0, 3: math.nan, 5: 3.0, 7: math.inf}, width=3)
    assert curve == {1: 1.0, 3: 2.0, 5: 3.0, 7: 3.0}
    assert plots.smooth({}) == {}


def test_late_is_named_and_wrong_warm_ups_are_told(make):
    summary = make([0, 1])
    summary["warmups"]["1"]["reached"] = False
    assert "The warm-up ended early, at 20.0% (seed 1)." in verdict(summary)
    assert results.meanings(summary).endswith("mean ± standard deviation over seeds 0, 1")
    with pytest.raises(ConfigError):
        report.read_summary(make.out / "elsewhere")
