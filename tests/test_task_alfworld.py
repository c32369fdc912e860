"""The alfworld family: made games, the engine behind them, and the loader of ALFWorld's own."""

import importlib
import json
import os
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest

from python_trainer.config import ConfigError, TaskError
from python_trainer.tasks import Example, make_task, play

for package in ("fast_downward", "textworld", "alfworld"):
    pytest.importorskip(package, reason=f"the extra [alfworld] is not installed: no {package}")
module = importlib.import_module("python_trainer.tasks.alfworld")
pddl = importlib.import_module("textworld.envs.pddl")

PIECE = re.compile(r" ?[A-Za-z]+|.", re.DOTALL)
ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def task():
    return make_task("alfworld", {"games": 6})


@pytest.fixture(scope="module")
def examples(task):
    return task.sample(6, "0")


def game_data(game) -> dict[str, str]:
    """What ALFWorld writes to a game.tw-pddl file."""
    grammar = (module.resources.files("alfworld") / "data" / "alfred.twl2").read_text("utf-8")
    return {
        "pddl_domain": module.engine().logic.domain,
        "grammar": grammar.replace("UNKNOWN GOAL", game.goal),
        "pddl_problem": game.problem,
    }


# Episodes


def test_transcript_of_the_docstring(task):
    lines = [line[4:] for line in str(module.__doc__).splitlines() if line.startswith("    ")]
    turns = [line[2:] for line in lines if line.startswith("> ")]
    where = {"Apple|0": "Fridge|0", "Egg|0": "Fridge|0", "Knife|0": "CounterTop|0"}
    kept = ["Cabinet|0", "CounterTop|0", "Fridge|0", "Microwave|0", "Sink|0|SinkBasin"]
    goal = module.gdict[module.KINDS["heat"].goal]["pddl"].format(obj="Apple", recep="CounterTop")
    game = module.Game("put a hot apple in countertop", module.write_problem(kept, where, goal))
    reward, written = play(task, Example("", game, None), turns)
    assert reward == 1.0
    said = [module.engine().scene(game, ()).text, f"task: {game.goal}"]
    for turn, text in zip(turns, [*written, ""], strict=True):
        said += [f"> {turn}", *text.splitlines()]
    assert said == lines
    assert module.engine().plan(game) == tuple(turns)


@pytest.mark.parametrize("kind", module.KINDS)
def test_experts_of_every_kind_score_one(kind):
    task = make_task("alfworld", {"kinds": [kind], "games": 3, "receptacles": 4, "objects": 2})
    for example in task.sample(2, "0") + task.sample(1, "0", held_out=True):
        assert 4 <= len(example.answer) <= 12
        assert play(task, example, example.answer)[0] == 1.0
        # ... and not before the last turn.
        assert play(task, example, example.answer[:-1])[0] == 0.0
        see, goal, end = example.prompt.split("\n")
        assert see.startswith("see ") and see.count(",") <= 3 and not end
        words = {"clean": "clean", "heat": "hot", "cool": "cool", "two": "two", "light": "look"}
        assert goal.startswith("task: ") and words.get(kind, "put a ") in goal


def test_experts_look_elsewhere_first():
    """In some games; what they add to the planner's turns is `go to` and `open`."""
    looked, examples = [], make_task("alfworld", {"games": 12}).sample(12, "0")
    for example in examples:
        plan = module.engine().plan(example.item)
        extra = list(example.answer)
        for turn in plan:
            if turn in extra:  # what a look has opened is not opened again
                extra.remove(turn)
        assert {turn.split()[0] for turn in extra} <= {"go", "open"}
        goal = example.item.goal.split()[-1]
        assert not any(turn.startswith((f"go to {goal} ", f"open {goal} ")) for turn in extra)
        looked += [plan[1].split()[0]] if extra else []
        tight = make_task("alfworld", {"max_turns": len(plan)})
        assert len(tight._expert(example.item, plan)) == len(plan)
    assert set(looked) == {"open", "take"}  # for what is in a closed place, and in sight
    assert len(looked) < len(examples)


