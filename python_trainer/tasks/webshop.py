"""The `webshop` family: find, configure and buy the product that an instruction asks for.

Written after the description of WebShop (Yao et al. 2022, arXiv 2207.01206); nothing of its code or
data is in here. One episode, with the expert's turns marked `>`:

    find light waterproof boots, color green, size small, under $30
    > search light waterproof boots green small
    $42 waterproof light boots x
    $26 padded light boots y
    $54 light suede boots z
    or next
    > click y
    $26 padded light boots, waterproof, color red; green; black; white, size small; medium
    or back
    > click green
    color green
    > click small
    size small
    > buy

Turns: `search <words>` (on any page), `click <link>` and `buy`. The links are a product's letter
and `next` or `prev` on a page of results, an option's value and `back` on a product's page. What a
page has no link for is answered `nothing happens`. The episode is over at `buy`, or after
`max_turns` turns (reward 0).

The reward is the paper's, of the product bought, with `attributes` and `options` those asked for:

    type * (attributes matched + options matched + [price <= limit]) / (attributes + options + 1)

An attribute matches when one of the product's is alike (rapidfuzz's token_set_ratio above 85, as in
the public code), or when the product's text contains it; an option when a chosen value is alike
(for `size`: equal). `type` compares the nouns of the titles, t being the share of the goal's that
the bought product's has: 0 for t = 0; 0.1 for t < 0.1; else 1 when t > 0.2, or the queries are
equal, or two parts of the category paths are; else 0.5.

What differs from the paper: nouns are the words of a title that are neither stop words nor
words of the product's attributes and options (the paper parses with spaCy); the public code's table
of colours is left out, and so is its rule that pays for any chosen option whose name is in
the product's own text; search does not stem; there are no sub-pages for features, description and
reviews (the first two are on the product's page, cut to 400 characters); the limit is one of the
next two tens above the price (the paper: up to four), so that the price matters.

The default catalogue is generated, from a closed vocabulary. Option `catalogue` names a WebShop
product file instead (items_shuffle.json), a JSON list of objects of which these fields are read
(as the public code reads them: the files themselves were not at hand):

    asin, name, query        text, needed; longer asins than 10 characters, "nan" and doubles are
                             left out, as in the public code, and so are names without a Latin word
    product_category         text, needed: a path, "Clothing › Men › Shirts"
    pricing                  text: "$12.99", or a range, whose middle is taken; $100 when missing
    customization_options    object: name -> list of objects with a text `value` (or null)
    small_description        list of texts, or a text; so is each of the two below
    full_description
    attributes               WebShop has them in a file of their own:

`attributes` (items_ins_v2.json) is an object: asin -> object with `attributes`, and perhaps
`instruction` and `instruction_attributes`. `instructions` (items_human_ins.json) is an object:
asin -> list of objects with `instruction`, `instruction_attributes`, `instruction_options` (texts).
A goal is one of the people's instructions where that file is given; else it is made from the
attributes and options of a product, as the paper's synthetic goals are. Text is folded to
lower-case ASCII. Expert turns are None where the expert's search finds nothing that scores 1.
"""

from __future__ import annotations

import json
import math
import random
import re
import reprlib
import string
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from bm25s.stopwords import STOPWORDS_EN
from rapidfuzz import fuzz, utils

from ..config import ConfigError, TaskError
from . import HELD_OUT_SHARE, Example, check_integers, check_paths, is_held_out, options_of
from .bm25 import BM25

FOUND = 50  # most products that a search returns, as in the paper
TURN_LENGTH = 400  # characters of a turn that are read
TEXT_LENGTH = 400  # characters of features and description that are shown
TITLE_LENGTH = 100  # characters of a title that are shown
NOTHING = "nothing happens\n"
# Letters of the results; x, y, z first, because no other word of a page is so short.
LABELS = "xyz" + string.ascii_lowercase[:-3]

KIND_NAMES: dict[type, str] = {str: "a text", list: "a list", dict: "an object"}

COLORS = "red blue green black white pink"
SIZES = "small medium large"
PACKS = "single double family"
FLAVORS = "mint lemon vanilla cherry honey ginger"
SCENTS = "rose lavender coconut jasmine cedar peach"
# category, types of product, attributes, options
KINDS = (
    ("clothing", "shirt jacket dress sweater", "cotton linen wool soft warm striped",
     {"color": COLORS, "size": SIZES}),
    ("shoes", "boots sandals sneakers", "leather canvas suede light waterproof padded",
     {"color": COLORS, "size": SIZES}),
    ("furniture", "chair table shelf desk", "wooden metal folding narrow sturdy modern",
     {"color": COLORS, "finish": "oak walnut maple"}),
    ("kitchen", "mug kettle pan bowl", "steel glass ceramic insulated heavy stackable",
     {"color": COLORS, "size": SIZES}),
    ("grocery", "tea coffee cookies", "organic vegan roasted fresh sugarfree local",
     {"flavor": FLAVORS, "pack": PACKS}),
    ("beauty", "shampoo lotion soap", "gentle natural foaming moisturizing antibacterial quick",
     {"scent": SCENTS, "pack": PACKS}),
)  # fmt: skip


