"""The search_qa family: generated and real questions, the search tool, and the score of answers."""

import json
import random
import re

import pytest

from python_trainer.config import ConfigError, TaskError
from python_trainer.tasks import make_task, play
from python_trainer.tasks.search_qa import KINDS, NOTHING, USAGE, f1, normalise

PIECES = re.compile(r" ?[A-Za-z]+|.", re.DOTALL)  # of the trainer's word-level tokenizer


@pytest.fixture(scope="module")
def task():
    return make_task("search_qa", {})


def names_in(text):
    """Two-word names of the generated base."""
    firsts = "|".join("|".join(kind.firsts.split()) for kind in KINDS.values())
    seconds = "|".join("|".join(kind.seconds.split()) for kind in KINDS.values())
    return re.findall(rf"\b(?:{firsts}) (?:{seconds})\b", text)


# The generated questions.


@pytest.mark.parametrize("held_out", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"metric": "em", "top_k": 2, "kb_seed": 7},
        {"min_hops": 4, "max_hops": 4, "max_turns": 9},
        {"wordings": 1, "max_hops": 2, "max_turns": 3},
    ],
)
def test_the_expert_scores_one_and_says_only_what_it_has_read(options, held_out):
    task = make_task("search_qa", options)
    for example in task.sample(100, "0", held_out):
        assert example.answer is not None
        reward, written = play(task, example, example.answer)
        assert reward == 1.0
        assert len(written) == len(example.answer) - 1
        hops = example.prompt.count(" of ")
        assert options.get("min_hops", 1) <= hops <= options.get("max_hops", 3)
        entities = {name for turn in example.answer for name in names_in(turn)}
        assert len(entities) == hops + 1  # no chain comes back
        read = example.prompt
        for turn, observation in zip(example.answer, [*written, ""], strict=True):
            (name,) = names_in(turn)
            assert name in read
            read += "\n" + observation


def test_answers_are_what_the_passages_say(task):
    """Solve the questions by reading every passage, without the environment."""
    words = {r: (r, kind.relations[r][0]) for kind in KINDS.values() for r in kind.relations}
    said = dict(re.fullmatch(r"the (.+) is (.+)\.", p).groups() for p in task.index.passages)
    assert len(said) == len(task.index.passages) == 432
    for example in task.sample(300, "1"):
        _, _, *relations, start = re.findall(
            r"who|what|where|is|\w+ \w+(?=\?)|\w+(?= of)", example.prompt
        )
        entity = start
        for relation in reversed(relations):
            (entity,) = (said[k] for w in words[relation] if (k := f"{w} of {entity}") in said)
        assert example.item == entity


def test_every_number_of_hops_is_drawn_alike(task):
    hops = [example.prompt.count(" of ") for example in task.sample(300, "2")]
    assert [hops.count(n) for n in (1, 2, 3)] == [100, 100, 100]
    assert len({task.sample(1, str(seed))[0].prompt.count(" of ") for seed in range(30)}) == 3


def test_every_relation_must_be_looked_for_in_both_wordings(task):
    """A miss shows another passage, as a rule; half of the facts are in the other word."""
    one_hop = [e for e in task.sample(4000, "0") if e.prompt.count(" of ") == 1]
    experts = {e.prompt: e.answer for e in one_hop}
    for relation in (relation for kind in KINDS.values() for relation in kind.relations):
        searches = [len(t) - 1 for p, t in experts.items() if f"the {relation} of" in p]
        assert set(searches) == {1, 2}
        assert 1.2 < sum(searches) / len(searches) < 1.7


def test_the_question_is_not_enough():
    """The same question has another answer in another base, and no answer is frequent."""
    bases = [make_task("search_qa", {"kb_seed": seed}) for seed in range(2)]
    answers = [
        {e.prompt: e.item for e in b.sample(4000, "0") if e.prompt.count(" of ") == 1}
        for b in bases
    ]
    shared = answers[0].keys() & answers[1].keys()
    assert len(shared) > 20
    assert sum(answers[0][question] == answers[1][question] for question in shared) <= 3
    for relation in ("employer", "owner", "mayor"):
        values = [v for q, v in answers[0].items() if f"the {relation} of" in q]
        assert len(values) == len(set(values)) > 30