def test_it_is_what_textworlds_own_environment_says(task, examples):
    """Walks of random commands, in both; the cache and its replays must not show."""
    rng = random.Random(0)
    for example in examples[:2]:
        env = pddl.PddlEnv()
        env.load(game_data(example.item))
        names = module.Demangler(game_infos=env._entity_infos)
        for info in env._entity_infos.values():
            info.name = names.demangle_alfred_name(info.id)
        state = env.reset()
        _, look, goal = state.feedback.split("\n\n")  # after the banner
        assert goal == f"Your task is to: {example.item.goal}."
        assert example.prompt == f"{module.terse(look)}\ntask: {example.item.goal}\n"
        episode = task.begin(example)
        for _ in range(8):
            commands = module.engine().scene(example.item, episode.done).commands
            assert {*commands, "help"} == set(state.admissible_commands)
            command = rng.choice([*commands, "open the door"])
            state, reward, done = env.step(command)
            said = episode.step(command)
            assert said == ("nothing" if "door" in command else module.terse(state.feedback)) + "\n"
            assert (episode.reward, done) == (reward, False)


def test_episodes_of_one_process_do_not_disturb_each_other(task, examples):
    alone = [play(task, example, example.answer) for example in examples]
    module.engine().scene.cache_clear()
    episodes = [task.begin(example) for example in examples for _ in range(2)]
    answers = [example.answer for example in examples for _ in range(2)]
    written = [[] for _ in episodes]
    for i in range(12):
        for episode, answer, text in zip(episodes, answers, written, strict=True):
            text += [episode.step(answer[i])] if i < len(answer) else []
    for j, (episode, text) in enumerate(zip(episodes, written, strict=True)):
        assert (episode.reward, text[:-1]) == alone[j // 2] and text[-1] is None


def test_steps_are_shared_between_attempts(task, examples):
    play(task, examples[0], examples[0].answer)
    before = module.engine().scene.cache_info().misses
    play(task, examples[0], examples[0].answer)
    task.begin(examples[0]).step("dance")
    assert module.engine().scene.cache_info().misses == before


def test_an_episode_ends_after_its_turns(examples):
    task = make_task("alfworld", {"games": 6, "max_turns": 8})
    example = task.sample(1, "0")[0]
    episode = task.begin(example)
    assert [episode.step("look") is None for _ in range(9)] == [False] * 7 + [True] * 2
    for turn in example.answer:
        assert episode.step(turn) is None
    assert episode.reward == 0.0


def test_random_commands_score_nothing(task, examples):
    rng, total = random.Random(0), 0.0
    for example in examples:
        episode = task.begin(example)
        while episode.step(rng.choice(module.engine().scene(example.item, episode.done).commands)):
            pass
        total += episode.reward
    assert total <= 1


def test_hostile_turns_are_not_understood(task, examples):
    start = module.engine().scene(examples[0].item, ())
    first = examples[0].answer[0]
    for turn in (
        "", " ", "x" * 100_000, "{r.name}", "[" * 5000, "\x00\x1b[2J", "\ud800", "go to", "help",
        "#look.feedback#", f"{first} {first}", first + " " * 100_000, "__import__('os')", "İ" * 9,
    ):  # fmt: skip
        episode = task.begin(examples[0])
        assert episode.step(turn) == "nothing\n"
        assert episode.done == () and module.engine().scene(examples[0].item, ()) == start
    # Case and spaces do not matter.
    assert task.begin(examples[0]).step(f"  {first.upper()}\n") != "nothing\n"


def test_commands_can_be_listed(examples):
    task = make_task("alfworld", {"games": 6, "list_commands": True})
    example = task.sample(1, "0")[0]
    text, turns = example.prompt, []
    episode = task.begin(example)
    for turn in example.answer:
        listed = re.search(r"^commands: (.*)\n\Z", text, re.MULTILINE)[1].split(", ")
        assert turn in listed and "help" not in listed
        turns.append(turn)
        text = episode.step(turn) or ""
    assert episode.reward == 1.0


def test_episodes_are_short_and_of_few_words(task, examples):
    words, lengths = set(), []
    for example in examples:
        _, written = play(task, example, example.answer)
        turns = [f"{turn}\n" for turn in example.answer]
        pieces = PIECE.findall("".join([example.prompt, *written, *turns]))
        lengths.append(len(pieces))
        words |= set(pieces)
    assert sum(lengths) / len(lengths) < 200
    assert len(words) < 150
    assert all(word.isascii() and word == word.lower() for word in words)


# Games


def test_sampling_is_a_function_of_the_arguments():
    task = make_task("alfworld", {"games": 6})
    first = task.sample(4, "a")
    again = make_task("alfworld", {"games": 6})
    assert [e.prompt for e in again.sample(2, "b")] != [e.prompt for e in first[:2]]
    assert again.sample(4, "a") == first
    assert len({e.item for e in task.sample(6, "c")}) == 6  # none twice before all came once
    assert len(task.sample(9, "c")) == 9
    other = make_task("alfworld", {"games": 6, "seed": 1}).sample(1, "a")
    assert other[0].item not in {e.item for e in task.sample(6, "c")}


def test_games_do_not_depend_on_the_hash_seed():
    options = {"games": 2, "kinds": ["two", "heat", "light"]}
    code = f"""from python_trainer.tasks import make_task
print(make_task("alfworld", {options}).sample(2, "0"))"""
    seed = {"PYTHONHASHSEED": str(random.randrange(2**32))}
    other = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT, env={**os.environ, **seed}, check=True, capture_output=True, text=True,
    )  # fmt: skip
    assert other.stdout.strip() == str(make_task("alfworld", options).sample(2, "0"))


