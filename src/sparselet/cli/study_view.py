"""What `sparselet study` shows: a live view while it runs, the plan, failures, and the results in short."""

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

from sparselet.cli.terminal import err, note, say, table
from sparselet.io.printable import printable
from sparselet.report.quantities import clock, size
from sparselet.studies.engine.plan import Progress
from sparselet.studies.engine.run import Watch

MINUTE = 60.0
BAR = 24
SHOWN = 8  # failures that are shown in full


@contextlib.contextmanager
def live(silent: bool = False) -> Iterator[Watch]:
    """A view of a running study on standard error; where that is no terminal, a line a minute. silent: neither."""
    if silent:
        yield lambda progress: None
    elif err.is_terminal:
        with Live(console=err, transient=True, refresh_per_second=4) as shown:
            yield lambda progress: shown.update(_view(progress))
    else:
        yield _lines()


def tell_plan(described: Mapping[str, Any]) -> None:
    """The plan of `--dry-run`."""
    rows = [
        [name, row["train"], row["merge"], row["evaluate"], row["left"], clock(row["seconds"])]
        for name, row in described["tables"].items()
    ]
    kinds = [described[kind] for kind in ("train", "merge", "evaluate")]
    rows.append(["all", *kinds, described["left"], ""])
    table("Units of each table that no table before it has", ["table", "train", "merge", "evaluate", "left", "work"], rows)
    rough = " (rough: not all kinds of units have been measured here)" if described["rough"] and described["left"] else ""
    say(
        f"{described['done']} units are done{_failures(described['failed'])}; {described['left']} are left.",
        f"About {clock(described['seconds'])} with {described['workers']} at a time, and {size(described['bytes'])} of "
        f"disk{rough}.",
    )
    budget = described.get("budget_hours")
    if budget is not None and described["seconds"] > 3600 * budget:
        say(f"That is more than the budget of {budget:g} hours.")


def tell_state(state: Mapping[str, Any]) -> None:
    """What `--status` tells."""
    kinds = [kind for kind in ("train", "merge", "evaluate") if kind in state["done"] or kind in state["missing"]]
    waiting = Counter(one["kind"] for one in state["failed"])
    rows = [[kind, state["done"].get(kind, 0), state["missing"].get(kind, 0), waiting[kind]] for kind in kinds]
    table("Units", ["", "done", "missing", "of these failed"], rows)
    tell_failures(state)


def tell_failures(state: Mapping[str, Any]) -> None:
    """Why units failed, and what waits for them."""
    for one in state["failed"][:SHOWN]:
        say(f"failed: {one['kind']} {one['label']} ({one['key']})", f"        {one['error']}")
    if len(state["failed"]) > SHOWN:
        say(f"… and {len(state['failed']) - SHOWN} more; --json lists all.")
    for label, count in Counter(one["waits_for"] for one in state["blocked"]).items():
        say(f"blocked: {count} units wait for {label}")


def tell_results(found: Mapping[str, Any]) -> None:
    """Of each table the best row of each column, and how the claims stand."""
    rows = []
    for name, own in found["tables"].items():
        cells = [row["cells"] for row in own["rows"]]
        missing = sum(cell["missing"] for row in cells for cell in row if cell)
        for i, column in enumerate(own["columns"]):
            measured = [(row[i]["mean"], j) for j, row in enumerate(cells) if row[i] and row[i]["mean"] is not None]
            if measured and cells[measured[0][1]][i]["measure"] in ("rougeL", "exact_match"):
                best, j = max(measured, key=lambda pair: (pair[0], -pair[1]))
                rows.append([name, column, own["rows"][j]["label"], best, missing or ""])
                name = ""
                missing = 0
    table("Best of each column", ["table", "column", "row", "mean", "missing units"], rows)
    verdicts = Counter(claim["verdict"] for claim in found["claims"])
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
    return f"{', '.join(parts)}; about {clock(progress.seconds_left)} left"


def _view(progress: Progress) -> Group:
    rows = Table.grid(padding=(0, 2))
    for key, fraction in sorted(progress.running.items(), key=lambda pair: -pair[1]):
        unit = progress.units[key]
        rows.add_row(
            ProgressBar(1.0, fraction, width=BAR), unit.kind, Text(printable(unit.label), overflow="ellipsis", no_wrap=True)
        )
    failed = [
        Text(printable(f"failed: {progress.units[key].label}: {error}")) for key, error in list(progress.failed.items())[-3:]
    ]
    return Group(ProgressBar(len(progress.units), len(progress.done), width=60), Text(_line(progress)), rows, *failed)


def _lines() -> Watch:
    last = 0.0

    def watch(progress: Progress) -> None:
        nonlocal last
        if time.monotonic() - last >= MINUTE:
            last = time.monotonic()
            note(_line(progress))

    return watch