def test_policies_that_guess_earn_little(task):
    rng = random.Random(0)
    examples = task.sample(600, "3")
    vocabulary = sorted({w for p in task.index.passages for w in re.findall("[a-z]+", p)})
    names = {e.prompt.split()[0]: [] for e in examples}
    for example in examples:
        names[example.prompt.split()[0]].append(example.item)

    def mean(policy):
        return sum(play(task, e, [policy(e) for _ in range(8)])[0] for e in examples) / len(
            examples
        )

    def random_words(example):
        words = rng.choices([*vocabulary, "search", "answer"], k=3)
        return " ".join([rng.choice(["search", "answer", words[0]]), *words[1:]])

    assert mean(random_words) < 0.03
    assert mean(lambda e: f"answer {rng.choice(names[e.prompt.split()[0]])}") < 0.08  # right kind
    assert mean(lambda e: "answer " + " ".join(vocabulary)) < 0.08  # all words at once
    assert mean(lambda e: f"search {names_in(e.prompt)[0]}") == 0.0


def test_the_texts_suit_a_small_model(task):
    examples, pieces, known = task.sample(600, "4"), 0, set()
    for example in examples:
        _, written = play(task, example, example.answer)
        texts = [example.prompt, *written, *example.answer]
        assert all(text.isascii() and text == text.lower() for text in texts)
        found = [piece for text in texts for piece in PIECES.findall(text)]
        pieces += len(found)
        known |= set(found)
    assert pieces / len(examples) < 100
    assert len(known) < 200
    words = [w for k in KINDS.values() for w in (*k.firsts.split(), *k.seconds.split())]
    assert len(words) == len(set(words)) == 144  # a name says its kind


def test_sampling_is_a_function_of_the_seed_and_of_the_base(task):
    again, other = make_task("search_qa", {}), make_task("search_qa", {"kb_seed": 1})
    assert task.sample(30, "a") == again.sample(30, "a")
    assert task.sample(30, "a") != task.sample(30, "b")
    assert (
        sorted(task.index.passages) == sorted(again.index.passages) != sorted(other.index.passages)
    )
    assert task.sample(0, "a") == []


def test_pools_are_disjoint_and_used_up_before_a_question_comes_twice(task):
    train = [e.prompt for e in task.sample(1000, "a")]
    held_out = [e.prompt for e in task.sample(150, "a", held_out=True)]
    assert not set(train) & set(held_out)
    assert len(set(held_out)) == 150
    assert len(task.sample(2000, "a", held_out=True)) == 2000  # more than there are


# The environment.


def test_an_answer_ends_the_episode_and_is_final(task):
    example = task.sample(1, "5")[0]
    episode = task.begin(example)
    assert episode.step(f"  answer\tThe {example.item.upper()}!  ") is None
    assert episode.reward == 1.0
    assert episode.step("answer nobody") is None
    assert episode.reward == 1.0


def test_turns_run_out(task):
    example = task.sample(1, "6")[0]
    reward, written = play(task, example, ["search", *["look"] * 6, *example.answer])
    assert (reward, written) == (0.0, [NOTHING, *[USAGE] * 6])
    reward, written = play(task, example, [*["look"] * 7, f"answer {example.item}"])
    assert (reward, len(written)) == (1.0, 7)


def test_a_turn_that_is_too_long_is_not_understood(task):
    example = task.sample(1, "5")[0]
    long = " ".join(["ada"] * 600)
    assert play(task, example, [f"search {long}", f"answer {long}"])[1] == [USAGE, USAGE]


def test_episodes_do_not_share_state(task):
    examples = task.sample(2, "7")
    first, second = map(task.begin, examples)
    first.step(f"answer {examples[0].item}")
    assert (first.reward, second.reward) == (1.0, 0.0)
    assert task.begin(examples[0]).reward == 0.0


def test_exact_match_gives_no_partial_credit(task):
    strict, example = make_task("search_qa", {"metric": "em"}), task.sample(1, "8")[0]
    half = [f"answer {example.item.split()[0]}"]
    assert play(strict, example, half)[0] == 0.0
    assert play(task, example, half)[0] == pytest.approx(2 / 3)


def test_a_search_finds_the_best_passages_in_order():
    task = make_task("search_qa", {"top_k": 3, "wordings": 1})
    name = names_in(task.index.passages[0])[0]
    episode = task.begin(task.sample(1, "9")[0])
    found = episode.step(f"search {name}").splitlines()
    assert len(found) == 3
    assert all(name in passage for passage in found)
    assert (
        found == [p for p in task.index.passages if name in p][:3]
    )  # ties: in order of the corpus


