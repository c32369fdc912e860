"""What the evidence is computed with: known numbers, a record's way there and back, the oracle."""

from __future__ import annotations

import json
import lzma
import math
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from rich.console import Console
from trainer_toys import TINY, Digits

from benchmarks import common
from benchmarks.evidence import __main__ as evidence
from benchmarks.evidence import numbers, oracle, record
from benchmarks.evidence.numbers import difference, holm
from benchmarks.evidence.record import Run
from python_trainer import compare, report
from python_trainer.__main__ import config_of, parser, plan_of, read_toml
from python_trainer.config import TrainConfig
from python_trainer.files import read_metrics, updates
from python_trainer.loop import Progress, prepare, train


def made(arm, seed, accuracies, uses=1):
    rows = [{"type": "eval", "rollouts": 4 * i, "accuracy": a} for i, a in enumerate(accuracies)]
    rows += [{"type": "update", "rollouts": 1, "gate/shut": False, "grad_norm": 1.0}] * uses
    return Run(arm, seed, rows)


def test_metrics_of_known_curves():
    single = made("single_use", 0, [0.2, 0.3, 0.4, 0.5, 0.5, 0.6, 0.5, 0.7], uses=3)
    other = made("dgg", 0, [0.2, 0.5, 0.6, 0.9, 0.9, 0.7, 0.6, 0.7])
    assert single.late == pytest.approx(0.6)
    assert numbers.speedup(single, single) == 1.0
    assert numbers.speedup(other, single) == 20 / 8  # 0.6 is reached at batch 20, and at 8
    assert numbers.collapsed(other) == 1.0 and numbers.collapsed(single) == 0.0
    assert numbers.METRICS["curve mean"](single, None) == pytest.approx(46.25)
    assert numbers.METRICS["uses"](single, None) == 3
    # Half the time is sampling: 20 batches and 3 updates, against 8 and 1.
    assert numbers.speedup(other, single, 0.5) == (10 + 1.5) / (4 + 0.5)
    never = made("dgg", 0, [0.2] * 8)
    assert numbers.speedup(never, single) == 20 / 28
    assert numbers.reached(other, 0.2) == 1  # before the first batch: at none, and not never


def test_an_update_refused_before_its_backward_costs_its_forward():
    run = made("gain", 0, [0.5], uses=2)
    run.rows += [{"type": "update", "rollouts": 1, "gate/shut": True, "grad_norm": math.nan}]
    # SkipStep's, which no energy tells of.
    refused = {"gate/shut": True, "gate/energy": math.nan, "grad_norm": 1.0}
    run.rows += [{"type": "update", "rollouts": 2, **refused}]
    assert numbers.updates_paid(run, 1) == 2 + numbers.FORWARD
    assert numbers.updates_paid(run, 2) == 3 + numbers.FORWARD


def test_a_run_of_few_updates_has_no_quarters_to_compare():
    rows = [
        {"type": "update", "rollouts": 1, "gate/reuse": use, "gate/shut": use == 4,
         "gate/energy": float("nan") if use == 4 else part + use, "dwd/lm_head": 2.0,
         "dwd/middle": 1.0}
        for use in range(1, 5)
        for part in (0, 10)
    ]  # fmt: skip
    assert evidence.head_norms(rows) == [[1, 2, 3], [11, 12, 13]]
    *_, line = evidence.surge_table({"dgg": {0: Run("dgg", 0, rows)}})
    assert line == "| DGG | 2.09 | 2.91 | 100% | 2.00 | 2.00 |"


def test_paired_differences_and_their_intervals():
    gains = [0.01, 0.02, 0.03, 0.02, 0.04, 0.00, 0.03, 0.01]
    runs = {
        "a": {s: made("a", s, [0.5 + 0.1 * s + gain]) for s, gain in enumerate(gains)},
        "b": {s: made("b", s, [0.5 + 0.1 * s]) for s in range(8)},
    }
    found = difference(runs, "a", "b", "curve mean")
    assert found.mean == pytest.approx(2.0) and found.n == 8 and found.wins == 7
    # s = 1.3093, t(7, 0.975) = 2.3646
    assert found.t_interval == pytest.approx((2 - 1.0946, 2 + 1.0946), abs=1e-3)
    assert 1.0 < found.bootstrap[0] < 1.5 < 2.5 < found.bootstrap[1] < 3.0
    assert found.p == pytest.approx(0.00353, abs=1e-4)
    alone = difference({"a": runs["a"], "b": {0: runs["b"][0]}}, "a", "b", "curve mean")
    assert math.isnan(alone.p) and alone.n == 1


def test_holm():
    got = holm({"a": 0.01, "b": 0.04, "c": 0.03, "d": 0.005})
    assert got == pytest.approx({"d": 0.02, "a": 0.03, "c": 0.06, "b": 0.06})


