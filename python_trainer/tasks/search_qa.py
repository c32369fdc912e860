"""The `search_qa` family: multi-hop questions, and a search tool over passages that answer them.

After the search agents of Search-R1 (Jin et al. 2025, arXiv 2503.09516), in a terse dialect. A turn
is `search <words>`, answered with the `top_k` best passages by BM25, or `answer <text>`, which ends
the episode and is scored as HotpotQA's official evaluation scores it (token F1, or exact match).
After `max_turns` turns it is over, with a reward of 0.

By default the passages are a generated knowledge base, one fact each, and the questions compose its
relations. A passage may put a relation in another word than the question (`wordings=1`: never). The
expert cannot know, and tries the question's word first:

    who is the mayor of the seat of the employer of mira oak?
    search employer of mira oak          the employer of mira oak is amber mill.
    search seat of amber mill            the founder of amber mill is uma reed.
    search headquarters of amber mill    the headquarters of amber mill is north ford.
    search mayor of north ford           the mayor of north ford is silas hart.
    answer silas hart

No fact can be guessed: each relation is a random bijection, so that every entity is the value of it
once, and every word of the names belongs to two entities. The pools share the facts (a held-out
question asks for another chain of them), so that what is learned is to search.

`data` takes real questions instead: the paragraphs of a HotpotQA file are then the corpus, and the
expert searches for the titles of the supporting facts.

Left out: thinking aloud between the turns, dense retrieval, questions of comparison (yes or no) in
the generated base, and the score of the supporting facts.
"""

from __future__ import annotations

import itertools
import json
import random
import re
import reprlib
import string
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import bm25s

from ..config import ConfigError, TaskError
from . import Example, check_integers, check_paths, is_held_out, options_of
from .bm25 import BM25

MAX_TURN = 2000  # characters; a longer turn is not understood
USAGE = "say search or answer."
NOTHING = "nothing found."


@dataclass(frozen=True)
class Kind:
    """One kind of entity; its names are pairs of a first and a second word."""

    ask: str
    relations: dict[str, tuple[str, str]]  # relation -> its other wording, kind of its value
    firsts: str  # words
    seconds: str


# No relation joins a kind to itself: BM25 sees a bag of words, to which "the teacher of x is y" and
# "the teacher of y is x" are the same passage.
KINDS = {
    "person": Kind(
        "who is",
        {
            "employer": ("workplace", "company"),
            "home": ("residence", "town"),
            "birthplace": ("origin", "town"),
        },
        "ada bram cleo dora ezra finn greta hugo ines jonas kira lev "
        "mira nils olga pia quinn rosa silas tess uma vera wim zoe",
        "abbot baker carver draper elder fisher gray hart irving jansen keller lund "
        "mason nolan oak palmer quist reed snow thorne ullman vogel weaver young",
    ),
    "company": Kind(
        "what is",
        {
            "owner": ("proprietor", "person"),
            "founder": ("creator", "person"),
            "seat": ("headquarters", "town"),
        },
        "amber bronze copper denim ebony flax golden honey indigo jade khaki linen "
        "maroon navy ochre pearl quartz ruby silver topaz umber violet willow zinc",
        "alliance bakery brewery cannery dairy estate foundry garage hotel institute joinery kiln "
        "library mill nursery observatory press quarry refinery shipyard tannery union vineyard "
        "works",
    ),
    "town": Kind(
        "where is",
        {
            "mayor": ("governor", "person"),
            "doctor": ("physician", "person"),
            "sponsor": ("patron", "company"),
        },
        "ash birch cedar deer eagle fox goose hawk iron juniper kite lower "
        "maple north otter pine quail raven stone tall upper viper west yellow",
        "abbey bridge castle dale end field glen harbor island junction knoll landing "
        "meadow neck orchard point ridge shore temple vale well bay creek ford",
    ),
}


GENERATED = ("min_hops", "max_hops", "wordings", "kb_seed")  # options of the generated base


