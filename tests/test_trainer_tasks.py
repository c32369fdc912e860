"""The math family: items, renderings, verdicts and files; and the bounds that verifiers run in."""

import json
import os
import random
import sys
import threading
import time
import types

import pytest
from forks import fork_to

from python_trainer.config import ConfigError, TaskError
from python_trainer.tasks import make_task, play
from python_trainer.tasks.bounded import Bounded
from python_trainer.tasks.math import (
    ALLOWED,
    LONGEST,
    RENDERINGS,
    UNUSABLE,
    Verifier,
    final_answer,
)


def rewards(task, examples, completions):
    return [
        play(task, example, [completion])[0]
        for example, completion in zip(examples, completions, strict=True)
    ]


# Compact


@pytest.fixture(params=sorted(RENDERINGS))
def task(request):
    return make_task("math", {"dataset": request.param})


@pytest.mark.parametrize("held_out", [False, True])
def test_reference_answers_score_one_and_random_ones_nearly_nothing(task, held_out):
    examples = task.sample(200, "0", held_out)
    assert [play(task, e, e.answer) for e in examples] == [(1.0, [])] * 200
    rng = random.Random(0)
    guesses = ["".join(rng.choices("0123456789", k=len(e.answer[0]))) for e in examples]
    assert sum(rewards(task, examples, guesses)) <= 20  # one-digit sums can be guessed


HOSTILE = (
    "", " ", "x", "[]", "\ufffd", "," * 8, "'\"\\", "\x00\n\r\x1b[2J", "٣٤", "nan", "1e999",
    ",".join(["nan"] * 8), "9" * 100_000, "[" * 100_000, "__import__('os').abort()", "\ud800",
)  # fmt: skip


@pytest.mark.parametrize("partial_credit", [False, True])
@pytest.mark.parametrize("dataset", sorted(RENDERINGS))
def test_rubbish_scores_nothing(dataset, partial_credit):
    task = make_task("math", {"dataset": dataset, "partial_credit": partial_credit})
    for example in task.sample(20, "1"):
        # Neither is part of the answer: that is what partial credit is given for.
        texts = [text for text in HOSTILE if example.answer[0] not in text]
        assert max(rewards(task, [example] * len(texts), texts)) == 0.0
        if not partial_credit:
            assert play(task, example, [example.answer[0] + "0"])[0] == 0.0


def test_rendering_of_known_items():
    task = make_task("math", {"dataset": "number_sorting", "direction": "both"})
    for example in task.sample(50, "2"):
        digits, sign = example.prompt[:-1], example.prompt[-1]
        assert example.answer == ("".join(sorted(digits, reverse=sign == "<")),)
        assert example.item["metadata"]["direction"] == (
            "ascending" if sign == ">" else "descending"
        )
    for example in make_task("math", {"dataset": "chain_sum"}).sample(50, "2"):
        assert example.prompt.endswith("=") and " " not in example.prompt
        assert (str(eval(example.prompt[:-1])),) == example.answer


def test_numbers_of_several_digits_are_separated():
    task = make_task("math", {"min_value": -50, "max_value": 50, "min_numbers": 4})
    example = next(e for e in task.sample(50, "3") if "-" in e.prompt)
    values = [int(n) for n in example.prompt[:-1].split(",")]
    assert example.answer == (",".join(str(n) for n in sorted(values)),)
    assert play(task, example, example.answer)[0] == 1.0


def test_reward_is_stricter_than_the_verifier():
    options = {"dataset": "number_sorting"}
    strict = make_task("math", options)
    lenient = make_task("math", {**options, "partial_credit": True})
    example = next(e for e in strict.sample(100, "4") if e.answer[0][0] == "1")
    almost = "0" + example.answer[0][1:]  # sorted, each number within 1: full marks upstream
    assert play(lenient, example, [almost])[0] == 1.0
    assert play(strict, example, [almost])[0] == 0.0


def test_partial_credit_of_arithmetic():
    lenient = make_task("math", {"dataset": "basic_arithmetic", "partial_credit": True})
    example = lenient.sample(1, "5")[0]
    assert 0.0 < play(lenient, example, [example.answer[0] + "0"])[0] < 1.0


