"""The webshop family: pages, goals, the published reward, and the loader of WebShop's files."""

import json
import random
import re
from collections import Counter
from dataclasses import replace

import pytest

from python_trainer.config import ConfigError, TaskError
from python_trainer.tasks import Example, make_task, play
from python_trainer.tasks import webshop as module
from python_trainer.tasks.webshop import (
    KINDS,
    Goal,
    Product,
    Shop,
    WebshopTask,
    purchase_reward,
    type_reward,
)

PIECE = re.compile(r" ?[A-Za-z]+|.", re.DOTALL)


@pytest.fixture(scope="module")
def task():
    return make_task("webshop", {})


@pytest.fixture(scope="module")
def examples(task):
    return task.sample(200, "0") + task.sample(100, "0", held_out=True)


def product(**changes) -> Product:
    shirt = Product(
        asin="1",
        title="soft cotton shirt",
        query="shirt",
        category=frozenset({"clothing", "men", "shirts"}),
        price=25.0,
        attributes=("soft", "cotton", "machine wash"),
        options={"color": ("red", "dark blue"), "size": ("m", "xl")},
        text="with long sleeves",
    )
    return replace(shirt, **changes)


def goal(**changes) -> Goal:
    shirt = Goal(product(), "", "", ("soft", "machine wash"), ("dark blue", "xl"), 30.0)
    return replace(shirt, **changes)


CHOSEN = {"color": "dark blue", "size": "xl"}


# Episodes


def test_transcript_of_the_docstring(task):
    lines = [line[4:] for line in str(module.__doc__).splitlines() if line.startswith("    ")]
    prompt, *lines = lines[: lines.index("> buy") + 1]
    example = next(e for e in task.sample(4000, "docs") if e.item.text in prompt)
    goal = replace(example.item, limit=30.0)
    turns = [line[2:] for line in lines if line.startswith("> ")]
    pages = re.split(r"^> .*\n?", "\n".join(lines) + "\n", flags=re.MULTILINE)
    reward, written = play(task, Example(f"{prompt}\n", goal, None), turns)
    assert (reward, written) == (1.0, pages[1:-1])
    assert task._expert(goal) == tuple(turns)


def test_expert_scores_one(task, examples):
    for example in examples:
        assert 4 <= len(example.answer) <= 8
        assert play(task, example, example.answer)[0] == 1.0
        # ... and not before the last turn.
        assert play(task, example, example.answer[:-1])[0] == 0.0


def test_expert_reads_prices_and_turns_pages(task):
    turns = {turn for e in task.sample(300, "1") for turn in e.answer}
    assert {"click x", "click y", "click z", "click next"} <= turns


def test_expert_goes_back_from_a_product_that_lacks_an_option():
    task = make_task("webshop", {})
    dear = product(asin="0", price=99.0, text="soft shirt red m " * 9)
    close = product(asin="2", options={"color": ("red",)}, text="soft shirt red m " * 3)
    task.shop = Shop([product(), close, dear])
    wanted = goal(attributes=("soft",), options=("red", "m"), keywords="soft shirt red m")
    assert task._expert(wanted) == (
        "search soft shirt red m", "click y", "click back", "click z", "click red", "click m", "buy"
    )  # fmt: skip
    assert task._expert(replace(wanted, options=("red", "xxl"))) is None


def test_always_opening_the_first_result_is_often_wrong(task, examples):
    rewards = [
        play(task, e, [e.answer[0], "click x", *(f"click {o}" for o in e.item.options), "buy"])[0]
        for e in examples
    ]
    assert 0.6 < sum(r == 1.0 for r in rewards) / len(rewards) < 0.9


