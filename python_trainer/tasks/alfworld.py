"""The `alfworld` family: household chores in text, played in ALFWorld's own rules.

The games are those of ALFWorld (Shridhar et al. 2021, arXiv 2010.03768): its PDDL domain, grammar
and goals, run by textworld's PDDL engine. Its game files need a download, so games are made
here, from the floor plans that its wheel ships: some of a plan's receptacles, objects put
where ALFRED allows them, one goal. An episode, with the expert's turns marked `>`:

    see cabinet 1, countertop 1, fridge 1, microwave 1, sinkbasin 1.
    task: put a hot apple in countertop
    > go to fridge 1
    arrive at fridge 1. fridge 1 is closed.
    > open fridge 1
    open fridge 1. fridge 1 is open. in it, see apple 1, egg 1.
    > take apple 1 from fridge 1
    pick up apple 1 from fridge 1.
    > go to microwave 1
    arrive at microwave 1. microwave 1 is closed.
    > heat apple 1 with microwave 1
    heat apple 1 using microwave 1.
    > go to countertop 1
    arrive at countertop 1. on countertop 1, see knife 1.
    > move apple 1 to countertop 1

The engine's text is made terse: lower case, without articles. What is not one of the engine's
commands here and now is answered "nothing". The reward is 1 when the goal is reached, which ends
the episode, else 0; it is over after `max_turns` turns. The expert is the engine's planner, which
knows where everything is; because the policy has to look, the expert looks elsewhere first, too.

Option `data` is a folder with ALFWorld's own games (`game.tw-pddl`, at any depth) to play in
place of made ones. Of each, the problem and the sentence with the task are read; domain and
grammar are the wheel's, because a grammar is code that textworld evaluates.

Left out: the command `help`, people's wordings of the goals, goals with sliced objects or objects
in movable ones, several receptacles within reach at once (made games), and the pictures.

Needs `alfworld` (MIT; on import it makes an empty ~/.cache/alfworld) and `textworld[pddl]`, whose
planner is GPL-3. One thread: the engine holds one game at a time, and its translator redirects
sys.stdout meanwhile.
"""

# pyright: reportMissingImports=false
# ^ of an optional extra

from __future__ import annotations

import json
import random
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, lru_cache
from importlib import resources
from pathlib import Path
from typing import Any

import fast_downward
from alfworld.agents.utils.misc import Demangler
from alfworld.gen.constants import (
    MOVABLE_RECEPTACLES_SET,
    OPENABLE_CLASS_SET,
    SCENE_TYPE,
    VAL_ACTION_OBJECTS,
    VAL_RECEPTACLE_OBJECTS,
)
from alfworld.gen.goal_library import gdict
from textworld.envs.pddl.logic import GameLogic, PddlState
from textworld.generator.game import EntityInfo

from ..config import ConfigError, TaskError, one_line
from . import Example, check_integers, check_paths, is_held_out, options_of

MAX_TURN = 200  # characters; a longer turn is not understood
LAMP = "DeskLamp"
LAMP_STANDS = ("CoffeeTable", "Desk", "DiningTable", "Dresser", "SideTable")
# The domain names these types in its rules, so that every problem must declare them.
RULE_TYPES = {"rtype": ("Fridge", "Microwave", "SinkBasin"), "otype": ("ButterKnife", "Knife")}
PDDL_NAMES = str.maketrans({"-": "_minus_", "|": "_bar_", "+": "_plus_", ".": "_dot_"})


@dataclass(frozen=True)
class Kind:
    """One kind of goal."""

    goal: str  # its name in alfworld's goal library
    rooms: tuple[str, ...] = ("Kitchen", "LivingRoom", "Bedroom", "Bathroom")
    tool: str | None = None  # the receptacle that changes the object's state
    ability: str | None = None  # of the object, to be changed so
    copies: int = 1  # of the object
    lamp: bool = False  # the object is carried to a lamp, and stays in hand


KINDS = {
    "place": Kind("pick_and_place_simple"),
    "two": Kind("pick_two_obj_and_place", copies=2),
    "clean": Kind(
        "pick_clean_then_place_in_recep", ("Kitchen", "Bathroom"), "SinkBasin", "Cleanable"
    ),
    "heat": Kind("pick_heat_then_place_in_recep", ("Kitchen",), "Microwave", "Heatable"),
    "cool": Kind("pick_cool_then_place_in_recep", ("Kitchen",), "Fridge", "Coolable"),
    "light": Kind("look_at_obj_in_light", ("LivingRoom", "Bedroom"), lamp=True),
}