# Every source of items


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "problems.jsonl"
    records = [{"problem": f"What is {n} + {n}?", "answer": str(2 * n)} for n in range(200)]
    path.write_text("\n".join(map(json.dumps, records)))
    return str(path)


@pytest.fixture(params=["number_sorting", "basic_arithmetic", "plain", "data"])
def any_task(request, file):
    options = {"dataset": request.param}
    if request.param == "plain":
        options = {"rendering": "plain", "dataset": "leg_counting"}
    return make_task("math", {"data": file} if request.param == "data" else options)


def test_sampling_is_a_function_of_the_seed_and_pools_are_disjoint(any_task):
    prompts = [
        [e.prompt for e in any_task.sample(30, seed, held_out)]
        for seed, held_out in (("a", False), ("a", False), ("b", False), ("c", True))
    ]
    assert prompts[0] == prompts[1] != prompts[2]
    train = {e.prompt for seed in range(5) for e in any_task.sample(200, str(seed))}
    held_out = {e.prompt for e in any_task.sample(200, "held-out", held_out=True)}
    assert len(held_out) > 10 and not train & held_out


def test_only_the_strict_compact_reward_is_exact(any_task, task):
    assert task.exact
    assert any_task.exact == (any_task.name in ("math/number_sorting", "math/basic_arithmetic"))
    assert not make_task("math", {"partial_credit": True}).exact


def test_too_few_items_is_one_line():
    task = make_task("math", {"min_numbers": 1, "max_numbers": 1, "max_value": 0.4})
    with pytest.raises(TaskError, match=r"math/number_sorting: expected 1 held-out items, got 0"):
        task.sample(1, "0", held_out=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dataset": "sokoban"}, "expected one of number_sorting, chain_sum, basic"),
        ({"dataset": 3}, "task_options.dataset: expected a name, got 3"),
        ({"rendering": "latex"}, "rendering: expected compact or plain, got 'latex'"),
        ({"rendering": "plain", "dataset": "chess"}, "'chess' .reasoning-gym has no such"),
        ({"rendering": "plain", "dataset": "puzzle24"}, "'puzzle24' .its verifier accepts any"),
        ({"rendering": "plain", "dataset": "gcd", "direction": "both"}, "reasoning-gym's gcd, got"),
        ({"direction": "up"}, "expected ascending, descending or both, got 'up'"),
        ({"partial_credit": 1}, "partial_credit: expected a bool, got 1"),
        ({"min_numbers": -1}, "expected options of reasoning-gym's number_sorting, got"),
        ({"data": 3}, "task_options.data: expected a path, got 3"),
        ({"data": "a", "dataset": "gcd"}, "task_options.dataset: expected no option beside data"),
    ],
)
def test_wrong_options_are_one_line(options, message):
    with pytest.raises(ConfigError, match=message) as error:
        make_task("math", options)
    assert "\n" not in str(error.value)


def test_unknown_family_lists_the_known():
    with pytest.raises(ConfigError, match=r"task: expected one of math, .*, got 'chess'"):
        make_task("chess", {})


# Plain


@pytest.mark.parametrize(
    ("completion", "answer"),
    [
        (" 42\n", "42"),
        ("The answer: 41. No, Answer: 42", "42"),
        ("**Answer:** 42", "42"),
        ("6 * 7\n#### 42", "42"),
        (r"ANSWER: $\boxed{\frac{1}{2}}$, so there.", r"\frac{1}{2}"),
        (r"\boxed{41} #### 42", "42"),
        (r"\boxed{42", "42"),
        ("answer: 1 2\n3 4\n", "1 2\n3 4"),
        ("my answers: 42", "my answers: 42"),
    ],
)
def test_final_answer(completion, answer):
    assert final_answer(completion) == answer


@pytest.mark.parametrize("dataset", [*sorted(ALLOWED), "arc_1d", "gsm_symbolic", "word_ladder"])
def test_reference_answers_pass_for_what_they_are(dataset):
    task = make_task("math", {"rendering": "plain", "dataset": dataset, "size": 200})
    verifier = Verifier(dataset, {"size": 200})
    for example in task.sample(8, "0"):
        assert example.prompt == example.item["question"]
        (answer,) = example.answer
        assert final_answer(f"So.\nAnswer: {answer}") == answer.strip()
        assert dataset not in ALLOWED or ALLOWED[dataset].fullmatch(answer)
        assert verifier(answer, example.item) == 1.0