@pytest.mark.parametrize(
    "turn",
    [
        "", " ", "\n", "search", "answer", "search ", "answer \n", "SEARCH ada", "search\x00ada",
        "\x00\x1b[2J\r\b", "search the of is", "search zzz", "search " + "ada " * 400,
        "answer " + "ada " * 400, "search \ud800 \U0001f600 \u202e", "answer \ud800\udfff",
        "search ١٢٣",
        "search " + "a" * 100_000, "answer " + "a " * 50_000, "[" * 100_000, "\n" * 100_000,
        "search (a+)+$ .* \\ %s {0}", "answer None", "search search search", "answer\u2028x",
    ],
)  # fmt: skip
def test_hostile_turns_earn_nothing_and_never_raise(task, turn):
    for example in task.sample(3, "10"):
        episode = task.begin(example)
        for _ in range(9):
            text = episode.step(turn)
            assert text is None or 0 < len(text) < 200
            assert episode.reward <= 0.01
        assert text is None


# The score.


@pytest.mark.parametrize(
    ("said", "gold", "score"),
    [
        ("The cat  sat.", "a Cat sat", 1.0),
        ("cat sat down", "the cat sat", 0.8),
        ("oak oak oak", "mira oak", 0.4),  # a word counts as often as it is in both
        ("U.S. state-run", "us staterun", 1.0),
        ("dog", "cat", 0.0),
        ("", "cat", 0.0),
        ("yes", "Yes.", 1.0),
        ("yes it is", "yes", 0.0),
        ("no", "no way", 0.0),
        ("noanswer", "noanswer here", 0.0),
        ("yes sir", "yes ma'am", 0.5),  # neither is a bare yes
        ("the the", "The The", 1.0),
    ],
)
def test_f1_as_in_hotpotqas_evaluation(said, gold, score):
    assert f1(said, gold) == pytest.approx(score)
    assert f1(gold, said) == pytest.approx(score)


def test_normalisation_drops_punctuation_before_articles():
    assert normalise(" An 'apple', a-the THE\tpie") == "apple athe pie"


# Options.


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hops": 2}, "task_options: expected metric, top_k, .*, got 'hops'"),
        ({"metric": "bleu"}, "metric: expected f1 or em, got 'bleu'"),
        ({"top_k": 0}, r"top_k: expected an integer in 1..20, got 0"),
        ({"top_k": True}, "top_k: expected an integer .*, got True"),
        ({"max_turns": 2.5}, "max_turns: expected an integer .*, got 2.5"),
        ({"max_turns": 6}, r"max_turns: expected more than wordings \* max_hops \(6; .*, got 6"),
        ({"max_hops": 5}, r"max_hops: expected an integer in 1..4, got 5"),
        ({"min_hops": 3, "max_hops": 2}, r"max_hops: expected an integer in 3..4, got 2"),
        ({"wordings": 3}, r"wordings: expected an integer in 1..2, got 3"),
        ({"kb_seed": "x"}, "kb_seed: expected an integer .*, got 'x'"),
        ({"data": 3}, "data: expected a path, got 3"),
        ({"data": "x.json", "max_hops": 2}, "max_hops: expected none beside data, got one"),
    ],
)
def test_wrong_options_are_one_line(options, message):
    with pytest.raises(ConfigError, match=message) as caught:
        make_task("search_qa", options)
    assert "\n" not in str(caught.value)


# Files in HotpotQA's format.


def question(i, **changes):
    item = {
        "_id": f"id{i}",
        "question": f"Where was the\u2028author of Book{i} born?",
        "answer": f"Town{i}",
        "supporting_facts": [[f"Book{i}", 0], [f"Author{i}", 0], [f"Book{i}", 1]],
        "context": [
            [f"Book{i}", [f"Book{i} was written by Author{i}.", " It is long."]],
            [f"Author{i}", [f"Author{i} was born in Town{i}."]],
            ["Shared", ["A paragraph of many questions."]],
        ],
    } | changes
    return {name: value for name, value in item.items() if value is not None}


def write(path, text):
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return {"data": str(path)}


