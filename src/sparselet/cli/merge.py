"""`sparselet merge`."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import Parameter

from sparselet.api.exporting import export
from sparselet.api.merging import RECIPE_FILE, MergeResult, merge_recipe, split
from sparselet.cli.merging import MergeFlags
from sparselet.cli.terminal import print_json, progress, quiet_libraries, say, show, word
from sparselet.errors import ConfigError
from sparselet.io.paths import check_output
from sparselet.io.temporaries import temporary_directory
from sparselet.merging import MergeRecipe, per_expert_methods
from sparselet.models import MODEL_DTYPES

logger = logging.getLogger("sparselet")


def merge_(
    experts: Annotated[list[str] | None, Parameter(negative="")] = None,
    /,
    *,
    out: Path,
    flags: Annotated[MergeFlags | None, Parameter(name="*")] = None,
    keep_counts: bool = False,
    workers: int | None = None,
    as_: Annotated[Literal["adapter", "checkpoint"], Parameter(name="--as")] = "adapter",
    dtype: str | None = None,
    per_task: Path | None = None,
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
    as_
        Flag of an earlier version: `export --to checkpoint`.
    dtype
        Flag of an earlier version, of that checkpoint.
    per_task
        Flag of an earlier version: `split`.
    json
        Print the result as JSON.
    """
    quiet_libraries()
    check_output(out)
    recipe = (flags or MergeFlags()).read(experts, keep_counts)
    _refuse_together(recipe, as_, dtype, per_task, out)
    if as_ == "checkpoint":
        _write_checkpoint(recipe, out, dtype or "float32", workers, json)
        return
    with progress("merging") as callback:
        merged = merge_recipe(recipe, out, workers=workers, progress=callback)
    parts = [] if per_task is None else _split(recipe, per_task, workers)
    if json:
        print_json(describe_merge(merged) | ({"per_task": [str(path) for path in parts]} if parts else {}))
    else:
        show_merge(merged, *([f"One adapter an expert: {', '.join(map(str, parts))}"] if parts else []))


# Flags of earlier versions, which have verbs of their own now.


def _refuse_together(recipe: MergeRecipe, as_: str, dtype: str | None, per_task: Path | None, out: Path) -> None:
    """Judge the earlier flags before the work. Raises ConfigError, OutputExists."""
    if as_ != "checkpoint" and dtype is not None:
        raise ConfigError("--dtype goes with --as checkpoint only.")
    if as_ == "checkpoint" and (recipe.keep_counts or per_task is not None):
        raise ConfigError("--as checkpoint does not go with --keep-counts or --per-task.")
    if as_ == "checkpoint" and recipe.model is None:
        raise ConfigError("--as checkpoint needs the base model; give --model.")
    if dtype is not None and dtype not in MODEL_DTYPES:
        raise ConfigError(f"dtype must be one of {', '.join(MODEL_DTYPES)}, got {dtype!r}.")
    if per_task is not None:
        if recipe.method not in per_expert_methods():
            raise ConfigError(f"--per-task goes with method {' or '.join(per_expert_methods())}, not with {recipe.method}.")
        first, second = per_task.resolve(), out.resolve()
        if first == second or first in second.parents or second in first.parents:
            raise ConfigError(f"--per-task {per_task} and --out {out} must be apart from each other.")
        check_output(per_task)


def _write_checkpoint(recipe: MergeRecipe, out: Path, dtype: str, workers: int | None, json: bool) -> None:
    """Merge beside the output, and export the merge as a checkpoint."""
    logger.warning("--as checkpoint is `sparselet export MERGED --to checkpoint` now.")
    with temporary_directory(out.with_name("merged")) as scratch:
        with progress("merging") as callback:
            merged = merge_recipe(recipe, scratch / "merged", workers=workers, progress=callback)
        export(str(scratch / "merged"), "checkpoint", out, base=recipe.model, dtype=dtype)
        if json:
            print_json(describe_merge(merged) | {"output": str(out)})
            return
        show(merged.table())
        say(f"Written to {out}", f"Next: sparselet eval --task TASK --model {word(out)}")


def _split(recipe: MergeRecipe, out: Path, workers: int | None) -> Sequence[Path]:
    """Write what the merge leaves of each expert."""
    logger.warning("--per-task is `sparselet split EXPERTS` now.")
    with progress("masking") as callback:
        how = (recipe.method, recipe.weights, recipe.parameters)
        return split(recipe.experts, out, *how, base=recipe.model, workers=workers, progress=callback).paths


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
    say(
        *lines,
        f"A merged entry was selected by {merged.experts_per_entry:.2f} experts on average.",
        f"Written to {out}, with {RECIPE_FILE}",
        f"Next: sparselet eval --task TASK --adapter {word(out)}",
    )