@pytest.mark.parametrize("dataset", sorted(ALLOWED))
def test_code_and_nan_do_not_reach_the_verifiers_that_mind(dataset, monkeypatch):
    task = make_task("math", {"rendering": "plain", "dataset": dataset, "size": 200})
    monkeypatch.setattr(task.source, "score", lambda answer, entry: 1.0)
    code = ["nan", "[NaN]", "nan+nanj", "'nan'"]
    if "sort" not in dataset and "complex" not in dataset:
        code += [
            "__import__('os')", "open('f')", "exit()", "x.__class__", "().__doc__", "input()",
            "[c for c in b]", "1 if 1 else 2", "lambda: 1", "'a'*9", "exec(X)", "f'{x}'", "1;2",
            "_" * 9000 + "eval",
        ]  # fmt: skip
    (example,) = task.sample(1, "0")
    began = time.perf_counter()
    assert rewards(task, [example] * len(code), code) == [0.0] * len(code)
    assert time.perf_counter() - began < 1.0


@pytest.mark.parametrize(
    ("verdict", "partial", "strict"),
    [(1.0, 1.0, 1.0), (0.25, 0.25, 0.0), (-1.0, 0.0, 0.0), (7.0, 1.0, 0.0), (float("nan"), 0, 0)],
)
def test_verdicts_become_rewards(verdict, partial, strict, monkeypatch):
    for partial_credit, reward in ((True, partial), (False, strict)):
        options = {"rendering": "plain", "dataset": "gcd", "partial_credit": partial_credit}
        task = make_task("math", options)
        monkeypatch.setattr(task.source, "score", lambda answer, entry: verdict)
        assert play(task, task.sample(1, "0")[0], ["1"])[0] == reward


def test_plain_play(tmp_path):
    task = make_task("math", {"rendering": "plain", "dataset": "countdown"})
    examples = task.sample(20, "0")
    assert [play(task, e, e.answer)[0] for e in examples] == [1.0] * 20
    long_winded = [f"{'Hm. ' * LONGEST}\nAnswer: {e.answer[0]}" for e in examples]
    assert rewards(task, examples, long_winded) == [1.0] * 20
    others = [e.answer[0] for e in examples[1:]]
    assert rewards(task, examples[:-1], others) == [0.0] * 19
    victim = tmp_path / "victim"
    texts = [*HOSTILE, f"open('{victim}', 'w')", "(" * 9000, "7" * 9000]
    assert rewards(task, examples[:1] * len(texts), texts) == [0.0] * len(texts)
    assert not victim.exists()
    assert play(task, examples[0], examples[0].answer)[0] == 1.0  # and it goes on


def test_unusable_datasets_are_there_and_unusable():
    import reasoning_gym

    for name in UNUSABLE.keys() - {"composite", "codeio"}:
        dataset = reasoning_gym.create_dataset(name, seed=0, size=3)
        own = [dataset.score_answer(entry["answer"], entry) for entry in dataset]
        guess = [dataset.score_answer("6*4*1*1", entry) for entry in dataset]
        assert min(own) < 1.0 or max(guess) == 1.0


# Problems of a file

ANSWERS = {
    r"\frac{1}{2}": [r"$\frac12$", "0.5", "1/2", r"\boxed{\dfrac{1}{2}}"],
    "025": ["25", r"so it is \boxed{25}."],
    r"\left( 3, \frac{\pi}{2} \right)": [r"\boxed{(3, \pi/2)}"],
    r"\text{Evelyn}": [r"\boxed{Evelyn}", r"\boxed{\text{Evelyn}}"],
    r"90^\circ": [r"\boxed{90}", r"$90^{\circ}$"],
    "1,-2": [r"\boxed{-2, 1}", r"$\{1, -2\}$"],
    r"x \in [-2,7]": [r"\boxed{x \in [-2,7]}", r"\boxed{[-2,7]}"],
    r"\begin{pmatrix} 1/5 \\ 3 \end{pmatrix}": [
        r"\boxed{\begin{pmatrix} \frac15 \\ 3 \end{pmatrix}}"
    ],
    r"11,\! 111,\! 100": ["11111100", r"\boxed{11,111,100}"],
    "2k+2": [r"\boxed{2(k+1)}"],
}


