"""Settings and the command line: every mistake is one line, and nothing is written."""

from dataclasses import fields, replace

import pytest
from trainer_toys import TINY
from transformers import LlamaConfig

from python_trainer.__main__ import (
    CONFIGS,
    arm_name,
    config_of,
    execute,
    main,
    parser,
    plan_of,
    read_toml,
    task_options,
)
from python_trainer.compare import begin, plan, read_run
from python_trainer.config import ConfigError, TrainConfig
from python_trainer.model import pretrained
from python_trainer.tasks import FAMILIES
from python_trainer.tokenizer import FittedTokenizer

WRONG = [
    ("gate", "maybe", "one of off, dgg"),
    ("seed", -1, "integer >= 0"),
    ("seed", 2**64, "< 9223372036854775808"),
    ("loss_type", "ppo", "one of grpo, dr_grpo, bnpo, dapo"),
    ("num_generations", 1, "integer >= 2"),
    ("rollout_batches", 0, "integer >= 1"),
    ("rollout_batches", 2.5, "integer >= 1"),
    ("num_iterations", True, "integer >= 1"),
    ("temperature", 0.0, "> 0"),
    ("learning_rate", float("nan"), "finite number"),
    ("epsilon", 1.5, "<= 1"),
    ("beta", -0.1, ">= 0"),
    ("warmup_accuracy", 2, "<= 1"),
    ("gate_window", 1, "integer >= 2"),
    ("shuffle_within", 0, "integer >= 1"),
    ("mini_batches", 3, "a divisor of prompts_per_batch (16)"),
    ("gate_include_shut", 1, "a bool"),
    ("hidden_size", 30, "multiple of"),
    ("task_options", [], "a dict"),
    ("model", "", "name"),
    ("task", ["math"], "name"),
    ("device", True, "name"),
    ("micro_batch_size", 0, "integer >= 1"),
    ("gradient_checkpointing", 1, "a bool"),
    ("parallel", "tensor", "one of ddp, fsdp2"),
    ("task_timeout", 0, "> 0"),
]


def test_a_gates_own_score_and_what_is_said_instead():
    assert TrainConfig(gate="dgg").score == (0.5, 32, False)  # the paper's
    assert TrainConfig(gate="gain").score == (0.4, 96, True) == TrainConfig().score
    given = TrainConfig(gate="gain", gate_threshold=0.0, gate_include_shut=False)
    assert given.score == (0.0, 96, False)


@pytest.mark.parametrize(("field", "value", "expected"), WRONG)
def test_config_error_names_field_expected_and_got(field, value, expected):
    with pytest.raises(ConfigError) as caught:
        TrainConfig(**{field: value})
    message = str(caught.value)
    assert message.startswith(f"{field}: expected") and "\n" not in message
    assert expected in message and repr(value) in message


def test_random_arm_must_be_able_to_reach_its_mean():
    with pytest.raises(ConfigError, match="mean_uses: expected 1 <= mean_uses <= num_iterations"):
        TrainConfig(gate="random", num_iterations=2, mean_uses=3.0)


CLI_WRONG = [
    (["--task", "chess"], "task: expected one of math, alfworld, webshop, "),
    (["--config", "chess"], "config: expected a TOML file, got 'chess'"),
    (["--config", "math", "--task", "chess"], "task: expected one of math, alfworld, webshop, "),
    (["--parallel", "fsdp2"], "parallel: expected fsdp2 under torchrun"),
    (["--task-option", "dataset=chess"], "expected one of number_sorting, chain_sum"),
    (["--task-option", "min_numbers=0"], "min_numbers must be positive"),
    (["--task-option", "colour=red"], "expected options of reasoning-gym's number_sorting"),
    (["--task-option", "colour"], "task_options: expected NAME=VALUE, got 'colour'"),
    (["--temperature", "0"], "temperature: expected a finite number > 0, got 0.0"),
    (["--vocab-size", "50"], "vocab_size: expected at least"),
    (["--device", "abacus"], "device: expected one that torch has here, got 'abacus'"),
    (["--device", "meta"], "device: expected one that the gate was built for"),
]


