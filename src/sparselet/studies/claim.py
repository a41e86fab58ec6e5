"""A claim: that some cells of a study's tables are better than others."""

from dataclasses import dataclass


@dataclass(frozen=True)
class CellPattern:
    """The cells of a column, in the rows whose names match: `*` matches any text.

    `{}` matches any text too, but the same on both sides of a comparison.
    """

    table: str
    row: str
    column: str


@dataclass(frozen=True)
class Claim:
    """That the first cell of each pair is better than the second, in every task on average.

    pairs: each first pattern's cells are compared with all cells of the second pattern but the same cell.
    margin: points that the first may be worse by, for claims of "about as good": the paper's own difference, rounded up.
    if_differ: the claim is tested only if some of these cells differ.
    """

    text: str
    source: str
    pairs: tuple[tuple[CellPattern, CellPattern], ...]
    margin: float = 0.0
    if_differ: tuple[CellPattern, CellPattern] | None = None


def than(better: CellPattern, row: str, table: str = "", column: str = "") -> tuple[tuple[CellPattern, CellPattern], ...]:
    """A comparison with another row, by default of the same table and column."""
    return ((better, CellPattern(table or better.table, row, column or better.column)),)