@dataclass(frozen=True)
class Options:
    """The family's options (`task_options`)."""

    products: int | None = None  # generated (None: 720), or read from the catalogue (None: all)
    page_size: int = 3  # products on a page of results
    max_turns: int = 10
    asked_attributes: int = 2  # most attributes in a made goal
    asked_options: int = 2  # most options in a made goal
    catalogue: str | None = None  # paths of WebShop's files (module docstring)
    attributes: str | None = None
    instructions: str | None = None

    def __post_init__(self) -> None:
        if self.products is not None:
            check_integers(self, products=(1, math.inf))
        check_integers(
            self, page_size=(1, len(LABELS)), max_turns=(1, math.inf),
            asked_attributes=(1, math.inf), asked_options=(0, math.inf),
        )  # fmt: skip
        check_paths(self, "catalogue", "attributes", "instructions")
        for name in ("attributes", "instructions"):
            if self.catalogue is None and getattr(self, name) is not None:
                raise ConfigError(f"task_options.{name}: needs a catalogue, got catalogue=None")


@dataclass(frozen=True)
class Ask:
    """An instruction that came with a catalogue."""

    text: str
    attributes: tuple[str, ...]
    options: tuple[str, ...] | None  # None: to be drawn


@dataclass(frozen=True)
class Product:
    asin: str
    title: str
    query: str  # what one would search to find its like: its type
    category: frozenset[str]  # parts of the category path
    price: float  # dollars
    attributes: tuple[str, ...]
    options: dict[str, tuple[str, ...]]
    text: str  # features and description
    asks: tuple[Ask, ...] = ()

    @property
    def offers(self) -> list[str]:
        return [f"{name} {'; '.join(values)}" for name, values in self.options.items()]

    @property
    def nouns(self) -> set[str]:
        other = {*STOPWORDS_EN, *_words(" ".join((*self.attributes, *self.offers)))}
        words = {word for word in _words(self.title) if len(word) > 1 and not word[0].isdigit()}
        return words - other

    @property
    def row(self) -> str:
        return f"{_dollars(self.price)} {self.title[:TITLE_LENGTH]}"

    @property
    def page(self) -> str:
        parts = (self.row, self.text[:TEXT_LENGTH], *self.offers)
        return ", ".join(part for part in parts if part) + "\nor back\n"


@dataclass(frozen=True)
class Goal:
    product: Product  # one that satisfies it; others may
    text: str  # all that is asked for but the price
    keywords: str  # the expert's search
    attributes: tuple[str, ...]
    options: tuple[str, ...]
    limit: float  # dollars


def type_reward(goal: Product, bought: Product) -> float:
    """How far the two are the same kind of thing (module docstring)."""
    nouns = goal.nouns
    title = len(nouns & bought.nouns) / len(nouns) if nouns else 0.2
    if title < 0.1:
        return 0.1 if title > 0 else 0.0
    alike = goal.query == bought.query or len(goal.category & bought.category) >= 2
    return 1.0 if alike or title > 0.2 else 0.5


def purchase_reward(goal: Goal, bought: Product, chosen: dict[str, str]) -> float:
    """The reward for buying a product with the options `chosen` (name -> value)."""
    text = f"{bought.title} {bought.text}"
    attributes = sum(
        a in text or any(_alike(a, own) for own in bought.attributes) for a in goal.attributes
    )
    options = sum(any(_fits(o, *pair) for pair in chosen.items()) for o in goal.options)
    matched = attributes + options + (bought.price <= goal.limit)
    share = matched / (len(goal.attributes) + len(goal.options) + 1)
    return type_reward(goal.product, bought) * share


def _alike(a: str, b: str) -> bool:
    return round(fuzz.token_set_ratio(a, b, processor=utils.default_process)) > 85


def _fits(asked: str, name: str, value: str) -> bool:
    return asked == value if name == "size" else _alike(asked, value)