def test_pools_are_disjoint():
    """By what the prompt says; drawn without the engine, which would take seconds a hundred."""
    rng, options = random.Random(0), make_task("alfworld", {}).options
    drawn = [g for _ in range(2000) if (g := module.make_game(rng, options))]
    said = {held_out: set() for held_out in (False, True)}
    for game in drawn:
        types = re.findall(r"\(receptacleType \S+ (\S+)Type\)", game.problem)
        said[game.is_held_out].add((game.goal, *sorted(types)))
    assert not said[False] & said[True]
    assert 0.08 < len(said[True]) / (len(said[True]) + len(said[False])) < 0.17
    assert len(drawn) > 1000 and len(said[False]) > 800  # goals are many


def test_held_out_examples_are_not_those_of_training():
    task = make_task("alfworld", {"games": 3})
    assert all(e.item.is_held_out for e in task.sample(3, "0", held_out=True))
    assert not any(e.item.is_held_out for e in task.sample(3, "0"))


def test_the_process_is_left_as_it_was(task, examples, capfd, monkeypatch):
    argv, out = ["train", "--seed"], sys.stdout
    monkeypatch.setattr(sys, "argv", argv)
    module.World(module.engine().library, examples[0].item.problem, module.engine().logic)
    assert sys.argv is argv and sys.stdout is out
    assert capfd.readouterr() == ("", "")


def test_a_game_is_as_large_as_asked():
    options = make_task("alfworld", {"receptacles": 9, "objects": 7, "kinds": ["cool"]}).options
    rng = random.Random(0)
    game = next(g for _ in range(100) if (g := module.make_game(rng, options)))
    problem = game.problem.split("(:goal")[0]
    assert problem.count("(receptacleType ") == 9
    assert problem.count("(objectType ") == 7


def test_too_few_turns_for_any_game_is_one_line():
    task = make_task("alfworld", {"max_turns": 3, "games": 1})
    task.engine = type("Planner", (), {"plan": lambda self, game: ("look",) * 4})()
    with pytest.raises(TaskError, match=r"^task alfworld: expected a game that .*max_turns=3, .*$"):
        task.sample(1, "0")