@dataclass(frozen=True)
class Options:
    """Settings of the family."""

    kinds: tuple[str, ...] = ("place", "clean", "heat", "cool")  # of goals; "two" and "light" too
    games: int = 1024  # in each pool; made when they are drawn
    receptacles: int = 5  # most in a game
    objects: int = 4  # most in a game, beside a lamp; a game of "two" has at least two
    max_turns: int = 12
    list_commands: bool = False  # what can be done now is part of what the environment writes
    seed: int = 0  # of the games
    data: str | None = None  # path of a folder with ALFWorld's own games; none are made then

    def __post_init__(self) -> None:
        kinds = self.kinds
        known = list(KINDS)
        if not isinstance(kinds, list | tuple) or not kinds or not all(k in known for k in kinds):
            raise ConfigError(f"task_options.kinds: expected some of {known}, got {kinds!r}")
        check_integers(
            self, games=(1, 10**6), objects=(1, 100), max_turns=(1, 100), seed=(0, 2**63),
            receptacles=(3, 100),  # of the source, the tool and the goal
        )  # fmt: skip
        if not isinstance(self.list_commands, bool):
            raise ConfigError(
                f"task_options.list_commands: expected a bool, got {self.list_commands!r}"
            )
        check_paths(self, "data")


@dataclass(frozen=True)
class Game:
    goal: str  # in words
    problem: str  # in PDDL

    @property
    def is_held_out(self) -> bool:
        """By a hash of what the prompt says, so that no prompt is ever in both pools."""
        types = re.findall(r"\(receptacletype \S+ (\S+)\)", self.problem.lower())
        return is_held_out(f"{self.goal} {sorted(types)}")


@dataclass(frozen=True)
class Scene:
    """Where a game stands after some commands."""

    text: str  # the engine's, of the last command
    commands: tuple[str, ...]
    won: bool


class AlfworldTask:
    """Chores in made games, or in ALFWorld's own. Options: the fields of `Options`.

    Raises:
        ConfigError: an option is unknown or wrong.
        TaskError: a game file cannot be read, or is not what ALFWorld's are.
    """

    exact = False  # many ways lead to the goal

    def __init__(self, options: dict[str, Any]) -> None:
        self.options = options_of(Options, options)
        self.name = "alfworld"
        self.engine = engine()
        self.files: list[list[Path]] | None = None  # [held out]
        if self.options.data is not None:
            self.files = _find_games(self.options.data)
        self.examples: dict[tuple[bool, int], Example] = {}  # (held out, index in the pool)

    def sample(self, n: int, seed: str, held_out: bool = False) -> list[Example]:
        """`n` games of a pool, in an order drawn by `seed`; none twice before all came once."""
        size = self.options.games if self.files is None else len(self.files[held_out])
        if not size:
            pool = "held-out" if held_out else "training"
            raise TaskError(f"task alfworld: expected {n} {pool} games, found none")
        order = random.Random(seed).sample(range(size), min(n, size))
        return [self._example(held_out, order[i % size]) for i in range(n)]

    def begin(self, example: Example) -> Chore:
        return Chore(self.engine, example.item, self.options)

    def _example(self, held_out: bool, index: int) -> Example:
        if (held_out, index) not in self.examples:
            if self.files is None:
                game, plan = self._make(held_out, index)
            else:
                game, plan = self._read(self.files[held_out][index])
            answer = self._expert(game, plan)
            scene = self.engine.scene(game, ())
            prompt = _write(scene, self.options, f"{scene.text}\ntask: {game.goal}")
            self.examples[held_out, index] = Example(prompt, game, answer)
        return self.examples[held_out, index]

    def _read(self, path: Path) -> tuple[Game, tuple[str, ...]]:
        game = _read_game(path)
        try:
            return game, self.engine.plan(game)
        except (Exception, SystemExit) as error:  # the translator asserts, raises and exits
            reason = one_line(str(error)) or type(error).__name__
            raise TaskError(
                f"task alfworld: {path}: pddl_problem: expected one of the domain ({reason})"
            ) from error

    def _make(self, held_out: bool, index: int) -> tuple[Game, tuple[str, ...]]:
        """Game `index` of a pool, and the expert's turns."""
        rng = random.Random(f"alfworld {self.options.seed} {held_out} {index}")
        for _ in range(1000):
            game = make_game(rng, self.options)
            if game is None or game.is_held_out != held_out:
                continue
            plan = self.engine.plan(game)
            if 0 < len(plan) <= self.options.max_turns:
                return game, plan
        raise TaskError(
            "task alfworld: expected a game that its expert solves in max_turns="
            f"{self.options.max_turns}, found none in 1000 of the kinds {self.options.kinds}"
        )

    def _expert(self, game: Game, plan: tuple[str, ...]) -> tuple[str, ...] | None:
        """The plan, preceded by looks at other places where the object might have been.

        Imitating the bare plan teaches to guess the place, and nothing for when it was wrong.
        """
        rng = random.Random(game.problem)
        turns: list[str] = []
        unseen = [c[6:] for c in self.engine.scene(game, ()).commands if c.startswith("go to ")]

        def offered(command: str) -> bool:
            return command in self.engine.scene(game, tuple(turns)).commands

        for i, command in enumerate(plan):
            place = command.removeprefix("go to ")
            if place in unseen:
                unseen.remove(place)
                then = " ".join(plan[i + 1 : i + 3])  # perhaps opened first
                found = re.search(rf"take (\S+) \d+ from {place}\b", then)
                likely = [p for p in unseen if found and _may_hide(p, found[1], game.goal)]
                for other in rng.sample(likely, rng.randint(0, len(likely))):
                    unseen.remove(other)
                    turns.append(f"go to {other}")
                    if offered(f"open {other}"):
                        turns.append(f"open {other}")
            if offered(command):  # a look may have opened what the plan opens
                turns.append(command)
        answer = tuple(turns) if len(turns) <= self.options.max_turns else plan
        return answer if 0 < len(answer) <= self.options.max_turns else None


