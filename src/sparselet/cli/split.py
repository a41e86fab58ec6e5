"""`sparselet split`."""

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from sparselet.api.merging import split
from sparselet.cli.merging import Many, parse_parameters
from sparselet.cli.terminal import print_json, progress, quiet_libraries, say, show
from sparselet.merging import per_expert_methods


def split_(
    experts: Annotated[list[str], Parameter(negative="")],
    /,
    *,
    out: Path,
    method: Annotated[str, Parameter(help=f"How to merge: {' or '.join(per_expert_methods())}.")] = "emr",
    weights: Annotated[list[float] | None, Many] = None,
    set_: Annotated[list[str] | None, Parameter(name="--set", consume_multiple=True, negative="")] = None,
    model: str | None = None,
    workers: int | None = None,
    json: bool = False,
) -> None:
    """Write what a merge leaves of each expert, an adapter for each: the merged change under that expert's mask.

    A model that knows its task can use its own part of a merge instead of the whole (EMR-Merging, TALL masks); all parts
    together need little more room than one merge. Each adapter is named by its expert's task.

        sparselet split expert-a expert-b --out parts
        sparselet split expert-a expert-b --method consensus --out parts

    Parameters
    ----------
    experts
        Directories or hub names (org/name, org/name@revision).
    out
        Directory that gets a directory for each expert; it must not exist.
    weights
        One factor an expert, 1 each by default.
    set_
        Parameters of the method, as name=value.
    model
        Base model; full checkpoints among the experts need it.
    workers
        Threads; the result does not depend on it.
    json
        Print the result as JSON.
    """
    quiet_libraries()
    parameters = parse_parameters(set_)
    with progress("masking") as callback:
        parts = split(experts, out, method, weights, parameters, base=model, workers=workers, progress=callback)
    if json:
        print_json({"output": str(out), "method": method, "adapters": [str(path) for path in parts.paths]})
        return
    show(parts.table())
    say(f"Written to {out}", "Next: sparselet eval --task TASK --adapter " + str(parts.paths[0]))