def test_a_record_goes_there_and_back(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(compare, "make_task", lambda name, options: Digits())
    monkeypatch.setattr(record, "FOLDER", tmp_path / "results")
    monkeypatch.setattr(common, "ROOT", tmp_path / "here" / "benchmarks")
    docs = tmp_path / "here" / "docs"
    docs.mkdir(parents=True)
    (docs / "evidence.md").write_text("![Curves](images/evidence_toy_curves.png)")
    arms = ["single_use", "dgg", "shuffled", "global_norm"]
    for seed in (0, 1):
        out = tmp_path / str(seed)
        compare.begin(compare.plan(TINY, arms, [seed]), out)
        compare.go_on(out, Console(quiet=True))
    record.write([tmp_path / "0", tmp_path / "1"], "toy")
    runs, about = record.read("toy")
    assert len(about) == 2 and about[0]["commit"] == about[1]["commit"]
    stamp = common.stamp(torch.device("cpu"))
    assert about[0]["device"] == stamp["device"] and about[0]["date"] <= stamp["date"]
    assert {arm: sorted(of) for arm, of in runs.items()} == {arm: [0, 1] for arm in arms}
    rows = read_metrics(tmp_path / "1" / "dgg" / "seed-1" / "metrics.jsonl")
    updates = [row for row in rows if row["type"] == "update"]
    mine = [row for row in runs["dgg"][1].rows if row["type"] == "update"]
    assert [row["gate/shut"] for row in mine] == [row["gate/shut"] for row in updates]
    assert mine[0]["kl"] == pytest.approx(updates[0]["kl"], rel=1e-5)
    evidence.main(["report", "toy"])
    text = (tmp_path / "results" / "toy.md").read_text()
    assert f"; {about[0]['device']}, {about[0]['date'][:10]}." in text.splitlines()[0]
    assert "| Single use | 2 |" in text and "H4: DGG − DGG's counts, shuffled" in text
    assert [path.name for path in docs.glob("images/*")] == ["evidence_toy_curves.png"]
    assert len(list(docs.parent.glob("build/evidence/evidence_toy_*.png"))) == 2
    assert "| DGG | 1." in text.split("batches where it rose")[1]
    evidence.main(["times", "toy"])
    assert "| Single use | " in capsys.readouterr().out


def test_arms_of_other_records_are_read_beside_a_records_own(tmp_path, monkeypatch):
    monkeypatch.setattr(record, "FOLDER", tmp_path)
    about = {"versions": {}, "commit": "abc", "warmups": {}}

    def wrote(name, arm, seeds, beside=()):
        folder = tmp_path / name
        runs = [{"arm": arm, "seed": n, "seconds": {}, "finished": True} for n in seeds]
        for n in seeds:
            log = folder / arm / f"seed-{n}" / "metrics.jsonl"
            log.parent.mkdir(parents=True)
            log.write_text(f'{{"type": "eval", "rollouts": 0, "accuracy": 0.{n}}}\n')
        (folder / "summary.json").write_text(json.dumps(about | {"runs": runs}))
        (folder / "run.json").write_text(json.dumps({"arms": {arm: {}}, "seeds": seeds}))
        record.write([folder], name, beside=beside)

    wrote("first", "dgg", [1, 2, 3])
    wrote("second", "gain", [2, 3, 4], [("first", ["dgg"])])
    runs, said = record.read("second")
    assert {arm: sorted(of) for arm, of in runs.items()} == {"dgg": [2, 3], "gain": [2, 3, 4]}
    assert runs["dgg"][3].values == [0.3] and len(said) == 2
    record.write([], "both", beside=[("first", ["dgg"]), ("second", ["gain"])])
    assert sorted(record.read("both")[0]["dgg"]) == [1, 2, 3]
    with pytest.raises(SystemExit):
        evidence.main(["record", "--save", "x", "--beside", "first"])


@pytest.mark.parametrize("name", record.names())
def test_the_tables_of_a_record_are_what_it_says(name):
    """docs/evidence.md cites them: a record and its table never part."""
    kept = (record.FOLDER / f"{name}.md").read_text()
    runs, about = record.read(name)
    lines = evidence.tables(name, runs, about, numbers.verdicts(runs))
    assert "\n".join(lines) + "\n" == kept, "python -m benchmarks.evidence report"


@pytest.mark.parametrize("path", sorted(common.ROOT.glob("*/*.toml")), ids=lambda p: p.stem)
def test_every_plan_here_is_one(path):
    args = parser().parse_args(["compare", "--config", str(path), "--out", "x"])
    file = read_toml(args.config)
    assert plan_of(args, file, config_of(args, file)).seeds == file["seeds"]


@pytest.mark.parametrize("name", record.names())
def test_a_record_says_how_to_make_it_again(name, tmp_path):
    toml = tmp_path / "again.toml"
    toml.write_text(record.settings(name))
    file = read_toml(str(toml))
    args = parser().parse_args(["compare", "--config", str(toml), "--out", str(tmp_path)])
    if not file.get("arms"):
        assert name == "variants_ten"  # it holds other records' runs alone
        return
    again = plan_of(args, file, config_of(args, file))
    with lzma.open(record.FOLDER / f"{name}.jsonl.xz", "rt") as lines:
        about = [json.loads(line) for line in lines if line.startswith('{"type": "about"')]
    arms = {arm: TrainConfig(**values) for row in about for arm, values in row["arms"].items()}
    assert again.arms.keys() == arms.keys()
    for arm, config in arms.items():
        counts = tuple(config.use_counts)
        assert replace(again.arms[arm], seed=0, use_counts=counts) == replace(
            config, seed=0, use_counts=counts
        )
        assert tuple(again.arms[arm].use_counts) == counts or arm in again.match
    assert again.match == {k: v for row in about for k, v in row.get("match", {}).items()}
    assert again.seeds == sorted({seed for row in about for seed in row["seeds"]})


def test_the_best_rate_of_every_arm():
    runs = {
        f"{arm}@{rate}": {0: made(arm, 0, [value])}
        for arm, rate, value in (
            ("a", 1e-4, 0.5),
            ("a", 2e-4, 0.6),
            ("b", 2e-4, 0.4),
            ("b", 1e-4, 0.4),
        )
    }
    assert evidence.best_rates(runs) == {"a": "0.0002", "b": "0.0001"}


def test_signals_that_tell_little_alone_tell_more_together():
    rng, seen = np.random.default_rng(0), []
    for _ in range(3):
        a, b = rng.normal(size=(2, 400))
        seen.append({2: [(-x - y, {"a": 3 * x, "b": y + 7}) for x, y in zip(a, b, strict=True)]})
    alone = [numbers.auc(seen, name) for name in "ab"]
    assert max(alone) < 0.9 and numbers.combined_auc(seen) > 0.99


def test_the_oracle_keeps_the_best_prefix(tmp_path):
    """And its effects are what they say: it begins each batch where the last was best."""
    config = replace(TINY, gate="off", num_iterations=3, learning_rate=3e-2)
    start = prepare(config, Digits())
    effects = {}
    for arm in ("oracle", "all_uses"):
        oracle.one(arm, config, start, tmp_path / arm, lambda _: None)
        rows = read_metrics(tmp_path / arm / "metrics.jsonl")
        effects[arm] = [row["accuracies"] for row in rows if row["type"] == "effect"]
        assert [len(batch) for batch in effects[arm]] == [4] * config.rollout_batches
        told = numbers.effects(Run(arm, 0, rows))
        assert {use: len(of) for use, of in told.items()} == dict.fromkeys((2, 3), 6)
        assert told[3][0][0] == effects[arm][0][3] - effects[arm][0][2]
        assert 0 <= numbers.auc([told], "KL") <= 1
    for before, after in zip(effects["all_uses"], effects["all_uses"][1:], strict=False):
        assert after[0] == before[-1]
    # Before the first update of all there is nothing to go back to.
    ends = [max(effects["oracle"][0][1:]), *(max(batch) for batch in effects["oracle"][1:])]
    assert [batch[0] for batch in effects["oracle"][1:]] == pytest.approx(ends[:-1], abs=1e-6)
    assert any(end > batch[-1] for end, batch in zip(ends, effects["oracle"], strict=True))


def test_an_oracles_directory_is_read_as_any_other(tmp_path, monkeypatch):
    monkeypatch.setattr(oracle, "make_task", lambda name, options: Digits())
    config = replace(TINY, gate="off", num_iterations=2, rollout_batches=2)
    toml, out = tmp_path / "toy.toml", tmp_path / "out"
    toml.write_text("\n".join(f"{k} = {json.dumps(v)}" for k, v in asdict(config).items() if v))
    monkeypatch.setattr("sys.argv", ["oracle", "--config", str(toml), "--out", str(out)])
    oracle.main()
    report.write(out)
    assert "did not finish" not in (out / "report.html").read_text()


@pytest.mark.parametrize("grad_eps", [0.0, 0.125])
def test_the_signals_of_gradients_are_the_runs_own_and_change_nothing_in_it(tmp_path, grad_eps):
    # A rate that no clip acts on. Above 0, entries are drawn by a generator that the run shares.
    changes = {"gate": "off", "num_iterations": 3, "learning_rate": 1e-5, "grad_eps": grad_eps}
    config = replace(TINY, **changes)
    start = prepare(config, Digits())
    oracle.one("all_uses", config, start, tmp_path / "oracle", lambda _: None)
    train(config, start, tmp_path / "plain", Progress())
    rows, plain = (read_metrics(tmp_path / of / "metrics.jsonl") for of in ("oracle", "plain"))
    tried = [row for row in rows if row["type"] == "effect"]
    assert updates(rows) == updates(plain) and len(tried) == config.rollout_batches
    told = [of for uses in numbers.effects(Run("all_uses", 0, rows)).values() for _, of in uses]
    assert all("cosine of two halves of the batch, low" in of for of in told)
    if grad_eps:
        return
    energies = [row["gate/energy"] for row in updates(rows)]
    measured = [of["unclipped"] for row in tried for of in row["signals"]]
    assert measured == pytest.approx(energies, abs=2e-6) and max(energies) > 0.01
    for row in tried:
        if energies[3 * row["rollouts"] - 3]:
            assert [of["with_first"] for of in row["signals"]] == pytest.approx([1, 1, 1], abs=1e-3)
            assert all(abs(of["of_halves"]) < 0.999 for of in row["signals"])