class Chore:
    """One attempt at a game. It keeps the commands that had an effect; the engine replays them."""

    def __init__(self, engine: Engine, game: Game, options: Options) -> None:
        self.engine, self.game, self.options = engine, game, options
        self.done: tuple[str, ...] = ()
        self.turns_left = options.max_turns
        self.reward = 0.0

    def step(self, turn: str) -> str | None:
        if self.turns_left == 0:
            return None
        self.turns_left -= 1
        command = " ".join(turn.lower().split()) if len(turn) <= MAX_TURN else ""
        scene = self.engine.scene(self.game, self.done)
        if command in scene.commands:
            self.done += (command,)
            scene = self.engine.scene(self.game, self.done)
            said = scene.text
        else:
            said = "nothing"
        if scene.won:
            self.reward, self.turns_left = 1.0, 0
        return None if self.turns_left == 0 else _write(scene, self.options, said)


class Engine:
    """textworld's PDDL engine behind a cache: what a game says after some commands.

    One for the process: each would load a copy of a C++ library. A game takes 60 ms to translate
    and a step 5 ms, nearly all of it in the grammar; attempts at a game share their first steps.
    """

    def __init__(self) -> None:
        data = resources.files("alfworld") / "data"
        self.logic = GameLogic(
            (data / "alfred.pddl").read_text("utf-8"), (data / "alfred.twl2").read_text("utf-8")
        )
        self.library = fast_downward.load_lib()
        self.load: Callable[[Game], World] = lru_cache(1024)(
            lambda game: World(self.library, game.problem, self.logic)
        )
        self.scene: Callable[[Game, tuple[str, ...]], Scene] = lru_cache(16384)(self._scene)

    def plan(self, game: Game) -> tuple[str, ...]:
        """Commands that win it, or none."""
        world = self.load(game)
        world.reset()
        return tuple(world.replan(world.infos))

    def _scene(self, game: Game, done: tuple[str, ...]) -> Scene:
        world = self.load(game)
        world.reset()
        actions = world.actions()
        rule, mapping = "#look.feedback#", {}
        for command in done:
            action = actions[command]
            world.apply(action)
            rule, mapping = action.feedback_rule, action.mapping
            actions = world.actions()
        return Scene(
            terse(world.derive(rule, mapping)),
            tuple(sorted(actions.keys() - {"help"})),
            world.check_goal(),
        )


