"""Whether a study's numbers show what the paper claims."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from sparselet.io.patterns import groups
from sparselet.studies.numbers import Interval, Number, bootstrap
from sparselet.studies.paper.claims import Claim, Place
from sparselet.studies.table import Table

Verdict = Literal["holds", "does not hold", "not tested here"]
Numbers = Mapping[str, Mapping[str, Sequence[Number | None]]]

# Two tasks that agree by chance are no evidence of others.
LEAST_TASKS = 3


@dataclass(frozen=True)
class Judgement:
    """A claim and what became of it: the comparison that decides, and its difference with a 95 % interval."""

    text: str
    source: str
    verdict: Verdict
    difference: float | None
    low: float | None
    high: float | None
    where: str
    why: str


@dataclass(frozen=True)
class _Spot:
    """One cell."""

    table: str
    row: str
    column: str

    def __str__(self) -> str:
        return f"{self.table}: {self.row} / {self.column}"


def judge(claim: Claim, tables: Mapping[str, Table], numbers: Numbers) -> Judgement:
    """A claim's verdict: it holds if in every comparison the whole 95 % interval of the difference is above 0.

    A claim of "about as good" allows the margin: the interval must be above −margin. What decides is the comparison that is
    furthest from holding. numbers: of the tables' cells, by table, row and column.
    """

    def told(verdict: Verdict, why: str, where: str = "", interval: Interval | None = None) -> Judgement:
        values = (interval.difference, interval.low, interval.high) if interval else (None, None, None)
        return Judgement(claim.text, claim.source, verdict, *values, where, why)

    compared: list[tuple[Interval, str]] = []
    for better, worse in claim.pairs:
        spots = list(_compared(better, worse, tables))
        if not spots:
            absent = better if not _rows(better, tables) else worse
            return told("not tested here", f"the study has no {absent.table}: {absent.row} / {absent.column}.")
        for one, other in spots:
            where = f"{one} vs {other}"
            first, second = _number(one, tables, numbers), _number(other, tables, numbers)
            if first is None or second is None or first.missing or second.missing:
                return told("not tested here", "results are missing.", where)
            if len(first.tasks.keys() & second.tasks.keys()) < LEAST_TASKS:
                return told("not tested here", f"fewer than {LEAST_TASKS} tasks say nothing of others.", where)
            compared.append((bootstrap(first.tasks, second.tasks), where))
    if claim.if_differ and _all_equal(*claim.if_differ, tables, numbers):
        first, second = claim.if_differ
        named = [place.row.replace(" {}", "") for place in claim.if_differ]
        return told("not tested here", f"{first.table}: {' and '.join(named)} have the same {second.column}.")
    interval, where = min(compared, key=lambda pair: _distance(pair[0], claim.margin))
    verdict, why = _decide(interval, claim.margin)
    if len(compared) > 1 and verdict == "holds":
        why += f" Of {len(compared)} comparisons, all of which hold, this is the closest."
    elif len(compared) > 1:
        held = sum(one.low + claim.margin > 0 for one, _ in compared)
        why += f" {held} of {len(compared)} comparisons hold; this is the furthest from it."
    return told(verdict, why, where, interval)


def _decide(interval: Interval, margin: float) -> tuple[Verdict, str]:
    """The verdict on one comparison, and why."""
    mean = f"{_signed(interval.difference)} points on average over {interval.tasks} tasks"
    between = f"the 95 % interval from {_signed(interval.low)} to {_signed(interval.high)}"
    bound = f"−{margin:g}" if margin else "0"
    if interval.low + margin > 0:
        return "holds", f"{mean}, and {between} lies above {bound}."
    if interval.high + margin > 0:
        return "does not hold", f"Not shown: {mean}, and {between} has {bound} in it."
    if interval.low == interval.high == 0:
        return "does not hold", f"It is no better: {mean}."
    found = "It falls short by more" if margin else "It is the other way round"
    return "does not hold", f"{found}: {mean}, and {between} does not lie above {bound}."


def _signed(value: float) -> str:
    return f"{value:+.1f}".replace("-", "−")


def _distance(interval: Interval, margin: float) -> tuple[int, float]:
    """The smaller, the further from holding: first what is shown to be wrong, then what goes the wrong way."""
    if interval.difference + margin > 0:
        return 2, interval.low + margin
    return int(interval.high + margin > 0), interval.difference + margin


def _compared(better: Place, worse: Place, tables: Mapping[str, Table]) -> Iterator[tuple[_Spot, _Spot]]:
    """Each pair of cells that a comparison names."""
    for row, same in _rows(better, tables):
        rival = Place(worse.table, worse.row.replace("{}", same) if same is not None else worse.row, worse.column)
        for other, _ in _rows(rival, tables):
            one, two = _Spot(better.table, row, better.column), _Spot(rival.table, other, rival.column)
            if one != two:
                yield one, two


def _all_equal(first: Place, second: Place, tables: Mapping[str, Table], numbers: Numbers) -> bool:
    """Whether every two cells that a comparison names have the same mean."""
    pairs = [[_number(spot, tables, numbers) for spot in spots] for spots in _compared(first, second, tables)]
    return all(one is None or other is None or one.mean == other.mean for one, other in pairs)


def _rows(place: Place, tables: Mapping[str, Table]) -> list[tuple[str, str | None]]:
    """The rows that a place names, each with what `{}` stands for in it."""
    if place.table not in tables or place.column not in tables[place.table].columns:
        return []
    pattern = re.escape(place.row).replace(re.escape("*"), ".*").replace(re.escape("{}"), "(.+)")
    return [(row, same[0] if same else None) for row, same in groups(pattern, tables[place.table].rows).items()]


def _number(spot: _Spot, tables: Mapping[str, Table], numbers: Numbers) -> Number | None:
    return numbers[spot.table][spot.row][tables[spot.table].columns.index(spot.column)]