@pytest.mark.parametrize(
    "options, message",
    [
        ({"kind": "heat"}, "task_options: expected kinds, games, .*, got 'kind'"),
        ({"kinds": []}, r"task_options.kinds: expected some of \['place', .*\], got \[\]"),
        ({"kinds": "heat"}, "task_options.kinds: expected some of .*, got 'heat'"),
        ({"kinds": [["heat"]]}, "task_options.kinds: expected some of"),
        ({"games": 0}, "task_options.games: expected an integer in 1..1000000, got 0"),
        ({"receptacles": 2}, "task_options.receptacles: expected an integer in 3..100, got 2"),
        ({"objects": 1.0}, "task_options.objects: expected an integer in 1..100, got 1.0"),
        ({"max_turns": True}, "task_options.max_turns: expected an integer in 1..100, got True"),
        ({"seed": -1}, "task_options.seed: expected an integer"),
        ({"list_commands": 1}, "task_options.list_commands: expected a bool, got 1"),
        ({"data": 3}, "task_options.data: expected a path, got 3"),
    ],
)
def test_wrong_options_are_one_line(options, message):
    with pytest.raises(ConfigError, match=f"^{message}.*$"):
        make_task("alfworld", options)


def test_without_its_packages_it_is_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "fast_downward", None)
    monkeypatch.delitem(sys.modules, module.__name__)
    with pytest.raises(ConfigError, match=r"^task: alfworld needs a package that is not here .*$"):
        make_task("alfworld", {})


# ALFWorld's own games


@pytest.fixture
def folder(tmp_path, examples):
    for i, example in enumerate(examples[:3]):
        path = tmp_path / f"trial{i}" / "game.tw-pddl"
        path.parent.mkdir()
        path.write_text(json.dumps(game_data(example.item)))
    return tmp_path


def test_game_files_are_played(folder, examples):
    task = make_task("alfworld", {"data": str(folder)})
    loaded = task.sample(3, "0")
    assert set(loaded) == set(examples[:3])
    assert all(play(task, e, e.answer)[0] == 1.0 for e in loaded)
    with pytest.raises(TaskError, match="task alfworld: expected 1 held-out games, found none"):
        task.sample(1, "0", held_out=True)


def test_a_game_that_takes_more_turns_has_no_answer(folder):
    task = make_task("alfworld", {"data": str(folder), "max_turns": 2})
    assert [e.answer for e in task.sample(3, "0")] == [None] * 3


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", "trial0/game.tw-pddl, line 1: expected JSON, got Expecting value"),
        (b'{\n"grammar": }', "trial0/game.tw-pddl, line 2: expected JSON, got Expecting value"),
        (b'{"grammar": "\xff"}', "trial0/game.tw-pddl: expected JSON in UTF-8"),
        (b"[" * 100_000, "trial0/game.tw-pddl: expected JSON in UTF-8 (maximum recursion"),
        (b"[]", "trial0/game.tw-pddl: expected an object with the texts"),
        (b'{"grammar": "x", "pddl_problem": 1}', "trial0/game.tw-pddl: expected an object with"),
        (b'{"grammar": "x", "pddl_problem": ""}', "trial0/game.tw-pddl: grammar: expected 'Your"),
    ],
)
def test_malformed_game_files_are_one_line(folder, content, message):
    (folder / "trial0" / "game.tw-pddl").write_bytes(content)
    with pytest.raises(TaskError, match=f"^task alfworld: .*{re.escape(message)}.*$"):
        make_task("alfworld", {"data": str(folder)})


@pytest.mark.parametrize(
    "problem",
    [
        "",
        ")",
        "(" * 9999,
        "(define",
        "(define (problem p) (:domain alfred) (:objects) (:init (x)))",
    ],
)
def test_malformed_problems_are_one_line(folder, problem, examples):
    path = folder / "trial0" / "game.tw-pddl"
    path.write_text(json.dumps({**game_data(examples[0].item), "pddl_problem": problem}))
    task = make_task("alfworld", {"data": str(folder)})
    with pytest.raises(TaskError, match=r"^task alfworld: .*game.tw-pddl: pddl_problem: .*$"):
        for held_out in (False, True):
            task.sample(3, "0", held_out)


def test_a_folder_without_games_is_one_line(tmp_path):
    with pytest.raises(TaskError, match=r"^task alfworld: .*: expected game.tw-pddl files, found"):
        make_task("alfworld", {"data": str(tmp_path)})