@pytest.fixture(scope="module")
def problems(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "answers.jsonl"
    records = [{"problem": f"Problem {i}", "answer": a} for i, a in enumerate(ANSWERS)]
    path.write_text("\n".join(map(json.dumps, records)))
    return make_task("math", {"data": str(path)})


def test_equal_answers_score_one_and_others_nothing(problems):
    examples = {e.item: e for e in problems.sample(10 * len(ANSWERS), "0")}
    examples |= {e.item: e for e in problems.sample(10 * len(ANSWERS), "0", held_out=True)}
    assert examples.keys() == ANSWERS.keys()
    for answer, equals in ANSWERS.items():
        assert play(problems, examples[answer], examples[answer].answer)[0] == 1.0
        assert rewards(problems, [examples[answer]] * len(equals), equals) == [1.0] * len(equals)
        others = [texts[0] for a, texts in ANSWERS.items() if a != answer]
        assert not any(rewards(problems, [examples[answer]] * len(others), others))
    assert problems.name == "math/data" and not any("answer" in e for e in examples)


def test_hostile_completions_cost_a_bounded_time(problems, tmp_path):
    (example,) = problems.sample(1, "0")
    victim = tmp_path / "victim"
    cheap = [
        *HOSTILE, rf"\boxed{{{'9' * 5000}}}", r"\frac{" * 2000, "answer is " * 1000,
        "1+" * 4000 + "1", r"\boxed{1}" * 1000, rf"\boxed{{open('{victim}', 'w')}}",
    ]  # fmt: skip
    dear = [r"\boxed{10^{10^{10}}}", rf"\boxed{{{'(' * 300}1{')' * 300}}}"]
    began = time.perf_counter()
    assert not any(rewards(problems, [example] * len(cheap + dear), cheap + dear))
    assert time.perf_counter() - began < 60
    assert not victim.exists()
    assert play(problems, example, example.answer)[0] == 1.0  # and it goes on


def test_field_names_of_the_usual_sets(tmp_path):
    path = tmp_path / "sets.jsonl"
    records = [
        {"problem": "a", "solution": r"It is \boxed{7}.", "answer": "7", "subject": "Algebra",
         "level": 2, "unique_id": "test/algebra/1.json"},  # MATH-500
        {"ID": "2024-I-4", "Problem": "b", "Solution": "Add.", "Answer": 116},  # AIME
        {"question": "c", "answer": "6*12=<<6*12=72>>72\n#### 72"},  # GSM8K
    ]  # fmt: skip
    path.write_text("\ufeff" + "\n\n".join(map(json.dumps, records)) + "\n")
    task = make_task("math", {"data": str(path)})
    found = {e.prompt[0]: e for e in task.source.examples}
    assert [found[name].item for name in "abc"] == ["7", "116", "72"]
    assert found["a"].answer == (r"It is \boxed{7}.",)
    assert found["b"].answer == ("Add.\n\\boxed{116}",)
    assert found["c"].answer == (r"\boxed{72}",)
    assert all(e.prompt[1:] == "\n\nPut the final answer in \\boxed{}." for e in found.values())
    assert [play(task, e, e.answer)[0] for e in found.values()] == [1.0] * 3


GOOD = b'{"problem": "p", "answer": "1"}\n'


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", ": expected a JSON object a line, got none"),
        (b"\n \n", ": expected a JSON object a line, got none"),
        (GOOD + b'{"problem": "p",\n', ':2: expected a JSON object, got \'{"problem": "p",'),
        (GOOD + b"[1, 2]\n", ":2: expected a JSON object, got .1, 2."),
        (GOOD + b"[" * 100_000, ":2: expected a JSON object, got "),
        (GOOD + b'{"problem": "p\xff"}', ":2: expected UTF-8, got byte 0xff"),
        ("{}".encode("utf-16"), ":1: expected UTF-8, got byte 0xff"),
        (b"\x1f\x8b\x08\x00", ":1: expected UTF-8, got byte 0x8b"),
        (b'{"answer": "1"}', ":1: problem or question: expected a text, got nothing"),
        (b'{"problem": " ", "answer": "1"}', ":1: problem or question: expected a text, got ' '"),
        (b'{"problem": "p\\ud800", "answer": "1"}', ":1: problem or question: expected a text"),
        (GOOD + b'\n{"problem": "p"}', ":3: answer: expected a text, got nothing"),
        (b'{"problem": "p", "answer": null}', ":1: answer: expected a text, got nothing"),
        (b'{"problem": "p", "answer": true}', ":1: answer: expected a text, got True"),
        (b'{"problem": "p", "answer": ["1"]}', ":1: answer: expected a text, got .'1'."),
        (b'{"problem": "p", "answer": "1", "solution": 1.5}', ":1: solution: expected a text"),
    ],
)
def test_malformed_files_are_one_line_naming_file_and_line(content, message, tmp_path):
    path = tmp_path / "bad.jsonl"
    path.write_bytes(content)
    with pytest.raises(TaskError, match=f"task math/data: {path}{message}") as error:
        make_task("math", {"data": str(path)})
    assert "\n" not in str(error.value) and len(str(error.value)) < 300


