"""Settings and the command line: every mistake is one line, and nothing is written."""

from dataclasses import replace

import pytest
from trainer_toys import TINY

from python_trainer.__main__ import arm_name, main, parser, task_options
from python_trainer.compare import arm_configs
from python_trainer.config import ConfigError, TrainConfig
from python_trainer.model import CharTokenizer

WRONG = [
    ("gate", "maybe", "one of off, dgg"),
    ("loss_type", "ppo", "one of grpo, dapo"),
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
    ("hidden_size", 30, "multiple of"),
    ("task_options", [], "a dict"),
]


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
    (["--task", "chess"], "task: expected one of math, got 'chess'"),
    (["--task-option", "dataset=chess"], "expected one of number_sorting, chain_sum"),
    (["--task-option", "min_numbers=0"], "min_numbers must be positive"),
    (["--task-option", "colour=red"], "expected options of reasoning-gym's number_sorting"),
    (["--task-option", "colour"], "task_options: expected NAME=VALUE, got 'colour'"),
    (["--temperature", "0"], "temperature: expected a finite number > 0, got 0.0"),
    (["--vocab-size", "50"], "vocab_size: expected at least"),
    (["--device", "abacus"], "device: expected one that torch has here, got 'abacus'"),
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
    assert list(arm_configs(TINY, ["random", "dgg"])) == ["dgg", "random"]


def test_every_field_is_an_option():
    args = parser().parse_args(["train", "--out", "x", "--num-iterations", "3", "--epsilon", ".1"])
    assert args.num_iterations == 3 and args.epsilon == 0.1
    assert task_options(["a=1", "b=x", "c=true"]) == {"a": 1, "b": "x", "c": True}


def test_arm_names_agree_with_compare():
    for name, config in arm_configs(TINY, ["single_use", "fixed_k8", "dgg", "kl"]).items():
        assert arm_name(config) == name
    assert arm_name(replace(TINY, gate="off", num_iterations=3)) == "fixed_k3"


def test_tokenizer_round_trip():
    tokenizer = CharTokenizer(512)
    text = "(-9/9)= Sort > < ~!\n"
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text and max(ids) < 512
    assert tokenizer.decode([*ids[:3], tokenizer.eos, *ids]) == text[:3]
    assert tokenizer.decode([tokenizer.pad, *ids, 511]) == text + "\ufffd"
    with pytest.raises(ValueError, match="printable ASCII, got 'é'"):
        tokenizer.encode("é")
    with pytest.raises(ConfigError, match="vocab_size: expected at least"):
        CharTokenizer(64)
