"""Long prompts made from a seed: what the answer needs stands among sentences that say nothing of it.

The kinds are those of RULER (Hsieh et al. 2024) and The Sparse Frontier (Nawrot et al. 2025), in sentences of our own. A prompt
ends where its answer begins, so that a model that was never instructed can be measured too.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise, product

from sparselet.errors import TaskError
from sparselet.tasks.rows import Row

HOPS = 3  # names between the asked one and its value, in `variables`
MOST_REPEATS = 9  # of a phrase, in `ngrams`
CUE_WORDS, COPIED_WORDS = 4, 32  # words of a note that the question of `copy` shows, and those that its answer repeats

_ADJECTIVES = """amber, blue, brave, bright, broad, calm, clean, clever, cold, copper, crimson, dark, deep, dusty, early,
    gentle, golden, grand, green, grey, heavy, hidden, iron, light, little, lucky, modern, narrow, noble,
    northern, old, orange, pale, plain, proud, purple, quick, quiet, rapid, red, rich, rough, round, royal,
    scarlet, sharp, short, silent, silver, simple, small, smooth, soft, southern, strong, sweet, tall, warm,
    white, wild, wise, yellow, young"""
_NOUNS = """anchor, arrow, basket, bell, blanket, bottle, bridge, bucket, button, candle, carpet, castle, chain,
    chair, circle, clock, cloud, coat, coin, compass, crown, curtain, diamond, door, drum, engine, feather,
    fence, flag, forest, fountain, garden, gate, glass, hammer, helmet, island, jacket, key, kettle, ladder,
    lamp, lantern, letter, lock, map, mirror, mountain, needle, orchard, palace, pencil, piano, pillow,
    plate, rope, saddle, shield, ship, spoon, station, table, tower, train, tunnel, valley, village, wagon,
    wheel, window"""
_PEOPLE = """baker, captain, doctor, driver, farmer, fisher, guest, judge, lawyer, miller, nurse, painter, singer,
    student, teacher, writer"""
_ACTS = """waited for the others, walked home, talked with a friend, looked at the sky, asked about the weather,
    drank a cup of tea, sat down and rested, read the news, thought about the summer, listened to the music,
    went out for bread, spoke of the past"""
_TIMES = """after the rain, all afternoon, as usual, at last, at noon, before supper, for an hour, in the evening,
    in the morning, late at night, on Monday, on Sunday, that winter, the next day, until it was dark,
    without a word"""


def _list(text: str) -> list[str]:
    return [" ".join(part.split()) for part in text.split(",")]


_NAMES = [" ".join(pair) for pair in product(_list(_ADJECTIVES), _list(_NOUNS))]
_ONE_WORD = _list(_NOUNS) + _list(_ADJECTIVES)


@dataclass
class _Draft:
    """facts: sentences that the answer needs, in their order. filler: a sentence to stand between them, a new one each time."""

    facts: list[str]
    question: str
    target: str
    filler: Callable[[], str]

    def prompt(self, fillers: list[str], depths: list[float]) -> str:
        """The fillers with each fact before the share `depth` of them, then the question."""
        sentences, before = [], 0
        for fact, depth in zip(self.facts, depths, strict=True):
            place = round(depth * len(fillers))
            sentences += [*fillers[before:place], fact]
            before = place
        return " ".join([*sentences, *fillers[before:]]) + "\n" + self.question


def _needle(source: random.Random) -> _Draft:
    name, number = source.choice(_NAMES), _number(source)
    question = f"What is the code of the {name}? The code of the {name} is"
    return _Draft([f"The code of the {name} is {number}."], question, number, lambda: _sentence(source))


def _recall(source: random.Random) -> _Draft:
    name, *others = source.sample(_NAMES, len(_NAMES))
    number, names = _number(source), iter(others)

    def pair() -> str:
        return f"The {next(names)} has {_number(source)}."

    return _Draft([f"The {name} has {number}."], f"What does the {name} have? The {name} has", number, pair)


def _variables(source: random.Random) -> _Draft:
    names, number = source.sample(_NAMES, HOPS + 1), _number(source)
    facts = [f"The {names[0]} has {number}."]
    facts += [f"The {name} has as many as the {other}." for other, name in pairwise(names)]
    question = f"How many does the {names[-1]} have? The number is"
    return _Draft(facts, question, number, lambda: _sentence(source))


def _ngrams(source: random.Random) -> _Draft:
    name, times = source.choice(_NAMES), source.randint(1, MOST_REPEATS)
    facts = [f"The {source.choice(_list(_PEOPLE))} saw the {name} {source.choice(_list(_TIMES))}." for _ in range(times)]
    question = f"How many times does the text say {name}? Number of times:"
    return _Draft(facts, question, str(times), lambda: _sentence(source))


def _copy(source: random.Random) -> _Draft:
    words = source.sample(_ONE_WORD, CUE_WORDS + COPIED_WORDS)
    cue, rest = " ".join(words[:CUE_WORDS]), " ".join(words[CUE_WORDS:])
    return _Draft([f"Note: {cue} {rest}."], f"The same note once more. Note: {cue}", rest, lambda: _sentence(source))


LONG_CONTEXT: dict[str, Callable[[random.Random], _Draft]] = {
    "needle": _needle,
    "recall": _recall,
    "variables": _variables,
    "ngrams": _ngrams,
    "copy": _copy,
}


def word_count(text: str) -> int:
    """The number of words of a text, as white space parts them."""
    return len(text.split())


def long_rows(
    kind: str, length: int, rows: int, seed: int = 0, split: str = "test", count: Callable[[str], int] = word_count
) -> tuple[Row, ...]:
    """Rows of a kind of LONG_CONTEXT, whose prompts are as long as `length` allows: one more sentence would be too long.

        needle      the number of a name that the text has once
        recall      the number of a name; the whole text is names with numbers
        variables   the number of a name through HOPS other names, each in a sentence of its own
        ngrams      how many times the text has a phrase, 1 to MOST_REPEATS
        copy        a note from the text, COPIED_WORDS words of it, after its first CUE_WORDS

    count: the length of a text; by default its words, or the tokens of a tokenizer. A row depends on kind, seed, split and its
    own number, so that its facts, their order and their depths in the text are the same at each length.
    Raises TaskError for a length that the facts do not fit into, or that the names of `recall` do not fill.
    """
    return tuple(_row(kind, length, random.Random(f"{kind} {seed} {split} {i}"), count) for i in range(rows))


def _row(kind: str, length: int, source: random.Random, count: Callable[[str], int]) -> Row:
    draft = LONG_CONTEXT[kind](source)
    depths = sorted(source.random() for _ in draft.facts)
    least = count(draft.prompt([], depths))
    if least > length:
        raise TaskError(f"{kind}: length must be at least {least}, got {length}.")
    fillers: list[str] = []

    def fits(sentences: int) -> bool:
        try:
            fillers.extend(draft.filler() for _ in range(sentences - len(fillers)))
        except RuntimeError as error:  # the iterator of names has ended
            raise TaskError(f"{kind}: length {length} is more than its {len(_NAMES)} names fill.") from error
        return count(draft.prompt(fillers[:sentences], depths)) <= length

    low, high = 0, 1
    while fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return Row(draft.prompt(fillers[:low], depths), draft.target)


def _number(source: random.Random) -> str:
    return str(source.randint(10_000, 99_999))


def _sentence(source: random.Random) -> str:
    return f"The {source.choice(_list(_PEOPLE))} {source.choice(_list(_ACTS))} {source.choice(_list(_TIMES))}."