def test_random_policies_score_low(task, examples):
    rng = random.Random(0)
    words = sorted({w for e in examples for w in re.findall("[a-z]+", e.prompt)})

    def mean(policy):
        total = 0.0
        for example in examples:
            episode = task.begin(example)
            while episode.step(policy(episode)) is not None:
                pass
            total += episode.reward
        return total / len(examples)

    def valid(episode):
        shown = episode.product
        links = ["next", "prev", *episode.links]
        if shown is not None:
            links = ["back", *(v for values in shown.options.values() for v in values)]
        search = "search " + " ".join(rng.choices(words, k=3))
        return rng.choice([search, "buy", *(f"click {link}" for link in links)])

    def babble(episode):
        verb = rng.choice(["search", "click", "buy", ""])
        return " ".join([verb, *rng.choices(words, k=rng.randint(0, 2))])

    assert mean(valid) < 0.03
    assert mean(babble) < 0.03


def test_texts_suit_a_small_vocabulary(task, examples):
    lengths, pieces = [], Counter()
    for example in examples:
        _, written = play(task, example, example.answer)
        seen = PIECE.findall(example.prompt)
        for text in (*example.answer, *written):
            assert text.isascii() and text == text.lower()
            seen += PIECE.findall(text)
        lengths.append(len(seen))
        pieces.update(seen)
    assert sum(lengths) / len(lengths) < 120
    assert len(pieces) < 350


def test_links_of_pages(task):
    episode = task.begin(task.sample(1, "2")[0])
    first = episode.step("search shirt")
    assert first.endswith("or next\n")
    assert episode.step("click prev") == "nothing happens\n"
    second = episode.step("click next")
    assert second != first and second.endswith("or prev next\n")
    assert episode.step("click prev") == first
    page = episode.step("click y")
    shown = episode.product
    assert first.splitlines()[1] == f"{shown.row} y" and page.startswith(shown.row)
    assert episode.step("click x") == "nothing happens\n"  # no results on this page
    value = shown.options["color"][0]
    assert episode.step(f"click {value}") == f"color {value}\n"
    assert episode.step("click back") == first
    episode.step("click y")
    assert episode.chosen == {}  # another visit


@pytest.mark.parametrize("size", [1, 3, 10])
def test_last_page_has_no_next(task, size):
    options = {"max_turns": 99, "page_size": size}
    episode = make_task("webshop", options).begin(task.sample(1, "2")[0])
    page, pages = episode.step("search shirt"), 1
    while "next" in page:
        page, pages = episode.step("click next"), pages + 1
    assert page.endswith("or prev\n")
    assert episode.step("click next") == "nothing happens\n"
    assert size * (pages - 1) < len(episode.found) <= min(size * pages, module.FOUND)
    assert episode.step("search zebra") == "no results\n"


def test_an_option_value_that_two_options_share():
    twice = product(options={"frame": ("oak", "pine"), "top": ("oak", "glass")})
    task = make_task("webshop", {})
    task.shop = Shop([twice])
    episode = task.begin(Example("", goal(), None))
    episode.step("search shirt")
    episode.step("click x")
    assert [episode.step("click oak") for _ in range(2)] == ["frame oak\n", "top oak\n"]


def test_buying_needs_a_product_and_ends_the_episode(task):
    example = task.sample(1, "3")[0]
    episode = task.begin(example)
    assert episode.step("buy") == "nothing happens\n"
    for turn in example.answer[:-1]:
        assert episode.step(turn) is not None
    assert episode.step("buy") is None and episode.reward == 1.0
    assert episode.step("search shirt") is None and episode.reward == 1.0


def test_max_turns_end_the_episode():
    task = make_task("webshop", {"max_turns": 5})
    example = next(e for e in task.sample(50, "0") if e.answer)
    assert play(task, example, example.answer)[0] == 1.0  # buying may be the last turn
    reward, written = play(task, example, ["buy", *example.answer])
    assert reward == 0.0 and len(written) == 4
    tight = make_task("webshop", {"max_turns": 3})
    assert all(e.answer is None for e in tight.sample(5, "0"))