class World(PddlState):
    """The state of a game, which can start again."""

    def __init__(self, library: Any, problem: str, logic: GameLogic) -> None:
        argv = sys.argv  # the translator sets it
        try:
            super().__init__(library, problem, logic)
        finally:
            sys.argv = argv
        self.start = list(self.facts)
        named = {v.name: v.type for fact in self.start for v in fact.arguments}
        self.infos = {name: EntityInfo(name, kind) for name, kind in named.items()}
        demangler = Demangler(game_infos=self.infos)
        for info in self.infos.values():
            info.name = demangler.demangle_alfred_name(info.id)  # pyright: ignore
            info.indefinite = "a"  # pyright: ignore

    def reset(self) -> None:
        self.downward_lib.load_sas(self.sas.encode())
        self.downward_lib.load_sas_replan(self.sas_replan.encode())
        for index in (self._facts, self._vars_by_name, self._vars_by_type, self._var_counts):
            index.clear()
        self.add_facts(self.start)

    def actions(self) -> dict[str, Any]:
        """What can be done now, by command."""
        found = {}
        for action in self.all_applicable_actions():
            # The grammar's own template of this one asks for the name of the place's receptacle.
            to = "go to {r}" if action.name == "gotolocation" else action.command_template
            names = {p.name: self.infos[v.name] for p, v in action.mapping.items()}
            found[to.format(**names)] = action
        return found

    def derive(self, rule: str, mapping: dict[Any, Any]) -> str:
        """The grammar's text of what was done."""
        context = {
            "state": self,
            "facts": list(self.facts),
            "variables": {p.name: self.infos[v.name] for p, v in mapping.items()},
            "mapping": mapping,
            "entity_infos": self.infos,
        }
        return self._logic.grammar.derive(rule, context)


@cache
def engine() -> Engine:
    return Engine()


def terse(text: str) -> str:
    """Lower case, on one line, without articles and what every text says."""
    text = " ".join(text.lower().split())
    text = text.removeprefix("you are in the middle of a room. looking quickly around you, ")
    return re.sub(r"\b(you|the|a|and) ", "", text)


def _write(scene: Scene, options: Options, said: str) -> str:
    listed = f"commands: {', '.join(scene.commands)}\n" if options.list_commands else ""
    return f"{said}\n{listed}"


@dataclass(frozen=True)
class FloorPlan:
    receptacles: dict[str, list[str]]  # type -> ids, such as Cabinet|+00.68|+00.50|-02.20
    objects: list[str]  # types


@cache
def floor_plans(room: str) -> tuple[FloorPlan, ...]:
    """The wheel's plans of a kind of room."""
    layouts = resources.files("alfworld") / "gen" / "layouts"
    small = {name for names in VAL_RECEPTACLE_OBJECTS.values() for name in names}
    plans = []
    for number in SCENE_TYPE[room]:
        ids = json.loads((layouts / f"FloorPlan{number}-openable.json").read_text("utf-8"))
        types = json.loads((layouts / f"FloorPlan{number}-objects.json").read_text("utf-8"))
        receptacles: dict[str, list[str]] = {}
        for name in sorted(ids):
            if _type(name) in VAL_RECEPTACLE_OBJECTS:
                receptacles.setdefault(_type(name), []).append(name)
        plans.append(FloorPlan(receptacles, sorted({t for t in types if t in small or t == LAMP})))
    return tuple(plans)


def _type(name: str) -> str:
    """Cabinet of Cabinet|+00.68|+00.50|-02.20, SinkBasin of Sink|-01.90|+00.97|-01.50|SinkBasin."""
    parts = name.split("|")
    return parts[-1] if parts[-1].isalpha() else parts[0]


def _may_hide(place: str, thing: str, goal: str) -> bool:
    """Might a thing be found here by chance, before the goal that asks for it is reached?"""
    kind = place.split()[0]
    held = (names for r, names in VAL_RECEPTACLE_OBJECTS.items() if r.lower() == kind)
    return thing in map(str.lower, next(held, ())) and kind != goal.split()[-1]


