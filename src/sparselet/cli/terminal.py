"""What every verb shows a person: progress, tables, where the output went."""

import contextlib
import json
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.logging import RichHandler
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.utils import logging as transformers_logging

out = Console()
err = Console(stderr=True)

SHADES = " ░▒▓█"


def quiet_libraries() -> None:
    """Only our own messages, and the libraries' errors."""
    warnings.filterwarnings("ignore", category=FutureWarning)
    logging.basicConfig(
        level=logging.ERROR, format="%(message)s", handlers=[RichHandler(console=err, show_time=False, show_path=False)]
    )
    logging.getLogger("sparselet").setLevel(logging.INFO)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    logging.getLogger("absl").setLevel(logging.ERROR)


@contextlib.contextmanager
def progress(total: float, label: str) -> Iterator[Callable[[float], None]]:
    """A progress bar on standard error; the block is given a function to advance it."""
    with _bar() as bar:
        task = bar.add_task(label, total=total)
        yield lambda amount: bar.advance(task, amount)


def _bar() -> Progress:
    columns = (
        TextColumn("{task.description}"),
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
        self.label = label
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
        err.print(
            f"{self.label}: epoch {state.epoch or 0:.2g}, training loss {losses.get('loss', float('nan')):.4f}, "
            f"validation loss {losses.get('eval_loss', float('nan')):.4f}",
            highlight=False,
        )

    def stop(self) -> None:
        """Take the bar away, whatever happened."""
        if self.bar is not None:
            self.bar.stop()


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print a table; numbers to one decimal, aligned right."""
    shown = Table(title=title, title_justify="left", title_style="bold")
    for i, column in enumerate(columns):
        shown.add_column(column, justify="left" if i == 0 else "right")
    for row in rows:
        shown.add_row(*(f"{cell:.1f}" if isinstance(cell, float) else str(cell) for cell in row))
    out.print(shown)


def facts(title: str, rows: Sequence[tuple[str, object]]) -> None:
    """Print names with their values, under no header."""
    shown = Table("", "", title=title, title_justify="left", title_style="bold", show_header=False)
    for name, value in rows:
        shown.add_row(name, str(value))
    out.print(shown)


def print_json(content: Mapping[str, Any]) -> None:
    """Print machine-readable output and nothing else."""
    print(json.dumps(content, indent=2, sort_keys=True))


def say(*lines: str) -> None:
    """Print lines for a person, unstyled."""
    for line in lines:
        out.print(line, highlight=False, markup=False, soft_wrap=True)
