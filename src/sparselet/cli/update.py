"""`sparselet update`."""

from pathlib import Path
from typing import Annotated

from sparselet.api.merging import experts_table, update
from sparselet.cli.merging import Many
from sparselet.cli.terminal import print_json, progress, quiet_libraries, say, show, word


def update_(
    merged: str,
    /,
    *,
    out: Path,
    add: Annotated[list[str] | None, Many] = None,
    remove: Annotated[list[str] | None, Many] = None,
    weights: Annotated[list[float] | None, Many] = None,
    model: str | None = None,
    workers: int | None = None,
    json: bool = False,
) -> None:
    """Add experts to a merge, or remove experts from it, without the other experts.

    The merge must have been written by `sparselet merge --keep-counts`. The result is byte for byte a merge of the experts
    that are then in it, and can be updated again.

        sparselet merge expert-a expert-b --keep-counts --out merged
        sparselet update merged --add expert-c --remove expert-a --out merged-2

    Parameters
    ----------
    merged
        The merge: a directory or a hub name.
    out
        Directory to write to; it must not exist.
    add
        Experts to add: directories or hub names.
    remove
        Experts to remove; they must be the same as when they were merged.
    weights
        One factor for each expert to add, 1 each by default.
    model
        Base model; full checkpoints among the experts need it.
    workers
        Threads; the result does not depend on it.
    json
        Print the result as JSON.
    """
    quiet_libraries()
    with progress("merging") as callback:
        updated = update(
            merged, out, add=add or (), remove=remove or (), weights=weights, base=model, workers=workers, progress=callback
        )
    table = experts_table(updated)
    if json:
        print_json({"output": str(out), "method": "overlap", "entries": updated.nnz, "experts": len(table.rows)})
        return
    show(table)
    say(f"{updated.nnz:,} entries. Written to {out}", f"Next: sparselet eval --task TASK --adapter {word(out)}")