@pytest.mark.parametrize(("options", "expected"), CLI_WRONG)
@pytest.mark.parametrize("command", ["train", "compare"])
def test_cli_error_is_one_line_and_writes_nothing(command, options, expected, tmp_path, capsys):
    out = tmp_path / "run"
    assert main([command, "--out", str(out), *options]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    assert expected in error
    assert not out.exists()


@pytest.mark.parametrize(
    ("arms", "expected"),
    [
        (["dgg", "ppo"], "got 'ppo'"),
        (["dgg", "dgg"], "'dgg' twice"),
        (["random", "single_use"], "expected dgg beside random"),
    ],
)
def test_compare_rejects_wrong_arms(arms, expected, tmp_path, capsys):
    assert main(["compare", "--out", str(tmp_path / "run"), "--arms", *arms]) == 2
    assert expected in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_random_runs_after_the_arm_whose_uses_it_copies():
    asked = plan(TINY, ["random", "shuffled", "dgg"], [0])
    assert list(asked.arms) == ["dgg", "random", "shuffled"]
    assert asked.match == {"random": "dgg", "shuffled": "dgg"}


def test_a_control_of_a_control_runs_after_it():
    changes = {"gate": "shuffled", "match": "random"}
    asked = plan(TINY, ["late", "random", "gain", "dgg"], [0], {"late": changes})
    assert list(asked.arms) == ["gain", "dgg", "random", "late"]


def test_mean_uses_that_are_given_take_the_place_of_a_match_alone(tmp_path):
    toml = tmp_path / "my.toml"
    toml.write_text("[arms.dgg]\n[arms.random]\nlearning_rate = 1e-3")
    for options, match in (([], {"random": "dgg"}), (["--mean-uses", "3"], {})):
        argv = ["compare", "--out", "x", "--config", str(toml), *options]
        args, file = parser().parse_args(argv), read_toml(str(toml))
        asked = plan_of(args, file, config_of(args, file))
        assert asked.arms["random"].learning_rate == 1e-3 and asked.match == match
        assert asked.arms["random"].gate == "random"
        assert asked.arms["random"].mean_uses == (3.0 if options else 2.0)


PLAN = """
seeds = [3, 4]
num_iterations = 4
[arms.single_use]
num_iterations = 1
[arms.squared]
gate = "dgg"
gate_squared = true
[arms.its_control]
gate = "shuffled"
match = "squared"
[grid]
learning_rate = [1e-4, 2e-4]
"""


def test_a_file_may_hold_arms_seeds_and_a_grid(tmp_path, monkeypatch):
    (tmp_path / "plan.toml").write_text(PLAN)
    monkeypatch.setattr("python_trainer.compare.go_on", stop)
    with pytest.raises(KeyboardInterrupt):
        execute(parser().parse_args(["compare", "--config", str(tmp_path / "plan.toml"), "--out",
                                     str(tmp_path / "run"), "--rollout-batches", "7"]))  # fmt: skip
    asked = read_run(tmp_path / "run")
    assert asked.seeds == [3, 4]
    assert list(asked.arms) == [
        f"{arm}@{rate}" for arm in ("single_use", "squared", "its_control") for rate in (1e-4, 2e-4)
    ]
    assert asked.match == {f"its_control@{rate}": f"squared@{rate}" for rate in (1e-4, 2e-4)}
    assert asked.arms["single_use@0.0002"].num_iterations == 1
    squared = asked.arms["squared@0.0001"]
    assert squared.gate_squared and squared.learning_rate == 1e-4 and squared.rollout_batches == 7


def test_a_plan_has_an_arm(tmp_path, capsys):
    (tmp_path / "run.json").write_text('{"arms": {}, "seeds": [0], "match": {}}')
    assert main(["resume", "--out", str(tmp_path)]) == 2
    assert "arms: expected at least one" in capsys.readouterr().err


def stop(*_):
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[arms.x]\ngate = 'shuffled'", "expected an arm whose uses x is to match"),
        ("[arms.x]\ngate = 'random'\nmatch = 'y'", "expected y beside x"),
        (
            "[arms.y]\nrollout_batches = 5\n[arms.x]\ngate = 'shuffled'\nmatch = 'y'",
            "rollout_batches: expected at most 5 in x, as in y, whose uses it matches, got 160",
        ),
        ("[arms.x]\nmatch = 'y'\n[arms.y]\nmatch = 'x'", "matches itself, got ['x', 'y', 'x']"),
        ("[arms.'../x']", "arms: expected names of folders, got '../x'"),
        ("[arms.'a/b']", "arms: expected names of folders, got 'a/b'"),
        ("[arms.dgg]\n[grid]\nvllm_url = ['http://a:1']", "of folders, got 'dgg@http://a:1'"),
        ("[arms.x]\nspeed = 3", "expected settings of TrainConfig, got 'speed'"),
        ("[arms.x]\ngate_average = 'mean'", "gate_average: expected"),
        ("[grid]\nspeed = [1, 2]", "expected settings of TrainConfig, got 'speed'"),
        ("arms = 3", "arms: expected tables of settings, got 3"),
        ("[arms]\ndgg = 3", "arms: expected tables of settings, got"),
        ("[grid]\nlearning_rate = 1e-4", "grid: expected a list of values for each field, got"),
        ("seeds = [1.5]", "seeds: expected a list of integers, got"),
        ("seeds = [0, -1]", "seed: expected an integer >= 0 and <"),
        ("seeds = [2, 3, 2]", "seeds: expected each once, got [2, 3, 2]"),
        (
            "[arms.x]\n[arms.y]\nhidden_size = 32",
            "hidden_size: expected the same in all arms, whose start is one, got 32 in y",
        ),
        ("[arms.x]\n[arms.y]\ntask_options = { dataset = 'chain_sum' }", "task_options: expected"),
        ("[grid]\nwarmup_accuracy = [0.1, 0.2]", "warmup_accuracy: expected the same in all arms"),
    ],
)
def test_a_plan_that_makes_no_sense_is_refused(text, expected, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("python_trainer.compare.go_on", stop)
    (tmp_path / "plan.toml").write_text(text)
    argv = ["compare", "--config", str(tmp_path / "plan.toml"), "--out", str(tmp_path / "run")]
    assert main(argv) == 2
    assert expected in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("seeds", [[-1], [0, 0]])
def test_wrong_seeds_are_refused_before_a_run_is_removed(seeds, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("python_trainer.compare.go_on", stop)
    log = tmp_path / "dgg" / "seed-0" / "metrics.jsonl"
    log.parent.mkdir(parents=True)
    log.touch()
    argv = ["compare", "--out", str(tmp_path), "--overwrite", "--seeds", *map(str, seeds)]
    assert main(argv) == 2
    assert capsys.readouterr().err.startswith("error: seed") and log.exists()


@pytest.mark.parametrize("command", ["train", "compare"])
def test_a_run_is_removed_when_that_is_asked_for_and_nothing_else(
    command, tmp_path, monkeypatch, capsys
):
    theirs = [tmp_path / name for name in ("mine.png", "notes/seed-7/notes.txt", "gate.jpg")]
    state = "gone/seed-7/checkpoints/00000001/state.json"
    ours = ["gate.png", "report.html", "summary.json", "gone/seed-7/metrics.jsonl", state]
    ours = [tmp_path / name for name in ours]
    for path in (*theirs, *ours):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    monkeypatch.setattr("python_trainer.compare.go_on", stop)
    assert main([command, "--out", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: out: expected a folder without a run, got")
    assert error.count("\n") == 1 and "`resume`" in error and "--overwrite" in error
    assert all(path.exists() for path in (*theirs, *ours))
    assert not (tmp_path / "run.json").exists()
    assert main([command, "--out", str(tmp_path), "--overwrite"]) == 130
    assert all(path.exists() for path in theirs) and not any(path.exists() for path in ours)
    assert main([command, "--out", str(tmp_path)]) == 130  # nothing was run yet


def test_every_field_is_an_option():
    args = parser().parse_args(["train", "--out", "x", "--num-iterations", "3", "--epsilon", ".1"])
    assert args.num_iterations == 3 and args.epsilon == 0.1
    assert task_options(["a=1", "b=x", "c=true"]) == {"a": 1, "b": "x", "c": True}
    meant = {f.name: f.metadata.get("help") for f in fields(TrainConfig)}
    assert {name for name, text in meant.items() if not text} == {"task_options", "use_counts"}
    args = parser().parse_args(["train", "--out", "x", "--gate-squared", "True"])
    assert args.gate_squared is True


def test_a_wrong_truth_is_told(capsys):
    with pytest.raises(SystemExit):
        parser().parse_args(["train", "--out", "x", "--gate-squared", "yes"])
    assert "--gate-squared: expected true or false, got 'yes'" in capsys.readouterr().err


def test_a_seed_that_is_given_takes_the_place_of_the_files(tmp_path):
    (tmp_path / "my.toml").write_text("seeds = [3, 4]\n[arms.dgg]")
    for options, seeds in (([], [3, 4]), (["--seed", "5"], [5]), (["--seeds", "6", "7"], [6, 7])):
        argv = ["compare", "--out", "x", "--config", str(tmp_path / "my.toml"), *options]
        args, file = parser().parse_args(argv), read_toml(str(tmp_path / "my.toml"))
        assert plan_of(args, file, config_of(args, file)).seeds == seeds


@pytest.mark.parametrize("command", ["train", "resume"])
def test_processes_that_cannot_share_the_work_are_refused(command, tmp_path, monkeypatch, capsys):
    begin(plan(TrainConfig(), ["dgg"], [0]), tmp_path)
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert main([command, "--out", str(tmp_path)]) == 2
    assert "prompts_per_batch: expected a multiple of 3 processes" in capsys.readouterr().err


def test_a_model_without_weights_is_a_wrong_setting(tmp_path):
    LlamaConfig(num_hidden_layers=1).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="model: expected one that transformers can load, got"):
        pretrained(str(tmp_path))


def test_arm_names_agree_with_compare():
    for name, config in plan(TINY, ["single_use", "fixed_k8", "dgg", "kl"], [0]).arms.items():
        assert arm_name(config) == name
    assert arm_name(replace(TINY, gate="off", num_iterations=3)) == "fixed_k3"


def test_learning_rate_counts_applied_updates():
    config = TrainConfig(lr_warmup=3, lr_decay=8)
    factors = [config.learning_rate_factor(applied) for applied in range(10)]
    assert factors[0] == 0.25 and factors[4] == 0.5 and factors[8] == factors[9] == 0.0
    assert max(factors) == factors[3] == 5 / 8
    assert TrainConfig().learning_rate_factor(10**6) == 1.0


def test_settings_come_from_file_and_command_line(tmp_path):
    file = tmp_path / "my.toml"
    file.write_text('task = "math"\nbeta = 0.5\n[task_options]\ndataset = "chain_sum"\n')
    options = ["train", "--out", "x", "--config", str(file), "--beta", "0.25"]
    args = parser().parse_args([*options, "--task-option", "max_digits=1"])
    config = config_of(args, read_toml(args.config))
    assert config.beta == 0.25
    assert config.task_options == {"dataset": "chain_sum", "max_digits": 1}


@pytest.mark.parametrize(("text", "expected"), [
    ("colour = 1", "config: expected settings of TrainConfig, got 'colour'"),
    ("beta =", "config: expected a TOML file"),
    ("\x00", "config: expected a TOML file"),
    ('beta = "x"', "beta: expected a finite number"),
])  # fmt: skip
def test_wrong_files_are_one_line(text, expected, tmp_path, capsys):
    file = tmp_path / "my.toml"
    file.write_text(text)
    assert main(["train", "--out", str(tmp_path / "run"), "--config", str(file)]) == 2
    error = capsys.readouterr().err
    assert expected in error and error.count("\n") == 1


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.toml")), ids=lambda path: path.stem)
def test_shipped_settings_are_settings(path):
    args = parser().parse_args(["train", "--out", "x", "--config", path.stem])
    assert config_of(args, read_toml(path.stem)).task in FAMILIES


def test_every_task_ships_its_settings():
    assert set(FAMILIES) <= {path.stem for path in CONFIGS.glob("*.toml")}


def test_tokenizer_round_trip():
    tokenizer = FittedTokenizer(512)
    text = "(-9/9)= Sort > < ~!\n"
    ids = tokenizer.turn(text)
    assert tokenizer.decode(ids) == text and max(ids) < 512 and ids[-1] == tokenizer.eos
    assert tokenizer.decode([*ids[:3], tokenizer.eos, *ids]) == text[:3]
    assert tokenizer.decode([tokenizer.pad, *ids[:-1], 511]) == text + "\ufffd"
    assert tokenizer.decode(tokenizer.turn("é")) == "\ufffd"
    with pytest.raises(ConfigError, match="vocab_size: expected at least"):
        FittedTokenizer(64)


def test_tokenizer_knows_the_common_words():
    texts = ["go to shelf 12", "go to fridge 1"] * 3 + ["rare"]
    tokenizer = FittedTokenizer.fit(4 + 96 + 4, texts)
    assert tokenizer.words == [" to", "go", " fridge", " shelf"]
    ids = tokenizer.encode("go to shelf 12")
    assert len(ids) == 6 and tokenizer.decode(ids) == "go to shelf 12"
    assert len(tokenizer.encode("rare")) == 4
    assert FittedTokenizer.fit(512, texts).words == [" to", "go", " fridge", " shelf", "rare"]
