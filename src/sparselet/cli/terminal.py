"""Output of every verb: progress, tables, lines, JSON.

Text may come from a file, a path or the hub. It is made `printable` and never interpreted as markup.
"""

import contextlib
import errno
import json
import logging
import math
import shlex
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from rich.box import ASCII
from rich.console import Console
from rich.logging import RichHandler
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.status import Status
from rich.table import Table
from rich.text import Text
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.utils import logging as transformers_logging

from sparselet.api.progress import ProgressCallback
from sparselet.cli.streams import LenientStream
from sparselet.errors import WriteFailed
from sparselet.io.printable import printable
from sparselet.result_table import ResultTable, cell_text

# No markup: square brackets are what files, paths and rows have in them.
out = Console(markup=False, emoji=False, highlight=False)
err = Console(markup=False, emoji=False, highlight=False, stderr=True)

SHADES = " ░▒▓█"
_WIDEST_TABLE = 2**20  # characters


def quiet_libraries(is_reporting: bool = True) -> None:
    """Show only our own messages and errors of libraries. is_reporting: False in a process for which another one reports."""
    warnings.filterwarnings("ignore", category=FutureWarning if is_reporting else Warning)
    warnings.formatwarning = lambda message, *_: f"warning: {printable(message)}\n"
    handler, libraries = (RichHandler(console=err, show_time=False, show_path=False) for _ in range(2))
    for each in (handler, libraries):
        each.addFilter(_make_printable)
    libraries.addFilter(lambda record: not record.name.startswith("sparselet"))
    logging.basicConfig(level=logging.ERROR, format="%(message)s", handlers=[libraries])
    logger = logging.getLogger("sparselet")
    logger.handlers = [handler]
    logger.setLevel(logging.INFO if is_reporting else logging.ERROR)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    logging.getLogger("absl").setLevel(logging.ERROR)


def _make_printable(record: logging.LogRecord) -> bool:
    record.msg, record.args = printable(record.getMessage()), ()
    return True


@contextlib.contextmanager
def progress(label: str) -> Iterator[ProgressCallback]:
    """A progress bar on standard error while the block runs; the callback it gets sets the bar."""
    with _bar() as bar:
        task = bar.add_task(printable(label), total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _bar() -> Progress:
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    return Progress(*columns, console=err, transient=True)


class TrainingProgress(TrainerCallback):
    """A progress bar over the optimizer steps, and a line for each epoch."""

    def __init__(self, label: str) -> None:
        self.label = printable(label)
        self.bar: Progress | None = None

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.bar = _bar()
        self.bar.start()
        self.task = self.bar.add_task(self.label, total=state.max_steps, completed=state.global_step)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.bar is not None:
            self.bar.update(self.task, completed=state.global_step)

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        losses = {key: row[key] for row in state.log_history for key in ("loss", "eval_loss") if key in row}
        note(
            f"{self.label}: epoch {state.epoch or 0:.2g}, training loss {losses.get('loss', float('nan')):.4f}, "
            f"validation loss {losses.get('eval_loss', float('nan')):.4f}"
        )

    def stop(self) -> None:
        """Remove the bar."""
        if self.bar is not None:
            self.bar.stop()


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print a table: floats to one decimal, all columns but the first aligned right."""
    shown = Table()
    for i, column in enumerate(columns):
        shown.add_column(Text(printable(column)), justify="left" if i == 0 else "right", overflow="fold")
    for row in rows:
        shown.add_row(*(Text(cell_text(cell)) for cell in row))
    _print(title, shown)


def show(shown: ResultTable) -> None:
    """Print a result as a table."""
    table(shown.title, shown.columns, shown.rows)


class Analysis(Protocol):
    """A result with tables, numbers and a page of pictures."""

    def tables(self) -> Sequence[ResultTable]: ...
    def as_json(self) -> Any: ...
    def write_page(self, file: Path) -> Path: ...


def show_analysis(result: Analysis, out: Path | None, json: bool, following: str) -> None:
    """Write a result's page to `out`, if that is given, and print its numbers as JSON, or its tables and what to do next."""
    if out is not None:
        result.write_page(out)
    if json:
        print_json(result.as_json())
        return
    for shown in result.tables():
        show(shown)
    if out is not None:
        say(f"Pictures written to {out}")
    if following:
        say(f"Next: {following}")


def facts(title: str, rows: Sequence[tuple[str, object]]) -> None:
    """Print names with their values, without a header."""
    shown = Table(show_header=False)
    for _ in range(2):
        shown.add_column(overflow="fold")
    for name, value in rows:
        shown.add_row(Text(printable(name)), Text(printable(value)))
    _print(title, shown)


def _print(title: str, shown: Table) -> None:
    """Print a table under its title. Off a terminal it is as wide as its content, so that no name is broken."""
    if "utf" not in out.encoding:
        shown.box = ASCII
    if not out.is_terminal:
        shown.width = out.measure(shown, options=out.options.update(width=_WIDEST_TABLE)).maximum
    heading(title)
    out.print(shown, soft_wrap=not out.is_terminal)


def finite(content: Any) -> Any:
    """`content` with null for each number that JSON cannot hold."""
    if isinstance(content, Mapping):
        return {key: finite(value) for key, value in content.items()}
    if isinstance(content, (list, tuple)):
        return [finite(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content


def print_json(content: Mapping[str, Any]) -> None:
    """Print machine-readable output and nothing else, NaN and infinity as null.

    Raises WriteFailed where it is written to a file that cannot hold it.
    """
    text = json.dumps(finite(content), indent=2, sort_keys=True, allow_nan=False)
    print(text.replace("\x7f", "\\u007f"), flush=True)
    failure = sys.stdout.failure if isinstance(sys.stdout, LenientStream) else None
    if isinstance(failure, OSError) and failure.errno != errno.EPIPE:
        raise WriteFailed(f"cannot write the result to standard output: {failure.strerror}.")


def say(*lines: str) -> None:
    """Print unstyled lines."""
    _lines(out, lines)


def note(*lines: str) -> None:
    """Print lines on standard error, which are no part of the result."""
    _lines(err, lines)


def _lines(console: Console, lines: Sequence[str]) -> None:
    for line in lines:
        console.print(Text(printable(line)), soft_wrap=True)


def heading(line: str) -> None:
    """Print a bold line."""
    out.print(Text(printable(line), style="bold"), soft_wrap=True)


def status(line: str) -> Status:
    """A spinner with this line on standard error."""
    return err.status(Text(printable(line)))


def word(text: object) -> str:
    """A path or name, quoted as one word of a shell command."""
    return shlex.quote(str(text))
