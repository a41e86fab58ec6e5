"""Results as tables: text for a terminal, HTML for a notebook."""

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
        aligned = [
            "  ".join(
                text.rjust(width) if i else text.ljust(width) for i, (text, width) in enumerate(zip(line, widths, strict=True))
            )
            for line in lines
        ]
        return "\n".join([printable(self.title), *(line.rstrip() for line in aligned)])

    def _repr_html_(self) -> str:
        header = "".join(f"<th>{escape(printable(column))}</th>" for column in self.columns)
        body = "".join(f"<tr>{''.join(f'<td>{escape(text)}</td>' for text in row)}</tr>" for row in self.texts())
        head = f"<thead><tr>{header}</tr></thead>" if header else ""
        return f"<table><caption>{escape(printable(self.title))}</caption>{head}<tbody>{body}</tbody></table>"


def cell_text(cell: object) -> str:
    """A cell as text on one line, safe to show; a float to one decimal."""
    return f"{cell:.1f}" if isinstance(cell, float) else printable(cell)
