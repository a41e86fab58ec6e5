"""`sparselet merge`."""

from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from sparselet.api.merging import RECIPE_FILE, MergeResult, merge_recipe
from sparselet.cli.merging import MergeFlags
from sparselet.cli.terminal import print_json, progress, quiet_libraries, say, show, word
from sparselet.io.paths import check_output


def merge_(
    experts: Annotated[list[str] | None, Parameter(negative="")] = None,
    /,
    *,
    out: Path,
    flags: Annotated[MergeFlags | None, Parameter(name="*")] = None,
    keep_counts: bool = False,
    workers: int | None = None,
    json: bool = False,
) -> None:
    """Merge experts of one base model into one adapter.

    Experts are sparse adapters, PEFT adapters (LoRA, SHiRA, Super-Tuning) and full checkpoints, on the disk or on the hub,
    mixed freely; they may differ in masks, densities, block sizes and targets. `overlap`, the default, divides the sum of
    the changes of an entry by the number of experts that selected it (Eq. 4 of the sparse-adapters paper); docs/methods.md
    describes all methods and their parameters. The recipe is written beside the output and runs again with --recipe.

    Related verbs: `update` adds experts to a merge or removes them, `search` chooses weights or parameters by score, `split`
    writes what a merge leaves of each expert, `export --to checkpoint` writes the base model with the merge in its weights.

        sparselet merge expert-a expert-b expert-c --out merged

        sparselet merge expert-a expert-b --method ties --set density=0.2 density_of=nonzeros --out merged

        sparselet merge expert-a lora-b full-c --model packaged:smollm2-135m --out merged

    Parameters
    ----------
    experts
        Directories or hub names (org/name, org/name@revision).
    out
        Directory to write to; it must not exist.
    keep_counts
        Keep what `sparselet update` needs (overlap only; twelve bytes an entry more).
    workers
        Threads; the result does not depend on it.
    json
        Print the result as JSON.
    """
    quiet_libraries()
    check_output(out)
    recipe = (flags or MergeFlags()).read(experts, keep_counts)
    with progress("merging") as callback:
        merged = merge_recipe(recipe, out, workers=workers, progress=callback)
    if json:
        print_json(describe_merge(merged))
    else:
        show_merge(merged)


def describe_merge(merged: MergeResult) -> dict[str, Any]:
    """A merge as JSON values."""
    return {
        "output": str(merged.adapter.path),
        "method": merged.recipe.method,
        "entries": merged.adapter.nnz,
        "experts_per_entry": merged.experts_per_entry,
    }


def show_merge(merged: MergeResult, *lines: str) -> None:
    """Print a merge. lines: printed after its parameters."""
    out = merged.adapter.path
    show(merged.table())
    if merged.recipe.parameters:
        say("Parameters: " + ", ".join(f"{name} = {value}" for name, value in merged.recipe.parameters.items()))
    if merged.recipe.layer_scaling is not None:
        say("Layers scaled by alpha = {:g}, beta = {:g}".format(*merged.recipe.layer_scaling))
    say(
        *lines,
        f"A merged entry was selected by {merged.experts_per_entry:.2f} experts on average.",
        f"Written to {out}, with {RECIPE_FILE}",
        f"Next: sparselet eval --task TASK --adapter {word(out)}",
    )