class Shop:
    """A catalogue and its search engine."""

    def __init__(self, products: list[Product]) -> None:
        self.products = products
        texts = [" ".join((p.title, p.text, *p.offers)) for p in products]
        self.engine = BM25([_words(text) for text in texts])

    def search(self, words: str) -> list[Product]:
        """At most FOUND products with one of the words, best first; ties as in the catalogue."""
        return [self.products[i] for i in self.engine.best(_words(words), FOUND)]


class ShopEpisode:
    """A visit to the shop: a page of results, or a product with the options chosen so far."""

    def __init__(self, shop: Shop, goal: Goal, options: Options) -> None:
        self.shop, self.goal, self.options = shop, goal, options
        self.reward = 0.0
        self.turns = 0
        self.over = False
        self.found: list[Product] = []
        self.first = 0  # of `found`, on this page
        self.product: Product | None = None
        self.chosen: dict[str, str] = {}

    @property
    def links(self) -> dict[str, Product]:
        """The products on this page of results, by letter."""
        page = self.found[self.first : self.first + self.options.page_size]
        return dict(zip(LABELS, page, strict=False))

    @property
    def has_next(self) -> bool:
        return self.first + self.options.page_size < len(self.found)

    def step(self, turn: str) -> str | None:
        if self.over:
            return None
        self.turns += 1
        verb, _, rest = _plain(turn[:TURN_LENGTH]).partition(" ")
        if verb == "buy" and not rest and self.product is not None:
            self.reward = purchase_reward(self.goal, self.product, self.chosen)
            self.over = True
        page = self._answer(verb, rest)
        self.over = self.over or self.turns >= self.options.max_turns
        return None if self.over else page

    def _answer(self, verb: str, rest: str) -> str:
        if verb == "search":
            self.found, self.first, self.product = self.shop.search(rest), 0, None
            return self._results()
        if verb != "click":
            return NOTHING
        return self._click_result(rest) if self.product is None else self._click_option(rest)

    def _click_result(self, link: str) -> str:
        if link in self.links:
            self.product, self.chosen = self.links[link], {}
            return self.product.page
        if link == "next" and self.has_next:
            self.first += self.options.page_size
        elif link == "prev" and self.first:
            self.first -= self.options.page_size
        else:
            return NOTHING
        return self._results()

    def _click_option(self, link: str) -> str:
        assert self.product is not None
        if link == "back":
            self.product = None
            return self._results()
        names = [name for name, values in self.product.options.items() if link in values]
        if not names:
            return NOTHING
        # A value that two options share goes to the first that has none yet.
        name = next((n for n in names if n not in self.chosen), names[0])
        self.chosen[name] = link
        return f"{name} {link}\n"

    def _results(self) -> str:
        if not self.found:
            return "no results\n"
        # A letter ends its line, so that a causal model has read the product when it comes.
        rows = [f"{product.row} {letter}\n" for letter, product in self.links.items()]
        moves = " prev" * bool(self.first) + " next" * self.has_next
        return "".join(rows) + (f"or{moves}\n" if moves else "")