def make_game(rng: random.Random, options: Options) -> Game | None:
    """A game drawn by `rng`; None when what was drawn leaves no goal of its kind."""
    kind = KINDS[rng.choice(options.kinds)]
    plan = rng.choice(floor_plans(rng.choice(kind.rooms)))
    able = VAL_ACTION_OBJECTS[kind.ability] if kind.ability else plan.objects
    targets = [t for t in plan.objects if t in able and t != LAMP]
    if not targets or (kind.tool and kind.tool not in plan.receptacles):
        return None
    target = rng.choice(targets)
    sources = [t for t in plan.receptacles if target in VAL_RECEPTACLE_OBJECTS[t]]
    if kind.lamp:
        goals = [t for t in plan.receptacles if t in LAMP_STANDS and LAMP in plan.objects]
    else:
        goals = [t for t in sources if t != kind.tool]
    if not goals:
        return None
    goal = rng.choice(goals)
    sources = [t for t in sources if t != goal]
    if not sources:
        return None
    sources = rng.choices(sources, k=kind.copies)

    needed = [t for t in (goal, *sources, kind.tool) if t]
    kept = [rng.choice(plan.receptacles[t]) for t in dict.fromkeys(needed)]
    rest = [r for names in plan.receptacles.values() for r in names if r not in kept]
    kept += rng.sample(rest, min(len(rest), options.receptacles - len(kept)))
    others = {
        t: holders
        for t in plan.objects
        if t not in (target, LAMP)
        and (holders := [r for r in kept if t in VAL_RECEPTACLE_OBJECTS[_type(r)]])
    }
    filled = min(len(others), max(0, options.objects - kind.copies))
    where = {
        f"{target}|{i}": rng.choice([r for r in kept if _type(r) == source])
        for i, source in enumerate(sources)
    } | {f"{t}|0": rng.choice(others[t]) for t in rng.sample(list(others), filled)}
    if kind.lamp:
        where[f"{LAMP}|0"] = rng.choice([r for r in kept if _type(r) == goal])
    names = {"obj": target, "recep": goal, "toggle": LAMP}
    words = gdict[kind.goal]["templates"][0].format(**names).lower()
    return Game(words, write_problem(kept, where, gdict[kind.goal]["pddl"].format(**names)))


def write_problem(receptacles: list[str], where: dict[str, str], goal: str) -> str:
    """PDDL, as alfworld's generator writes it: each object of `where` in its receptacle."""
    types = {"rtype": set(RULE_TYPES["rtype"]), "otype": set(RULE_TYPES["otype"])}
    things, facts = ["agent1 # agent", "start # location"], ["atLocation agent1 start"]
    for i, name in enumerate(receptacles):
        kind = _type(name)
        types["rtype"].add(kind)
        things += [f"{name} # receptacle", f"loc{i} # location"]
        facts += [f"receptacleType {name} {kind}Type", f"receptacleAtLocation {name} loc{i}"]
        if kind in OPENABLE_CLASS_SET:
            facts.append(f"openable {name}")
    for name, receptacle in where.items():
        kind = _type(name)
        types["otype"].add(kind)
        things.append(f"{name} # object")
        facts += [
            f"objectType {name} {kind}Type",
            f"inReceptacle {name} {receptacle}",
            f"objectAtLocation {name} loc{receptacles.index(receptacle)}",
        ]
        facts += [f"{a.lower()} {name}" for a, able in VAL_ACTION_OBJECTS.items() if kind in able]
        if kind != LAMP:
            facts.append(f"pickupable {name}")
        if kind in MOVABLE_RECEPTACLES_SET:
            facts.append(f"isReceptacleObject {name}")
    for group, kinds in types.items():
        things += [f"{kind}Type # {group}" for kind in sorted(kinds)]
    facts += [
        f"canContain {r}Type {o}Type"
        for r in sorted(types["rtype"])
        for o in sorted(types["otype"] & VAL_RECEPTACLE_OBJECTS[r])
    ]
    text = "\n".join(things) + "\n)\n(:init\n" + "".join(f"({fact})\n" for fact in facts)
    text = f"(define (problem chore)\n(:domain alfred)\n(:objects\n{text})\n{goal}"
    return text.translate(PDDL_NAMES).replace("#", "-")


def _find_games(folder: str) -> list[list[Path]]:
    """Game files under a folder: those of the training pool, and those held out."""
    pools: list[list[Path]] = [[], []]
    for path in sorted(Path(folder).rglob("game.tw-pddl")):
        pools[_read_game(path).is_held_out].append(path)
    if not any(pools):
        raise TaskError(f"task alfworld: {folder}: expected game.tw-pddl files, found none")
    return pools


def _read_game(path: Path) -> Game:
    try:
        data = json.loads(path.read_text("utf-8"))
    except json.JSONDecodeError as error:
        raise TaskError(
            f"task alfworld: {path}, line {error.lineno}: expected JSON, got {error.msg}"
        ) from error
    except (OSError, ValueError, RecursionError) as error:
        raise TaskError(f"task alfworld: {path}: expected JSON in UTF-8 ({error})") from error
    wanted = ("pddl_problem", "grammar")
    if not isinstance(data, dict) or not all(isinstance(data.get(name), str) for name in wanted):
        raise TaskError(f"task alfworld: {path}: expected an object with the texts {wanted}")
    goal = re.search(r"Your task is to: (.*)\.\"", data["grammar"])
    if goal is None:
        raise TaskError(f"task alfworld: {path}: grammar: expected 'Your task is to: ...'")
    return Game(" ".join(goal[1].lower().split()), data["pddl_problem"])
