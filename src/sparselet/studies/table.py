"""A table of a study before anything is measured: which units each of its cells is the mean of."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal

from sparselet.studies.engine.unit import Unit

Measure = Literal["rougeL", "exact_match", "parameters", "active_layers"]


@dataclass(frozen=True)
class Cell:
    """A mean over units, one a task; of several draws or seeds, the mean of their means.

    draws: the units of each draw. measure: which number of their results. paper: the paper's figure, for comparison.
    minus: is subtracted, task by task. percent_of: the mean of this is 100.
    """

    draws: tuple[tuple[Unit, ...], ...]
    measure: Measure = "rougeL"
    paper: float | None = None
    minus: "Cell | None" = None
    percent_of: "Cell | None" = None

    def units(self) -> Iterator[Unit]:
        """All units that it is computed from."""
        for draw in self.draws:
            yield from draw
        for other in (self.minus, self.percent_of):
            if other is not None:
                yield from other.units()


@dataclass(frozen=True)
class Chart:
    """How a table is drawn. lines: over the numbers `x`, one a row, on a logarithmic axis if `log`. dots: one a row and column.

    series: which line a row belongs to, in the rows' order (lines only). columns: those drawn, by name; all if empty.
    """

    kind: Literal["lines", "dots"]
    x_label: str = ""
    x: tuple[float, ...] = ()
    series: tuple[str, ...] = ()
    log: bool = False
    columns: tuple[str, ...] = ()


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
        return [unit for row in self.rows.values() for cell in row if cell for unit in cell.units()]
