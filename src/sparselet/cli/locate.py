"""`sparselet locate`."""

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from sparselet.api.locating import locate
from sparselet.cli.merging import Many
from sparselet.cli.terminal import progress, quiet_libraries, show_analysis, word
from sparselet.io.paths import check_output


def locate_(
    experts: Annotated[list[str], Parameter(negative="")],
    /,
    *,
    against: Annotated[list[str] | None, Many] = None,
    model: str | None = None,
    density: float = 0.01,
    structure: bool = True,
    out: Path | None = None,
    json: bool = False,
) -> None:
    """Measure where the changes of experts of any kind lie, each number beside what chance would give.

    Which share of the entries carries 50, 90 and 99 % of the squared change; what does not change, in float32 and in bfloat16;
    ranks, rows, columns and heads; and of several experts how much their masks, largest entries and directions overlap.

        sparselet locate my-expert --out where.html
        sparselet locate seed-1 seed-2 --against other-task --model packaged:smollm2-135m

    Parameters
    ----------
    experts
        Directories or hub names of adapters, LoRAs or full checkpoints.
    against
        Compare each expert with each of these; by default the experts with one another.
    model
        Base model, which full checkpoints need; by default the one that the experts record, if it is on this machine.
    density
        Share of the largest entries at which pairs are compared.
    structure
        Measure ranks, rows, columns and heads too, which takes most of the time.
    out
        Write the pictures to this file, as one HTML page.
    json
        Print all numbers as JSON.
    """
    quiet_libraries()
    if out is not None:
        check_output(out, directory=False)
    with progress("locating") as callback:
        located = locate(experts, against or (), base=model, density=density, structure=structure, progress=callback)
    show_analysis(located, out, json, f"sparselet graft {word(experts[0])} --task TASK")
