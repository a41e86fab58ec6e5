"""The output of `sparselet study`: a live view of the run, the plan, failures, and a summary of the results."""

import contextlib
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from rich.console import Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from sparselet.api.studying import StudyResult
from sparselet.cli.terminal import err, note, say, show, table
from sparselet.io.printable import printable
from sparselet.report.quantities import format_bytes, format_duration
from sparselet.studies.engine.plan import Progress
from sparselet.studies.engine.run import OnProgress
from sparselet.studies.engine.unit import KINDS

MINUTE = 60.0
BAR_WIDTH = 24
FAILURES_SHOWN = 8


@contextlib.contextmanager
def live(silent: bool = False) -> Iterator[OnProgress]:
    """Show a running study on standard error: a live view on a terminal, else a line a minute. silent: nothing."""
    if silent:
        yield lambda progress: None
    elif err.is_terminal:
        with Live(console=err, transient=True, refresh_per_second=4) as live_view:
            yield lambda progress: live_view.update(view_of(progress))
    else:
        yield _lines()


def show_plan(described: Mapping[str, Any]) -> None:
    """The output of `--dry-run`."""
    rows = [
        [name, *(row[kind] for kind in KINDS), row["left"], format_duration(row["seconds"])]
        for name, row in described["tables"].items()
    ]
    kinds = [described[kind] for kind in KINDS]
    rows.append(["all", *kinds, described["left"], ""])
    table("Units of each table that no table before it has", ["table", *KINDS, "left", "work"], rows)
    rough = " (rough: not all kinds of units have been measured here)" if described["rough"] and described["left"] else ""
    say(
        f"{described['done']} units are done{_failures(described['failed'])}; {described['left']} are left.",
        f"About {format_duration(described['seconds'])} with {described['workers']} at a time, and "
        f"{format_bytes(described['bytes'])} of disk{rough}.",
    )
    budget = described.get("budget_hours")
    if budget is not None and described["seconds"] > 3600 * budget:
        say(f"That is more than the budget of {budget:g} hours.")


def show_state(state: Mapping[str, Any]) -> None:
    """The output of `--status`."""
    kinds = [kind for kind in KINDS if kind in state["done"] or kind in state["missing"]]
    failed = Counter(unit["kind"] for unit in state["failed"])
    rows = [[kind, state["done"].get(kind, 0), state["missing"].get(kind, 0), failed[kind]] for kind in kinds]
    table("Units", ["", "done", "missing", "of these failed"], rows)
    show_failures(state)


def show_failures(state: Mapping[str, Any]) -> None:
    """The failed units with their errors, and the number of units that wait for each."""
    for unit in state["failed"][:FAILURES_SHOWN]:
        say(f"failed: {unit['kind']} {unit['label']} ({unit['key']})", f"        {unit['error']}")
    if len(state["failed"]) > FAILURES_SHOWN:
        say(f"… and {len(state['failed']) - FAILURES_SHOWN} more; --json lists all.")
    for label, count in Counter(unit["waits_for"] for unit in state["blocked"]).items():
        say(f"blocked: {count} units wait for {label}")


def show_results(result: StudyResult) -> None:
    """The best row of each column of each table, and the verdicts of the claims."""
    show(result.table())
    verdicts = Counter(claim["verdict"] for claim in result.results["claims"])
    if verdicts:
        say("Claims: " + ", ".join(f"{verdict}: {count}" for verdict, count in verdicts.most_common()) + ".")


def _failures(count: int) -> str:
    return f", {count} failed at the last attempt" if count else ""


def _line(progress: Progress) -> str:
    parts = [f"{len(progress.done)} of {len(progress.units)} units done", f"{len(progress.running)} running"]
    if progress.failed:
        parts.append(f"{len(progress.failed)} failed")
    if progress.blocked:
        parts.append(f"{len(progress.blocked)} blocked")
    return f"{', '.join(parts)}; about {format_duration(progress.seconds_left)} left"


def view_of(progress: Progress) -> Group:
    """A bar for the study and one for each running unit, and the last failures."""
    rows = Table.grid(padding=(0, 2))
    for key, fraction in sorted(progress.running.items(), key=lambda pair: -pair[1]):
        unit = progress.units[key]
        rows.add_row(
            ProgressBar(1.0, fraction, width=BAR_WIDTH),
            unit.kind,
            Text(printable(unit.label), overflow="ellipsis", no_wrap=True),
        )
    failed = [
        Text(printable(f"failed: {progress.units[key].label}: {error}")) for key, error in list(progress.failed.items())[-3:]
    ]
    return Group(ProgressBar(len(progress.units), len(progress.done), width=60), Text(_line(progress)), rows, *failed)


def _lines() -> OnProgress:
    last = 0.0

    def watch(progress: Progress) -> None:
        nonlocal last
        if time.monotonic() - last >= MINUTE:
            last = time.monotonic()
            note(_line(progress))

    return watch