def test_a_file_that_is_not_there_is_one_line(tmp_path):
    with pytest.raises(TaskError, match=r"task math/data: '.*none.jsonl': expected a file, got"):
        make_task("math", {"data": str(tmp_path / "none.jsonl")})


# Bounds. The function is `eval`, so that a call is what it is asked to do.


def test_calls_within_bounds():
    call = Bounded(eval, "t")
    assert call("0.25") == 0.25
    child = call._child
    assert call("print('x' * 100) or 0.5") == 0.5
    assert call("1 / 0") == call("'text'") == call("(" * 1000) == call("None") == 0.0
    verdicts = []
    threads = [
        threading.Thread(target=lambda i=i: verdicts.append((i, call(f"{i}")))) for i in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(verdicts) == [(i, float(i)) for i in range(8)]
    assert call._child is child and child is not None and child.poll() is None


@pytest.mark.parametrize(
    "call_of",
    [
        "[0] * 10**10",  # memory
        "10**10**10",  # one call, which cannot be interrupted
        "max(i for i in iter(int, 1))",  # without end
        "__import__('os').kill(__import__('os').getpid(), 9)",
        "exit()",
    ],
)
def test_calls_beyond_bounds_give_nothing_and_the_next_one_works(call_of):
    call = Bounded(eval, "t")
    began = time.perf_counter()
    assert call(call_of) == 0.0
    assert call("0.75") == 0.75
    assert time.perf_counter() - began < 60


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_child_that_is_gone_leaves_no_descriptor(monkeypatch):
    def count():
        return len(os.listdir("/proc/self/fd"))

    before = count()
    call = Bounded(eval, "t")
    for question in ("1", "1" * 2**17):  # more than a pipe holds
        assert call("1") == 1.0
        call._child.kill()
        call._child.wait()
        assert call(question) == 0.0
    assert call("1") == 1.0
    assert count() == before + 2
    child = call._child
    del call
    assert count() == before and child.poll() is not None
    call = Bounded(eval, "t")
    monkeypatch.setattr(call, "_ask", lambda *_: None)
    with pytest.raises(TaskError):
        call("1")
    assert count() == before


def test_an_interrupted_call_does_not_answer_the_next(monkeypatch):
    call = Bounded(eval, "t")
    call("1")

    class Impatient:
        def register(self, *_):
            pass

        def poll(self, _):
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("python_trainer.tasks.bounded.select.poll", Impatient)
        with pytest.raises(KeyboardInterrupt):
            call("0.1")
    assert call("0.2") == 0.2


def test_a_forked_process_has_a_child_of_its_own():
    call = Bounded(eval, "t")
    assert call("1") == 1.0
    child = call._child
    pid = fork_to(lambda: call("0.5") != 0.5 or call._child is child)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert call._child is child and call("0.25") == 0.25


def test_a_verifier_that_cannot_start_is_one_line(monkeypatch):
    module = types.ModuleType("here_only")
    exec("def verify(): pass", module.__dict__)
    monkeypatch.setitem(sys.modules, "here_only", module)
    with pytest.raises(TaskError, match="task t: the process of its verifier could not start"):
        Bounded(module.verify, "t")()