@pytest.mark.parametrize(
    "turn",
    [
        "", " ", "\n", "\0", "click", "click ", "search", "search \u200b", "buy buy", "BUY now",
        "search " + "shirt " * 20_000, "click " + "x" * 100_000, "[" * 100_000, "\x1b[2J\x07",
        "search ﷺ" * 10_000, "click \ud800", "🛒" * 50_000, "search ' OR 1=1 --", "click __class__",
    ],
)  # fmt: skip
def test_hostile_turns_are_answered(task, turn):
    example = task.sample(1, "4")[0]
    for before in ((), example.answer[:1], example.answer[:2]):
        episode = task.begin(example)
        for earlier in before:
            episode.step(earlier)
        page = episode.step(turn)
        assert isinstance(page, str) and len(page) < 2000 and page.isascii()
        assert episode.reward == 0.0


def test_the_end_of_a_long_turn_is_not_read(task):
    episode = task.begin(task.sample(1, "4")[0])
    assert episode.step("search " + "zebra " * 100 + "shirt") == "no results\n"


def test_turns_are_read_leniently(task):
    example = task.sample(1, "5")[0]
    loud = [f"  {turn.upper()}\n" for turn in example.answer]
    assert play(task, example, loud)[0] == 1.0


# Reward


def test_reward_counts_attributes_options_and_price():
    assert purchase_reward(goal(), product(), CHOSEN) == 1.0
    assert purchase_reward(goal(), product(), {}) == 3 / 5
    assert purchase_reward(goal(), product(), {"color": "red", "size": "xl"}) == 4 / 5
    assert purchase_reward(goal(), product(price=30.0), CHOSEN) == 1.0
    assert purchase_reward(goal(), product(price=30.01), CHOSEN) == 4 / 5
    assert purchase_reward(goal(), product(attributes=("soft",)), CHOSEN) == 4 / 5
    assert purchase_reward(goal(attributes=("silk",), options=()), product(), CHOSEN) == 1 / 2


def test_reward_matches_as_published():
    # Attributes: token_set_ratio above 85, or in the product's text.
    assert purchase_reward(goal(attributes=("hand wash",)), product(), CHOSEN) == 3 / 4
    # 85.7, which the public code rounds to 86.
    assert purchase_reward(goal(attributes=("machine washable",)), product(), CHOSEN) == 1.0
    assert purchase_reward(goal(attributes=("wash machine",)), product(), CHOSEN) == 1.0
    assert purchase_reward(goal(attributes=("long sleeve",)), product(), CHOSEN) == 1.0
    # Options: alike, but sizes equal.
    assert purchase_reward(goal(options=("blue",)), product(), CHOSEN) == 1.0
    assert purchase_reward(goal(options=("xl tall",)), product(), CHOSEN) == 3 / 4
    assert purchase_reward(goal(options=("xl tall",)), product(), {"cut": "xl"}) == 1.0


def test_extra_options_earn_nothing():
    # The public code would count the chosen "soft", because the title has the word.
    assert purchase_reward(goal(options=("xl",)), product(), {"feel": "soft"}) == 3 / 4


@pytest.mark.parametrize(
    ("wanted", "bought", "query", "category", "expected"),
    [
        ("plain shirt", "red shirt", "?", "?", 1.0),  # t = 1/2
        ("plain shirt", "red chair", "shirt", "clothing men", 0.0),  # t = 0, whatever else is
        ("bb cc dd ee ff", "bb", "?", "?", 0.5),  # t = 1/5
        ("bb cc dd ee ff", "bb", "?", "men", 0.5),
        ("bb cc dd ee ff", "bb", "?", "men clothing", 1.0),
        ("bb cc dd ee ff", "bb", "shirt", "?", 1.0),
        ("bb cc dd ee", "bb", "?", "?", 1.0),  # t = 1/4
        (" ".join(f"n{i}" for i in range(11)), "n0", "shirt", "clothing men", 0.1),  # t = 1/11
    ],
)
def test_type_reward(wanted, bought, query, category, expected):
    other = product(title=bought, query=query, category=frozenset(category.split()))
    assert type_reward(product(title=wanted), other) == expected


