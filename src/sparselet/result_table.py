"""Results as tables: text for a terminal, HTML for a notebook."""

from abc import abstractmethod
from dataclasses import dataclass
from html import escape

from sparselet.io.printable import printable


@dataclass(frozen=True)
class ResultTable:
    """A titled table. columns: its header, empty for none. rows: cells of any type; floats are shown to one decimal."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[object, ...], ...]

    def texts(self) -> list[list[str]]:
        """The rows as text."""
        return [[cell_text(cell) for cell in row] for row in self.rows]

    def __str__(self) -> str:
        lines = [*([list(map(printable, self.columns))] if self.columns else []), *self.texts()]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        aligned = [[text.rjust(width) for text, width in zip(line, widths, strict=True)] for line in lines]
        for line, texts in zip(aligned, lines, strict=True):
            line[0] = texts[0].ljust(widths[0])
        return "\n".join([printable(self.title), *("  ".join(line).rstrip() for line in aligned)])

    def _repr_html_(self) -> str:
        header = "".join(f"<th>{escape(printable(column))}</th>" for column in self.columns)
        body = "".join(f"<tr>{''.join(f'<td>{escape(text)}</td>' for text in row)}</tr>" for row in self.texts())
        head = f"<thead><tr>{header}</tr></thead>" if header else ""
        return f"<table><caption>{escape(printable(self.title))}</caption>{head}<tbody>{body}</tbody></table>"


class ShownAsTable:
    """A result that prints as a table, and is one in a notebook."""

    @abstractmethod
    def table(self) -> ResultTable:
        """The result as a table."""

    def __str__(self) -> str:
        return str(self.table())

    def _repr_html_(self) -> str:
        return self.table()._repr_html_()


class ShownAsTables:
    """A result of several tables, which prints them one after another."""

    @abstractmethod
    def tables(self) -> tuple[ResultTable, ...]:
        """The result as tables."""

    def __str__(self) -> str:
        return "\n\n".join(map(str, self.tables()))

    def _repr_html_(self) -> str:
        return "".join(table._repr_html_() for table in self.tables())


def cell_text(cell: object) -> str:
    """A cell as text on one line, safe to show; a float to one decimal."""
    return f"{cell:.1f}" if isinstance(cell, float) else printable(cell)