class WebshopTask:
    """Shopping goals over one catalogue. Options: the fields of `Options`.

    Raises:
        ConfigError: an option is unknown or wrong.
        TaskError: a file cannot be read, or is not what WebShop's are (file, line or entry).
    """

    exact = False  # part of what was asked for pays in part

    def __init__(self, options: dict[str, Any]) -> None:
        self.options = options_of(Options, options)
        self.name = "webshop"
        if self.options.catalogue is None:
            products = generate_catalogue(self.options.products or 720)
        else:
            products = load_catalogue(self.options)
        made = self.options.instructions is None
        self.asked = [p for p in products if p.asks or (made and p.attributes)]
        if not self.asked:
            raise TaskError(
                f"task webshop: {self.options.instructions or self.options.catalogue}: expected a "
                "product with an attribute or an instruction to make goals from, got none"
            )
        self.shop = Shop(products)

    def sample(self, n: int, seed: str, held_out: bool = False) -> list[Example]:
        """`n` goals drawn by `seed`. The pool is a hash of all that is asked for but the price."""
        rng = random.Random(seed)
        examples: list[Example] = []
        for _ in range(100 * HELD_OUT_SHARE * n):
            if len(examples) == n:
                break
            goal = self._draw(rng)
            if is_held_out(goal.text) == held_out:
                prompt = f"{goal.text}, under {_dollars(goal.limit)}\n"
                examples.append(Example(prompt, goal, self._expert(goal)))
        if len(examples) < n:
            pool = "held-out" if held_out else "training"
            raise TaskError(f"task webshop: expected {n} {pool} goals, got {len(examples)}")
        return examples

    def begin(self, example: Example) -> ShopEpisode:
        return ShopEpisode(self.shop, example.item, self.options)

    def _draw(self, rng: random.Random) -> Goal:
        product = rng.choice(self.asked)
        ask = rng.choice(product.asks) if product.asks else None
        if ask:
            attributes, text, keywords = ask.attributes, ask.text, ask.text
        else:
            attributes = _some(rng, product.attributes, self.options.asked_attributes)
            keywords = " ".join((*attributes, product.query))
            text = f"find {keywords}"
        if ask and ask.options is not None:
            values = ask.options
        else:
            names = _some(rng, tuple(product.options), self.options.asked_options)
            values = tuple(rng.choice(product.options[name]) for name in names)
            text += "".join(f", {n} {v}" for n, v in zip(names, values, strict=True))
            keywords = " ".join((keywords, *values))
        limit = 10.0 * (product.price // 10 + rng.randint(1, 2))
        return Goal(product, text, keywords, attributes, values, limit)

    def _expert(self, goal: Goal) -> tuple[str, ...] | None:
        """Turns that earn 1.0, found from what the pages show; None when `max_turns` are too few.

        It searches all that is asked for, opens what is cheap enough, best match first, and
        goes back when the page lacks an attribute or an option.
        """
        episode, turns, seen = ShopEpisode(self.shop, goal, self.options), [], set()

        def take(turn: str) -> None:
            turns.append(turn)
            episode.step(turn)

        take(f"search {goal.keywords}")
        while not episode.over:
            unseen = [
                (letter, product)
                for letter, product in episode.links.items()
                if product.price <= goal.limit and product.asin not in seen
            ]
            if unseen:
                letter, product = unseen[0]
                seen.add(product.asin)
                take(f"click {letter}")
                chosen = _choices(goal, product)
                if purchase_reward(goal, product, chosen) == 1.0:
                    for value in chosen.values():
                        take(f"click {value}")
                    take("buy")
                else:
                    take("click back")
            elif episode.has_next:
                take("click next")
            else:
                return None
        return tuple(turns) if episode.reward == 1.0 else None


def _choices(goal: Goal, product: Product) -> dict[str, str]:
    """The product's options that fit those asked for, in the order of asking."""
    chosen: dict[str, str] = {}
    for asked in goal.options:
        fitting = [
            (value != asked, name, value)  # an equal value before one that is only alike
            for name, values in product.options.items()
            for value in values
            if name not in chosen and _fits(asked, name, value)
        ]
        if fitting:
            _, name, value = min(fitting)
            chosen[name] = value
    return chosen


def _some(rng: random.Random, of: Sequence[str], most: int) -> tuple[str, ...]:
    """At most so many of the items, in their order."""
    return tuple(of[i] for i in sorted(rng.sample(range(len(of)), min(most, len(of)))))


def _dollars(price: float) -> str:
    return f"${price:.2f}".removesuffix(".00")


def _plain(text: str) -> str:
    """Lower-case ASCII, one space between words; what cannot be folded is dropped."""
    folded = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode()
    return " ".join(folded.lower().split())


def _words(plain: str) -> list[str]:
    return re.findall("[a-z0-9]+", plain)


def generate_catalogue(n: int) -> list[Product]:
    """`n` products, each with three attributes: two in its title, one only on its page."""
    rng = random.Random("webshop catalogue")
    kinds = [(c, t, a.split(), o) for c, types, a, o in KINDS for t in types.split()]

    def offered(values: list[str]) -> tuple[str, ...]:
        return _some(rng, values, len(values) // 2 + 1)

    products = []
    for i in range(n):
        category, type_, attributes, options = kinds[i % len(kinds)]
        first, second, hidden = rng.sample(attributes, 3)
        products.append(
            Product(
                asin=str(i),
                title=f"{first} {second} {type_}",
                query=type_,
                category=frozenset((category, type_)),
                price=10.0 * rng.randint(1, 7) + rng.randint(1, 9),  # never a limit itself
                attributes=(first, second, hidden),
                options={name: offered(values.split()) for name, values in options.items()},
                text=hidden,
            )
        )
    return products


def load_catalogue(options: Options) -> list[Product]:
    """The products of `options.catalogue`, with attributes and instructions where files are given.

    Raises:
        TaskError: one line: file, line or entry, what was expected, what came.
    """
    assert options.catalogue is not None
    traits = _read_json(options.attributes, dict) if options.attributes else {}
    people = _read_json(options.instructions, dict) if options.instructions else {}
    products: dict[str, Product] = {}
    for i, record in enumerate(_read_json(options.catalogue, list)[: options.products]):
        where = f"{options.catalogue}: product {i}"
        asin = _field(where, record, "asin", str)
        title = _plain(_field(where, record, "name", str))
        if asin == "nan" or len(asin) > 10 or asin in products or not _words(title):
            continue
        attributes = _texts(where, record, "attributes")
        asks: list[Ask] = []
        if asin in traits:
            there = f"{options.attributes}: {asin!r}"
            attributes = _texts(there, traits[asin], "attributes")
            asks = _asks(there, traits[asin], drawn=True)
        if options.instructions:
            there = f"{options.instructions}: {asin!r}"
            records = _list(there, people.get(asin, []))
            asks = [ask for r in records for ask in _asks(there, r, drawn=False)]
        path = _field(where, record, "product_category", str).split("›")
        text = (
            *_texts(where, record, "small_description"),
            *_texts(where, record, "full_description"),
        )
        products[asin] = Product(
            asin=asin,
            title=title,
            query=_plain(_field(where, record, "query", str)),
            category=frozenset(map(_plain, path)) - {""},
            price=_price(_field(where, record, "pricing", str, "")),
            attributes=attributes,
            options=_customization(where, record),
            text=" ".join(text),
            asks=tuple(asks),
        )
    return list(products.values())


def _asks(where: str, record: Any, drawn: bool) -> list[Ask]:
    """The record's instruction, if it has one that asks for an attribute."""
    text = _plain(_field(where, record, "instruction", str, "")).rstrip(" .")
    attributes = _texts(where, record, "instruction_attributes")
    options = None if drawn else _texts(where, record, "instruction_options")
    return [Ask(text, attributes, options)] if text and attributes else []


def _customization(where: str, record: Any) -> dict[str, tuple[str, ...]]:
    options = {}
    for name, contents in _field(where, record, "customization_options", dict, {}).items():
        there = f"{where}: customization_options: {reprlib.repr(name)}"
        values = [_plain(_field(there, c, "value", str)) for c in _list(there, contents or [])]
        if any(values):
            options[_plain(name)] = tuple(dict.fromkeys(v for v in values if v))
    return options


def _price(pricing: str) -> float:
    """Dollars: the middle of "$10.00$15.00"; 100 where there is none, as in the public code."""
    prices = [
        float(p.replace(",", "")) for p in re.findall(r"\$\s*(\d[\d,]{0,11}(?:\.\d+)?)", pricing)
    ]
    return sum(prices[:2]) / len(prices[:2]) if prices else 100.0


T = TypeVar("T")


def _field(where: str, record: Any, key: str, kind: type[T], default: T | None = None) -> T:
    """`record[key]`; the default where it is missing or null."""
    if not isinstance(record, dict):
        raise TaskError(f"task webshop: {where}: expected an object, got {reprlib.repr(record)}")
    value = record.get(key)
    value = default if value is None else value
    if not isinstance(value, kind):
        got = "nothing" if value is None else reprlib.repr(value)
        raise TaskError(f"task webshop: {where}: {key}: expected {KIND_NAMES[kind]}, got {got}")
    return value


def _list(where: str, value: Any) -> list[Any]:
    return _field(where, {"entries": value}, "entries", list)


def _texts(where: str, record: Any, key: str) -> tuple[str, ...]:
    """A list of texts, or one, folded; () where it is missing or null."""
    if isinstance(record, dict) and isinstance(record.get(key), str):
        values = [record[key]]
    else:
        values = _field(where, record, key, list, [])
    for value in values:
        if not isinstance(value, str):
            raise TaskError(
                f"task webshop: {where}: {key}: expected texts, got {reprlib.repr(value)}"
            )
    return tuple(text for text in map(_plain, values) if text)


def _read_json(path: str, kind: type[T]) -> T:
    try:
        data = Path(path).read_bytes()
    except (OSError, ValueError) as error:  # the latter: a path with a null byte
        raise TaskError(f"task webshop: {path!r}: expected a file, got {error}") from error
    try:
        value = json.loads(data.decode())
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise TaskError(f"task webshop: {path}:{line}: expected UTF-8, got another code") from error
    except json.JSONDecodeError as error:
        raise TaskError(
            f"task webshop: {path}:{error.lineno}: expected JSON, got an error ({error.msg})"
        ) from error
    except (RecursionError, ValueError) as error:  # nested too deep; a number of 5,000 digits
        raise TaskError(f"task webshop: {path}: expected JSON, got too much of it") from error
    if not isinstance(value, kind):
        raise TaskError(
            f"task webshop: {path}: expected {KIND_NAMES[kind]}, got {reprlib.repr(value)}"
        )
    return value