def test_nouns_leave_out_stop_words_attributes_and_options():
    shirt = product(title="the soft machine wash shirt for men, dark blue 3x")
    assert shirt.nouns == {"shirt", "men"}
    assert type_reward(product(title="soft"), product(title="soft")) == 1.0  # no nouns, same query


def test_other_types_of_the_default_catalogue_are_worthless(task):
    shown = {p.query: p for p in task.shop.products}
    assert len(shown) == sum(len(types.split()) for _, types, _, _ in KINDS)
    for a in shown.values():
        for b in shown.values():
            assert type_reward(a, b) == float(a is b)


def test_words_of_the_default_catalogue_are_told_apart():
    groups = [attributes.split() for _, _, attributes, _ in KINDS]
    groups += [values.split() for *_, options in KINDS for values in options.values()]
    for words in groups:
        for a in words:
            for b in words:
                assert a == b or (a not in b and not module._alike(a, b))
    # A category's attributes are not to be found in the names of its types.
    for _, types, attributes, _ in KINDS:
        assert not [a for a in attributes.split() if a in types]


# Sampling


def test_sampling_is_a_function_of_the_arguments(task):
    again = make_task("webshop", {})
    assert again.shop.products == task.shop.products
    assert task.sample(30, "a") == again.sample(30, "a")
    assert task.sample(30, "a") != task.sample(30, "b")
    assert task.sample(0, "a") == []


def test_pools_are_disjoint_whatever_the_price(task):
    pools = [
        {e.item.text for seed in range(4) for e in task.sample(200, str(seed), held_out)}
        for held_out in (False, True)
    ]
    assert not pools[0] & pools[1]
    prompts = [e.prompt for e in task.sample(500, "c")]
    assert len(set(prompts)) > 450  # the generator does not repeat itself


