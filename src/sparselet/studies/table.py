"""A table of a study before anything is measured: the units that each cell is the mean of."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal

from sparselet.studies.engine.unit import AnalysisUnit, EvalUnit, TrainUnit

# Units that have numbers.
Measured = TrainUnit | EvalUnit | AnalysisUnit


@dataclass(frozen=True)
class Cell:
    """A mean over units, one a task; of several draws or seeds, the mean of their means.

    draws: the units of each draw. measure: the number of their results to take. paper: the paper's figure, for comparison.
    minus: the cell to subtract, task by task. percent_of: the cell whose mean is 100 %. worst: the lowest task's number in the
    mean's place.
    """

    draws: tuple[tuple[Measured, ...], ...]
    measure: str = "rougeL"
    paper: float | None = None
    minus: "Cell | None" = None
    percent_of: "Cell | None" = None
    worst: bool = False

    def units(self) -> Iterator[Measured]:
        """All units that its number needs."""
        for draw in self.draws:
            yield from draw
        for cell in (self.minus, self.percent_of):
            if cell is not None:
                yield from cell.units()


@dataclass(frozen=True)
class Chart:
    """A chart of a table. lines: a point for each row at `x`, on a logarithmic axis if `log`. dots: a dot for each cell.

    series: the name of each row's line (lines only). columns: names of the columns to draw; all if empty.
    """

    kind: Literal["lines", "dots"]
    x_label: str = ""
    x: tuple[float, ...] = ()
    series: tuple[str, ...] = ()
    log: bool = False
    columns: tuple[str, ...] = ()


@dataclass(frozen=True)
class Table:
    """A table: `rows` maps a row's name to its cells, one for each column; None is an empty cell.

    source: the place in the paper. note: differences from the paper's table.
    """

    title: str
    source: str
    columns: tuple[str, ...]
    rows: Mapping[str, tuple[Cell | None, ...]]
    note: str = ""
    charts: tuple[Chart, ...] = field(default=())

    def units(self) -> list[Measured]:
        """The units that its cells need."""
        return [unit for row in self.rows.values() for cell in row if cell for unit in cell.units()]
