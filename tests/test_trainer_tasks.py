"""The math family: reasoning-gym's items and verdicts, with our rendering around them."""

import random

import pytest

from python_trainer.config import ConfigError, TaskError
from python_trainer.tasks import Example, make_task, score
from python_trainer.tasks.math import RENDERINGS


@pytest.fixture(params=sorted(RENDERINGS))
def task(request):
    return make_task("math", {"dataset": request.param})


@pytest.mark.parametrize("held_out", [False, True])
def test_reference_answers_score_one_and_random_ones_nearly_nothing(task, held_out):
    examples = task.sample(200, "0", held_out)
    assert score(task, examples, [e.answer for e in examples]) == [1.0] * 200
    rng = random.Random(0)
    guesses = ["".join(rng.choices("0123456789", k=len(e.answer))) for e in examples]
    assert sum(score(task, examples, guesses)) <= 20  # one-digit sums can be guessed


def test_rubbish_scores_nothing(task):
    for example in task.sample(20, "1"):
        for text in ("", " ", "x", "[]", example.answer + "0", "\ufffd", "," * 8, "'\"\\"):
            assert task.reward(example, text) == 0.0


def test_rendering_of_known_items():
    task = make_task("math", {"dataset": "number_sorting", "direction": "both"})
    for example in task.sample(50, "2"):
        digits, sign = example.prompt[:-1], example.prompt[-1]
        assert example.answer == "".join(sorted(digits, reverse=sign == "<"))
        assert example.item["metadata"]["direction"] == (
            "ascending" if sign == ">" else "descending"
        )
    for example in make_task("math", {"dataset": "chain_sum"}).sample(50, "2"):
        assert example.prompt.endswith("=") and " " not in example.prompt
        assert str(eval(example.prompt[:-1])) == example.answer


def test_numbers_of_several_digits_are_separated():
    task = make_task("math", {"min_value": -50, "max_value": 50, "min_numbers": 4})
    example = next(e for e in task.sample(50, "3") if "-" in e.prompt)
    values = [int(n) for n in example.prompt[:-1].split(",")]
    assert example.answer == ",".join(str(n) for n in sorted(values))
    assert task.reward(example, example.answer) == 1.0


def test_reward_is_stricter_than_the_verifier():
    options = {"dataset": "number_sorting"}
    strict = make_task("math", options)
    lenient = make_task("math", {**options, "partial_credit": True})
    example = next(e for e in strict.sample(100, "4") if e.answer[0] == "1")
    almost = "0" + example.answer[1:]  # sorted, and each number within 1: full marks upstream
    assert lenient.reward(example, almost) == 1.0
    assert strict.reward(example, almost) == 0.0


def test_partial_credit_of_arithmetic():
    lenient = make_task("math", {"dataset": "basic_arithmetic", "partial_credit": True})
    example = lenient.sample(1, "5")[0]
    assert 0.0 < lenient.reward(example, example.answer + "0") < 1.0


def test_sampling_is_a_function_of_the_seed_and_pools_are_disjoint(task):
    assert [e.prompt for e in task.sample(30, "a")] == [e.prompt for e in task.sample(30, "a")]
    assert [e.prompt for e in task.sample(30, "a")] != [e.prompt for e in task.sample(30, "b")]
    train = {e.prompt for seed in range(5) for e in task.sample(200, str(seed))}
    held_out = {e.prompt for e in task.sample(200, "held-out", held_out=True)}
    assert not train & held_out


def test_too_few_items_is_one_line():
    task = make_task("math", {"min_numbers": 1, "max_numbers": 1, "max_value": 0.4})
    with pytest.raises(TaskError, match=r"math/number_sorting: expected 5 held-out items, got 0"):
        task.sample(5, "0", held_out=True)


def test_unknown_names_list_the_known():
    with pytest.raises(ConfigError, match="task: expected one of math, got 'chess'"):
        make_task("chess", {})
    with pytest.raises(ConfigError, match="expected one of number_sorting, chain_sum, basic"):
        make_task("math", {"dataset": "sokoban"})


@pytest.mark.parametrize("value", [1.5, -0.1, float("nan")])
def test_reward_out_of_range_is_one_line_naming_the_task(value):
    class Odd:
        name = "odd"

        def sample(self, n, seed, held_out=False):
            return []

        def reward(self, example, completion):
            return value

    with pytest.raises(TaskError, match=r"task odd: reward: expected a number in \[0, 1\], got"):
        score(Odd(), [Example("p", None, None)], ["c"])