@dataclass(frozen=True)
class Options:
    """Settings of the family."""

    metric: str = "f1"  # or "em", exact match
    top_k: int = 1  # passages per search
    max_turns: int = 8
    min_hops: int = 1  # generated questions: facts to chain
    max_hops: int = 3
    wordings: int = 2  # generated passages: words for a relation
    kb_seed: int = 0
    data: str | None = None  # path of a HotpotQA-format file; no generated questions then

    def __post_init__(self) -> None:
        if self.metric not in ("f1", "em"):
            raise ConfigError(f"task_options.metric: expected f1 or em, got {self.metric!r}")
        # At 4 hops there are 11,000 questions.
        check_integers(self, top_k=(1, 20), max_turns=(1, 100), min_hops=(1, 4))
        check_integers(self, max_hops=(self.min_hops, 4), wordings=(1, 2), kb_seed=(0, 2**63))
        check_paths(self, "data")
        if self.data is None and self.max_turns <= self.wordings * self.max_hops:
            raise ConfigError(
                "task_options.max_turns: expected more than wordings * max_hops "
                f"({self.wordings * self.max_hops}; the expert's searches), got {self.max_turns}"
            )


class SearchQATask:
    """Questions over one corpus; see `Options`."""

    exact = False  # many ways lead to the answer, and a part of it earns a part

    def __init__(self, options: dict[str, Any]) -> None:
        self.options = options_of(Options, options)
        for name in options:
            if self.options.data is not None and name in GENERATED:
                raise ConfigError(f"task_options.{name}: expected none beside data, got one")
        if self.options.data is None:
            self.name = "search_qa/kb"
            self.index, strata = generate(self.options)
        else:
            self.name = "search_qa/data"
            passages, examples = load(self.options.data, self.options.max_turns)
            self.index, strata = Index(passages), [examples]
        # [held out][hops]: a question belongs to a pool by a hash of its text.
        self.pools: list[list[list[Example]]] = [
            [[e for e in stratum if is_held_out(e.prompt) == held_out] for stratum in strata]
            for held_out in (False, True)
        ]

    def sample(self, n: int, seed: str, held_out: bool = False) -> list[Example]:
        """`n` questions, as many of each number of hops; none twice before all came once."""
        rng = random.Random(seed)
        pools = self.pools[held_out]
        if not all(pools):
            pool = "held-out" if held_out else "training"
            raise TaskError(f"task {self.name}: expected {n} {pool} questions, found none")
        each = -(-n // len(pools))
        strata = [rng.sample(pool, min(each, len(pool))) for pool in rng.sample(pools, len(pools))]
        turns = [itertools.cycle(stratum) for stratum in strata]
        return [next(turns[i % len(turns)]) for i in range(n)]

    def begin(self, example: Example) -> SearchEpisode:
        return SearchEpisode(self.index, self.options, gold=example.item)


class SearchEpisode:
    """One attempt at a question whose answer is `gold`."""

    def __init__(self, index: Index, options: Options, gold: str) -> None:
        self.index, self.options, self.gold = index, options, gold
        self.turns_left = options.max_turns
        self.reward = 0.0

    def step(self, turn: str) -> str | None:
        if self.turns_left == 0:
            return None
        self.turns_left -= 1
        words = turn.split(maxsplit=1) if len(turn) <= MAX_TURN else []
        verb, text = (*words, "", "")[:2]
        if verb == "answer":
            self.turns_left = 0
            self.reward = (exact_match if self.options.metric == "em" else f1)(text, self.gold)
        if self.turns_left == 0:
            return None
        if verb != "search":
            return USAGE
        return "\n".join(self.index.search(text, self.options.top_k)) or NOTHING


class Index:
    """A search engine over passages."""

    def __init__(self, passages: list[str]) -> None:
        self.passages = passages
        words = _words(passages)
        if not any(words):
            raise TaskError("task search_qa: expected passages with words to find, got none")
        self.bm25 = BM25(words)

    def search(self, query: str, k: int) -> list[str]:
        """At most `k` passages that share a word with `query`, best first."""
        return [self.passages[i] for i in self.bm25.best(_words([query])[0], k)]


def _words(texts: list[str]) -> list[list[str]]:
    words = bm25s.tokenize(texts, stopwords="en", return_ids=False, show_progress=False)
    assert isinstance(words, list)  # because return_ids=False
    return words


# Scores, as in HotpotQA's hotpot_evaluate_v1.py (after SQuAD's).

_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLES = re.compile(r"\b(?:a|an|the)\b")
_CLOSED = {"yes", "no", "noanswer"}  # answers that earn nothing by a shared word


def normalise(text: str) -> str:
    """Lower case; no ASCII punctuation, then no articles, then single spaces."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_NO_PUNCTUATION)).split())


def exact_match(prediction: str, gold: str) -> float:
    return float(normalise(prediction) == normalise(gold))


def f1(prediction: str, gold: str) -> float:
    """Harmonic mean of precision and recall over the words, counted with their repetitions.

    Equal texts score 1 even where normalisation leaves no word ("The The"); the official script,
    which divides by the number of words, gives those 0.
    """
    prediction, gold = normalise(prediction), normalise(gold)
    if prediction == gold:
        return 1.0
    if prediction in _CLOSED or gold in _CLOSED:
        return 0.0
    said, right = prediction.split(), gold.split()
    shared = (Counter(said) & Counter(right)).total()
    return 2 * shared / (len(said) + len(right))


# The generated knowledge base.


def generate(options: Options) -> tuple[Index, list[list[Example]]]:
    """The passages, and all questions by their number of hops."""
    rng = random.Random(f"search_qa {options.kb_seed}")
    names = {kind: _names(KINDS[kind], rng) for kind in KINDS}
    kind_of = {name: kind for kind in names for name in names[kind]}
    facts: dict[tuple[str, str], str] = {}
    passages: dict[tuple[str, str], str] = {}
    for kind in KINDS:
        for relation, (other, target) in KINDS[kind].relations.items():
            values = rng.sample(names[target], len(names[target]))
            for name, value in zip(names[kind], values, strict=True):
                word = rng.choice([relation, other][: options.wordings])
                facts[relation, name] = value
                passages[relation, name] = f"the {word} of {name} is {value}."
    index = Index(rng.sample(list(passages.values()), len(passages)))

    def searches(relation: str, name: str) -> list[str]:
        """What the expert tries, in this order, until the passage is found."""
        other, _ = KINDS[kind_of[name]].relations[relation]
        queries = [f"{word} of {name}" for word in (relation, other)]
        found = passages[relation, name] in index.search(queries[0], options.top_k)
        return [f"search {query}" for query in (queries[:1] if found else queries)]

    turns = {fact: searches(*fact) for fact in facts}

    def example(chain: tuple[str, ...]) -> Example:
        """`chain`: entity, relation, entity, relation, ..., entity."""
        start, relations, answer = chain[0], chain[1::2], chain[-1]
        asked = " of ".join(f"the {relation}" for relation in reversed(relations))
        prompt = f"{KINDS[kind_of[answer]].ask} {asked} of {start}?"
        path = zip(relations, chain[::2], strict=False)  # the last entity is the answer
        expert = (*(turn for fact in path for turn in turns[fact]), f"answer {answer}")
        return Example(prompt, item=answer, answer=expert)

    strata, chains = [], [(name,) for name in kind_of]
    for _ in range(options.max_hops):
        chains = [
            (*chain, relation, facts[relation, chain[-1]])
            for chain in chains
            for relation in KINDS[kind_of[chain[-1]]].relations
            if facts[relation, chain[-1]] not in chain  # no way back: it would be a shorter one
        ]
        strata.append([example(chain) for chain in chains])
    return index, strata[options.min_hops - 1 :]


def _names(kind: Kind, rng: random.Random) -> list[str]:
    """Two names to each word: first i goes with seconds i and i + 1 of two shuffled rings."""
    firsts, seconds = (rng.sample(words.split(), 24) for words in (kind.firsts, kind.seconds))
    rings = zip(firsts, seconds, seconds[1:] + seconds[:1], strict=True)
    return [f"{first} {second}" for first, *pair in rings for second in pair]


# Questions in HotpotQA's format.


def load(path: str, max_turns: int) -> tuple[list[str], list[Example]]:
    """Passages ("title: paragraph") and questions of a HotpotQA-format file.

    The file is a JSON list, or has one JSON object per line. Fields read: `question`, `answer`,
    `context` ([[title, [sentence, ...]], ...]) and, where it is there, `supporting_facts`
    ([[title, sentence number], ...]).

    Raises:
        TaskError: one line that names the file and the line (in a JSON list: the item).
    """
    passages: dict[str, None] = {}  # an ordered set: questions share paragraphs
    examples = []
    for where, item in _items(path):
        question, answer, titles = _checked(where, item)
        for title, sentences in item["context"]:
            passages[_one_line(f"{title}: {''.join(sentences)}")] = None
        turns = (*(f"search {title}" for title in titles), f"answer {answer}")
        is_playable = len(turns) <= max_turns and max(map(len, turns)) <= MAX_TURN
        expert = turns if titles and is_playable else None
        examples.append(Example(question, item=answer, answer=expert))
    return list(passages), examples


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _items(path: str) -> Iterator[tuple[str, Any]]:
    """(place in the file, item) for each question."""
    try:
        raw = Path(path).read_bytes()
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise _wrong(f"{path}:{line}", "UTF-8", f"byte {error.object[error.start]:#04x}") from error
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        raise _wrong(path, "a readable file", str(error)) from error
    if not text.strip():
        raise _wrong(f"{path}:1", "questions", "an empty file")
    if text.lstrip().startswith("["):
        items = _parse(text, path, first_line=1)
        yield from ((f"{path}: item {i}", item) for i, item in enumerate(items, start=1))
        return
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield f"{path}:{number}", _parse(line, path, first_line=number)


def _parse(text: str, path: str, first_line: int) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        where = f"{path}:{first_line + error.lineno - 1}"
        raise _wrong(where, "JSON", f"{error.msg} at column {error.colno}") from error
    except (ValueError, RecursionError) as error:  # a huge integer; thousands of brackets
        raise _wrong(f"{path}:{first_line}", "JSON", str(error)) from error


def _checked(where: str, item: Any) -> tuple[str, str, list[str]]:
    """Question, answer and the titles of the supporting facts, each once, in their order."""
    if not isinstance(item, dict):
        raise _wrong(where, "an object", reprlib.repr(item))
    for name in ("question", "answer", "context"):
        if name not in item:
            raise _wrong(where, f"a field {name!r}", f"only {reprlib.repr(sorted(item))}")
    for name in ("question", "answer"):
        if not isinstance(item[name], str) or not item[name].strip():
            raise _wrong(where, f"text in {name!r}", reprlib.repr(item[name]))
    match item["context"]:
        case [_, *_] as context if all(map(_is_paragraph, context)):
            pass
        case context:
            raise _wrong(where, "context [[title, [sentence, ...]], ...]", reprlib.repr(context))
    match item.get("supporting_facts", []):
        case [*facts] if all(isinstance(f, list) and f and isinstance(f[0], str) for f in facts):
            titles = dict.fromkeys(_one_line(fact[0]) for fact in facts)
        case facts:
            raise _wrong(where, "supporting_facts [[title, number], ...]", reprlib.repr(facts))
    return _one_line(item["question"]), _one_line(item["answer"]), list(titles)


def _is_paragraph(value: Any) -> bool:
    match value:
        case [str(), [*sentences]]:
            return all(isinstance(sentence, str) for sentence in sentences)
        case _:
            return False


def _wrong(where: str, expected: str, got: str) -> TaskError:
    return TaskError(f"task search_qa: {where}: expected {expected}, got {_one_line(got)}")