def test_difficulty_options():
    task = make_task("webshop", {"asked_attributes": 3, "asked_options": 0, "page_size": 5})
    for example in task.sample(20, "0"):
        assert len(example.item.attributes) == 3 and example.item.options == ()
        assert play(task, example, example.answer[:1])[1][0].count("\n") == 6
    assert len(make_task("webshop", {"products": 50}).shop.products) == 50


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"color": "red"}, "task_options: expected products, page_size, .*, got 'color'"),
        ({"products": 0}, "task_options.products: expected an integer >= 1, got 0"),
        ({"products": True}, "task_options.products: expected an integer >= 1, got True"),
        ({"page_size": 27}, r"task_options.page_size: expected an integer in 1..26, got 27"),
        ({"max_turns": "9"}, "task_options.max_turns: expected an integer >= 1, got '9'"),
        ({"asked_options": -1}, "task_options.asked_options: expected an integer >= 0, got -1"),
        ({"catalogue": 3}, "task_options.catalogue: expected a path, got 3"),
        ({"attributes": "a.json"}, "task_options.attributes: needs a catalogue, got cat"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(ConfigError, match=message):
        make_task("webshop", options)


def test_too_few_goals_is_one_line():
    task = make_task("webshop", {"products": 1, "asked_options": 0, "asked_attributes": 3})
    pools = []
    for held_out in (False, True):
        try:
            pools.append(len(task.sample(3, "0", held_out)))
        except TaskError as error:
            assert re.fullmatch(r"task webshop: expected 3 [a-z-]+ goals, got 0", str(error))
    assert pools == [3]  # there is but one goal, and it is in one pool


# WebShop's files

ITEMS = [
    {
        "asin": "B09AAAAAA1",
        "name": "Men’s Casual Shirt,\n Long Sleeve",
        "category": "fashion",
        "query": "Men's Shirts",
        "product_category": "Clothing, Shoes & Jewelry › Men › Clothing › Shirts",
        "pricing": "$19.99$29.99",
        "small_description": ["100% Cotton", "Machine wash"],
        "full_description": "A shirt for every day.",
        "customization_options": {
            "Color": [{"value": "Dark Blue ", "image": None}, {"value": "Café/Cream"}],
            "Size": [{"value": "Small"}, {"value": "X-Large"}],
            "Style": None,
        },
        "images": ["https://example.com/a.jpg"],
    },
    {
        "asin": "B09AAAAAA2",
        "name": "Oak Coffee Table",
        "query": "coffee tables",
        "product_category": "Home & Kitchen › Furniture › Tables",
        "pricing": "$1,299.00",
        "customization_options": None,
        "small_description": "solid wood",
        "full_description": None,
    },
    {"asin": "nan", "name": "x", "query": "x", "product_category": "x"},
    {"asin": "B09AAAAAA12345", "name": "x", "query": "x", "product_category": "x"},
    {"asin": "B09AAAAAA1", "name": "again", "query": "x", "product_category": "x"},
    {"asin": "B09AAAAAA3", "name": "椅子", "query": "x", "product_category": "x"},
]  # fmt: skip
ATTRIBUTES = {
    "B09AAAAAA1": {
        "attributes": ["machine wash", "long sleeve"],
        "instruction": None,
        "instruction_attributes": None,
    },
    "B09AAAAAA2": {
        "attributes": ["solid wood"],
        "instruction": "Find me a solid wood coffee table.",
        "instruction_attributes": ["solid wood"],
    },
}
INSTRUCTIONS = {
    "B09AAAAAA1": [
        {
            "asin": "B09AAAAAA1",
            "instruction": "i am looking for a machine wash shirt in café color.",
            "instruction_attributes": ["machine wash"],
            "instruction_options": ["cafe/cream"],
        },
        {"instruction": "no attributes", "instruction_attributes": [], "instruction_options": []},
    ]
}


@pytest.fixture
def files(tmp_path):
    def write(**contents):
        paths = {}
        for name, content in contents.items():
            path = tmp_path / f"{name}.json"
            path.write_text(json.dumps(content, indent=0), encoding="utf-8")
            paths[name] = str(path)
        return paths

    return write


def test_catalogue_file(files):
    task = make_task("webshop", files(catalogue=ITEMS, attributes=ATTRIBUTES))
    shirt, table = task.shop.products
    assert shirt.title == "mens casual shirt, long sleeve"
    assert shirt.query == "men's shirts"
    assert shirt.price == pytest.approx(24.99) and table.price == 1299.0
    assert shirt.category == {"clothing, shoes & jewelry", "men", "clothing", "shirts"}
    assert shirt.options == {"color": ("dark blue", "cafe/cream"), "size": ("small", "x-large")}
    assert shirt.text == "100% cotton machine wash a shirt for every day."
    assert table.options == {} and table.text == "solid wood"
    examples = task.sample(40, "0")
    for example in examples:
        assert play(task, example, example.answer)[0] == 1.0
    prompts = {e.prompt for e in examples}
    assert "find me a solid wood coffee table, under $1310\n" in prompts
    assert [p for p in prompts if re.fullmatch(
        "find machine wash long sleeve men's shirts, color (dark blue|cafe/cream), "
        r"size (small|x-large), under \$[34]0\n", p)]  # fmt: skip


def test_instructions_of_people(files):
    paths = files(catalogue=ITEMS, attributes=ATTRIBUTES, instructions=INSTRUCTIONS)
    task = make_task("webshop", paths)
    pools = []
    for held_out in (False, True):
        try:
            pools += task.sample(5, "0", held_out)
        except TaskError:
            continue
    assert {e.prompt.rsplit(", ", 1)[0] for e in pools} == {
        "i am looking for a machine wash shirt in cafe color"
    }
    assert all(e.item.attributes == ("machine wash",) for e in pools)
    assert all(play(task, e, e.answer)[0] == 1.0 and "click cafe/cream" in e.answer for e in pools)


def test_products_option_cuts_a_file(files):
    items = [{**ITEMS[0], "attributes": ["machine wash"]}, {"asin": None}]
    assert len(make_task("webshop", {**files(catalogue=items), "products": 1}).shop.products) == 1


def test_price_defaults_to_a_hundred(files):
    items = [{**ITEMS[0], "pricing": p, "asin": str(i), "attributes": ["wash"]}
             for i, p in enumerate((None, "", "call us", "$5", "$" + "9" * 400))]  # fmt: skip
    prices = [p.price for p in make_task("webshop", files(catalogue=items)).shop.products]
    assert prices == [100.0, 100.0, 100.0, 5.0, 999999999999.0]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"items.json:1: expected JSON, got an error \(Expecting value\)"),
        (b"[\n{},\n{\n]", r"items.json:4: expected JSON, got an error"),
        (b'[\n"caf\xe9"]', r"items.json:2: expected UTF-8, got another code"),
        (b"[" * 100_000, r"items.json: expected JSON, got too much of it"),
        (b"[" + b"9" * 5000 + b"]", r"items.json: expected JSON, got too much of it"),
        (b"{}", r"items.json: expected a list, got {}"),
        (b"[]", r"items.json: expected a product with an attribute"),
        (b"[1]", r"items.json: product 0: expected an object, got 1"),
        (b'[{"asin": "a"}]', r"items.json: product 0: name: expected a text, got nothing"),
        (b'[{"asin": 7}]', r"items.json: product 0: asin: expected a text, got 7"),
    ],
)
def test_malformed_catalogue(tmp_path, content, message):
    path = tmp_path / "items.json"
    path.write_bytes(content)
    with pytest.raises(TaskError, match="^task webshop: .*" + message) as caught:
        make_task("webshop", {"catalogue": str(path)})
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("query", None, "query: expected a text, got nothing"),
        ("product_category", 5, "product_category: expected a text, got 5"),
        ("pricing", 9.5, r"pricing: expected a text, got 9\.5"),
        ("attributes", {"a": 1}, "attributes: expected a list, got {'a': 1}"),
        ("small_description", [3], "small_description: expected texts, got 3"),
        ("customization_options", [], r"customization_options: expected an object, got \[\]"),
        ("customization_options", {"a\nb": 3}, r"'a\\nb': entries: expected a list, got 3"),
        ("customization_options", {"a": [{}]}, "'a': value: expected a text, got nothing"),
        ("customization_options", {"a": [["x" * 9999]]}, "'a': expected an object, got "),
    ],
)
def test_malformed_product(files, field, value, message):
    paths = files(catalogue=[ITEMS[1], {**ITEMS[0], field: value}])
    with pytest.raises(TaskError, match="product 1: .*" + message) as caught:
        make_task("webshop", paths)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("attributes", [], "attributes.json: expected an object, got"),
        ("attributes", {"B09AAAAAA1": 1}, "'B09AAAAAA1': expected an object, got 1"),
        ("instructions", {"B09AAAAAA1": {}}, "'B09AAAAAA1': entries: expected a list, got {}"),
        ("instructions", {}, "instructions.json: expected a product with an attribute or an ins"),
    ],
)
def test_malformed_side_files(files, name, content, message):
    with pytest.raises(TaskError, match=message):
        make_task("webshop", files(catalogue=ITEMS, **{name: content}))


@pytest.mark.parametrize("path", ["/no/such/file.json", "/", "a\0b"])
def test_unreadable_catalogue(path):
    with pytest.raises(TaskError, match=r"^task webshop: .*: expected a file, got ") as caught:
        WebshopTask({"catalogue": path})
    assert "\n" not in str(caught.value)
