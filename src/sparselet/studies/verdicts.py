"""Whether a study's numbers support a claim."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from sparselet.io.patterns import groups
from sparselet.studies.claim import CellPattern, Claim
from sparselet.studies.numbers import Interval, Number, bootstrap
from sparselet.studies.table import Table

Verdict = Literal["holds", "undecided", "reversed", "not tested"]
Numbers = Mapping[str, Mapping[str, Sequence[Number | None]]]

MIN_TASKS = 3  # fewer may agree by chance


@dataclass(frozen=True)
class ClaimResult:
    """A claim with its verdict; the comparison that decides, `where`, and its difference with a 95 % interval."""

    text: str
    source: str
    verdict: Verdict
    difference: float | None
    low: float | None
    high: float | None
    where: str
    why: str


@dataclass(frozen=True)
class _CellName:
    table: str
    row: str
    column: str

    def __str__(self) -> str:
        return f"{self.table}: {self.row} / {self.column}"


def judge(claim: Claim, tables: Mapping[str, Table], numbers: Numbers) -> ClaimResult:
    """A claim's verdict, from the 95 % interval of the difference in each of its comparisons.

    holds: every interval is above −margin. reversed: no part of some interval is above −margin. undecided: neither.
    not tested: a table, row or result is missing, there are fewer than `MIN_TASKS` common tasks, or the cells of `if_differ`
    are equal. The comparison that is furthest from holding decides. numbers: of the tables' cells, by table, row and column.
    """

    def result(verdict: Verdict, why: str, where: str = "", interval: Interval | None = None) -> ClaimResult:
        values = (interval.difference, interval.low, interval.high) if interval else (None, None, None)
        return ClaimResult(claim.text, claim.source, verdict, *values, where, why)

    intervals: list[tuple[Interval, str]] = []
    for better, worse in claim.pairs:
        cells = list(_compared_cells(better, worse, tables))
        if not cells:
            absent = better if not _matching_rows(better, tables) else worse
            return result("not tested", f"the study has no {absent.table}: {absent.row} / {absent.column}.")
        for cell, reference in cells:
            where = f"{cell} vs {reference}"
            first, second = _number(cell, tables, numbers), _number(reference, tables, numbers)
            if first is None or second is None or first.missing or second.missing:
                return result("not tested", "results are missing.", where)
            if len(first.tasks.keys() & second.tasks.keys()) < MIN_TASKS:
                return result("not tested", f"fewer than {MIN_TASKS} tasks say nothing about others.", where)
            intervals.append((bootstrap(first.tasks, second.tasks), where))
    if claim.if_differ and _all_equal(*claim.if_differ, tables, numbers):
        first, second = claim.if_differ
        rows = [pattern.row.replace(" {}", "") for pattern in claim.if_differ]
        return result("not tested", f"{first.table}: {' and '.join(rows)} have the same {second.column}.")
    interval, where = min(intervals, key=lambda pair: _rank(pair[0], claim.margin))
    verdict, why = _decide(interval, claim.margin)
    if len(intervals) > 1 and verdict == "holds":
        why += f" All {len(intervals)} comparisons hold; this is the closest."
    elif len(intervals) > 1:
        held = sum(_verdict(other, claim.margin) == "holds" for other, _ in intervals)
        why += f" {held} of {len(intervals)} comparisons hold; this is the furthest from it."
    return result(verdict, why, where, interval)


def _verdict(interval: Interval, margin: float) -> Verdict:
    """The verdict on one comparison."""
    if interval.low + margin > 0:
        return "holds"
    is_equal = interval.low == interval.high == -margin
    return "undecided" if interval.high + margin > 0 or is_equal else "reversed"


def _decide(interval: Interval, margin: float) -> tuple[Verdict, str]:
    """The verdict on one comparison, and the reason."""
    verdict = _verdict(interval, margin)
    mean = f"{_signed(interval.difference)} points on average over {interval.tasks} tasks"
    if interval.low == interval.high == margin == 0:
        return verdict, f"no difference: {mean}."
    relation = {"holds": "is above", "undecided": "contains", "reversed": "is below"}[verdict]
    bound = f"−{margin:g}" if margin else "0"
    return verdict, f"{mean}; the 95 % interval from {_signed(interval.low)} to {_signed(interval.high)} {relation} {bound}."


def _signed(value: float) -> str:
    return f"{value:+.1f}".replace("-", "−")


def _rank(interval: Interval, margin: float) -> tuple[int, float]:
    """The smaller, the further from holding: reversed comparisons first, then those with a difference below −margin."""
    if interval.difference + margin > 0:
        return 2, interval.low + margin
    return int(_verdict(interval, margin) != "reversed"), interval.difference + margin


def _compared_cells(
    better: CellPattern, worse: CellPattern, tables: Mapping[str, Table]
) -> Iterator[tuple[_CellName, _CellName]]:
    """Each pair of cells that a comparison names."""
    for row, same in _matching_rows(better, tables):
        pattern = CellPattern(worse.table, worse.row.replace("{}", same) if same is not None else worse.row, worse.column)
        for other_row, _ in _matching_rows(pattern, tables):
            cell = _CellName(better.table, row, better.column)
            reference = _CellName(pattern.table, other_row, pattern.column)
            if cell != reference:
                yield cell, reference


def _all_equal(first: CellPattern, second: CellPattern, tables: Mapping[str, Table], numbers: Numbers) -> bool:
    """Whether the two cells of every pair have the same mean."""
    pairs = [[_number(cell, tables, numbers) for cell in pair] for pair in _compared_cells(first, second, tables)]
    return all(a is None or b is None or a.mean == b.mean for a, b in pairs)


def _matching_rows(pattern: CellPattern, tables: Mapping[str, Table]) -> list[tuple[str, str | None]]:
    """The rows that a pattern matches, each with the text that `{}` stands for."""
    if pattern.table not in tables or pattern.column not in tables[pattern.table].columns:
        return []
    expression = re.escape(pattern.row).replace(re.escape("*"), ".*").replace(re.escape("{}"), "(.+)")
    return [(row, same[0] if same else None) for row, same in groups(expression, tables[pattern.table].rows).items()]


def _number(cell: _CellName, tables: Mapping[str, Table], numbers: Numbers) -> Number | None:
    return numbers[cell.table][cell.row][tables[cell.table].columns.index(cell.column)]