@pytest.mark.parametrize("lines", [False, True])
def test_real_questions_are_searched_and_answered(tmp_path, lines):
    items = [question(i) for i in range(40)]
    text = json.dumps(items, indent=1)
    if lines:  # a raw U+2028 is no end of a line
        text = (
            "\ufeff" + "\r\n".join(json.dumps(item, ensure_ascii=False) for item in items) + "\n\n"
        )
    task = make_task("search_qa", write(tmp_path / "hotpot.json", text))
    assert len(task.index.passages) == 81
    train, held_out = task.sample(100, "0"), task.sample(100, "0", held_out=True)
    assert len({e.prompt for e in train}) + len({e.prompt for e in held_out}) == 40
    for example in train + held_out:
        i = example.item.removeprefix("Town")
        assert example.prompt == f"Where was the author of Book{i} born?"
        assert example.answer == (f"search Book{i}", f"search Author{i}", f"answer Town{i}")
        reward, written = play(task, example, example.answer)
        assert reward == 1.0
        assert written[1] == f"Author{i}: Author{i} was born in Town{i}."
        assert play(task, example, ["answer yes"])[0] == 0.0


def test_the_expert_is_left_out_where_it_is_not_known_or_too_long(tmp_path):
    items = [question(i, supporting_facts=None) for i in range(20)]
    task = make_task("search_qa", write(tmp_path / "a.json", json.dumps(items)))
    assert {e.answer for e in task.sample(20, "0")} == {None}
    items = [question(i) for i in range(20)]
    options = write(tmp_path / "b.json", json.dumps(items)) | {"max_turns": 2}
    assert {e.answer for e in make_task("search_qa", options).sample(20, "0")} == {None}


def test_too_few_questions_for_two_pools_is_one_line(tmp_path):
    task = make_task("search_qa", write(tmp_path / "one.json", json.dumps([question(0)])))
    with pytest.raises(TaskError, match=r"search_qa/data: expected 3 .* questions, found none"):
        task.sample(3, "0", held_out=bool(task.pools[False][0]))


GOOD = json.dumps(question(0))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "q.json:1: expected questions, got an empty file"),
        (" \n\n", "q.json:1: expected questions, got an empty file"),
        ("[]", "expected passages with words to find, got none"),
        (f"{GOOD}\n{{oops\n", "q.json:2: expected JSON, got .* at column 2"),
        (f"[{GOOD},\n\n {GOOD}", "q.json:3: expected JSON, got"),
        (f"{GOOD}\n\xe9\n".encode("latin-1"), "q.json:2: expected UTF-8, got byte 0xe9"),
        (GOOD.encode("utf-16"), "q.json:1: expected UTF-8, got byte 0xff"),
        ("[" * 100_000, "q.json:1: expected JSON, got .*recursion"),
        ("[" + "9" * 5000 + "]", "q.json:1: expected JSON, got .*digits"),
        (f"{GOOD}\n7", "q.json:2: expected an object, got 7"),
        (f"[{GOOD}, 7]", "q.json: item 2: expected an object, got 7"),
        (json.dumps(question(0, answer=None)), "q.json:1: expected a field 'answer', got only"),
        (json.dumps(question(0, answer=" ")), "q.json:1: expected text in 'answer', got ' '"),
        (json.dumps(question(0, question=["x\ny"])), "q.json:1: expected text in 'question', got"),
        (
            json.dumps(question(0, context=[])),
            r"q.json:1: expected context \[\[title, .*, got \[\]",
        ),
        (json.dumps(question(0, context=[["t", "s"]])), "q.json:1: expected context .*'t', 's'"),
        (json.dumps(question(0, context=[["t", [1]]])), r"q.json:1: expected context .*'t', \[1\]"),
        (json.dumps(question(0, context={"title": []})), "q.json:1: expected context .*, got {'ti"),
        (json.dumps(question(0, supporting_facts=[[]])), "expected supporting_facts .*, got"),
        (json.dumps(question(0, supporting_facts={})), "expected supporting_facts .*, got {}"),
        (json.dumps(question(0, context=[["a", ["the"]]])), "expected passages with words to find"),
    ],
)
def test_malformed_files_are_one_line(tmp_path, text, message):
    with pytest.raises(TaskError, match=message) as caught:
        make_task("search_qa", write(tmp_path / "q.json", text))
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400 + len(str(tmp_path))


@pytest.mark.parametrize("path", ["/nowhere/q.json", "/", "\x00"])
def test_a_file_that_cannot_be_read_is_one_line(path):
    with pytest.raises(TaskError, match="expected a readable file, got"):
        make_task("search_qa", {"data": path})


def test_real_text_with_lone_surrogates_is_taken(tmp_path):
    item = question(0, question="who is \ud800?", answer="x\udfff")
    task = make_task("search_qa", write(tmp_path / "q.json", json.dumps(item)))
    held_out = not task.pools[False][0]
    assert play(task, task.sample(1, "0", held_out)[0], ["answer x\udfff"])[0] == 1.0
