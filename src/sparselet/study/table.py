"""A table of a study before anything is measured: which units each of its cells is the mean of."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from sparselet.study.unit import Unit

Measure = Literal["rougeL", "exact_match", "parameters", "active_layers"]


@dataclass(frozen=True)
class Cell:
    """A mean over units, one a task; of several draws or seeds, the mean of their means.

    draws: the units of each draw. measure: which number of their results. paper: the paper's figure, for comparison.
    """

    draws: tuple[tuple[Unit, ...], ...]
    measure: Measure = "rougeL"
    paper: float | None = None


@dataclass(frozen=True)
class Chart:
    """How a table is drawn. lines: over the numbers `x`, one a row, on a logarithmic axis if `log`. dots: a dot a row and column.

    series: which line a row belongs to, in the rows' order (lines only).
    """

    kind: Literal["lines", "dots"]
    x_label: str = ""
    x: tuple[float, ...] = ()
    series: tuple[str, ...] = ()
    log: bool = False


@dataclass(frozen=True)
class Table:
    """One table: `rows` maps a row's name to its cells, one a column; None is an empty cell.

    source: where in the paper. note: what differs from the paper's here, such as arms left out.
    """

    title: str
    source: str
    columns: tuple[str, ...]
    rows: Mapping[str, tuple[Cell | None, ...]]
    note: str = ""
    charts: tuple[Chart, ...] = field(default=())

    def units(self) -> list[Unit]:
        """The units that its cells read."""
        return [unit for row in self.rows.values() for cell in row if cell for draw in cell.draws for unit in draw]
