"""`merge`, `merge_recipe`, `update`, `split`: experts into one, and a merge back into experts."""

from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sparselet.adapter import AdapterFile, SparseAdapter, as_expert
from sparselet.api.opening import open_experts
from sparselet.api.progress import ProgressCallback, StepCounter
from sparselet.errors import ArgumentError, ConfigError
from sparselet.expert import Expert
from sparselet.io.atomic import atomic_directory, write_text
from sparselet.io.json_files import write_json
from sparselet.io.paths import check_output
from sparselet.merging import (
    MergeRecipe,
    merge_per_expert,
    merge_to,
    merge_with_counts,
    read_recipe,
    recipe_text,
    update_merge,
)
from sparselet.merging import merge as merge_in_memory
from sparselet.merging.default_method import default_method
from sparselet.merging.engine.plan import ExpertSource, Weight
from sparselet.merging.layer_scaling import LayerScaling
from sparselet.merging.methods import complete_parameters
from sparselet.result_table import ResultTable, ShownAsTable

RECIPE_FILE = "recipe.toml"
FALLBACK = "overlap"  # the method of parameters or counts that come without one
SHOWN_PATTERNS = 4  # of a weight, in a table


@dataclass(frozen=True)
class MergeResult(ShownAsTable):
    """A merge that was written to a directory.

    recipe: what was merged. entries: selected entries of each expert, in the recipe's order. tasks: of each expert.
    """

    adapter: AdapterFile
    recipe: MergeRecipe
    tasks: tuple[str, ...]
    entries: tuple[int, ...]

    @property
    def experts_per_entry(self) -> float:
        """Entries of all experts for each one of the merge: how many selected it, where the merge keeps the union of masks."""
        return sum(self.entries) / max(1, self.adapter.nnz)

    def table(self) -> ResultTable:
        """An expert a row, the merged adapter last."""
        counts = [f"{count:,}" for count in (*self.entries, self.adapter.nnz)]
        weights = [*map(weight_text, self.recipe.weights), ""]
        rows = zip((*self.recipe.experts, "merged"), (*self.tasks, ""), weights, counts, strict=True)
        return ResultTable(f"Merged by {self.recipe.method}", ("expert", "task", "weight", "entries"), tuple(rows))


def merge(
    experts: Sequence[ExpertSource],
    method: str | None = None,
    weights: Sequence[Weight] | None = None,
    parameters: Mapping[str, Any] | None = None,
    *,
    layer_scaling: LayerScaling | None = None,
    base: str | Path | None = None,
    out: str | Path | None = None,
    keep_counts: bool = False,
    workers: int | None = None,
    progress: ProgressCallback | None = None,
    **values: Any,
) -> SparseAdapter | AdapterFile:
    """Merge experts of one base model into one adapter.

        merged = sl.merge([expert, "their/lora", "full-checkpoint"], "ties", density=0.3, base="org/model")

    experts: adapters in memory, directories and hub names, mixed: sparse adapters, PEFT adapters, full checkpoints. Their
        masks, densities, block sizes and targets may differ; an expert without a target does not change it.
    method: a name in `sl.METHODS`; by default regmean if all experts have profiles, else tsv; overlap where parameters or
        counts are asked for. weights: one an expert, 1 each by default: a number, or `{pattern of target names: number}`, of
        which the longest pattern that matches counts.
    parameters, values: parameters of the method, as a mapping or as keywords.
    layer_scaling: (α, β): layer l of L of the merged change is multiplied by α + β·l/(L − 1) (LiNeS).
    base: the base model, which full checkpoints need.
    out: write the merge to this directory, target by target, with a `recipe.toml` if all experts lie on the disk or the hub.
    keep_counts: also keep what `update` needs there; method overlap only.
    workers: threads; the result does not depend on their number. progress: reports targets, with `out` only.

    Returns a `SparseAdapter` in memory, or with `out` the adapter there, opened for reading.
    Raises, before any target is merged, ArgumentError, UnknownMethod, ShapeMismatch, WrongBase, NonFiniteValue and what opening
    an expert raises; OutputExists, WriteFailed.
    """
    assigned = {**(parameters or {}), **values}
    if method is None and (assigned or keep_counts):
        method = FALLBACK
    if method is not None:
        assigned = complete_parameters(method, assigned)
    if out is not None:
        check_output(out)
    elif keep_counts:
        raise ArgumentError("counts are kept beside a merge on the disk: set `out` with `keep_counts`.")
    opened = open_experts(experts, base)
    method = method or default_method(opened, weights)
    if out is None:
        return merge_in_memory(opened, method, weights, assigned, layer_scaling=layer_scaling, workers=workers)
    places = [str(place) for place in map(_place_of, experts) if place is not None]
    lasting = len(places) == len(experts)  # a merge of experts in memory cannot be run again
    names = tuple(places) if lasting else tuple(f"expert {i}" for i in range(1, len(experts) + 1))
    model = None if base is None else str(base)
    recipe = MergeRecipe(names, method, tuple(weights or ()), assigned, model, keep_counts, layer_scaling)
    if lasting:
        return write_merge(recipe, opened, out, workers, progress).adapter
    with _output(out, opened, progress) as (directory, counter):
        _merge_into(directory, recipe, opened, workers, counter)
    return AdapterFile(out)


def merge_recipe(
    recipe: MergeRecipe | str | Path,
    out: str | Path,
    *,
    base: str | Path | None = None,
    workers: int | None = None,
    progress: ProgressCallback | None = None,
) -> MergeResult:
    """Merge as a recipe says, into the directory `out`.

    recipe: a `recipe.toml`, or its content. base: the base model instead of the recipe's.
    Raises what `merge` raises, and ConfigError for a file that is no recipe.
    """
    check_output(out)
    recipe = recipe if isinstance(recipe, MergeRecipe) else read_recipe(recipe)
    if base is not None:
        recipe = replace(recipe, model=str(base))
    return write_merge(recipe, open_experts(recipe.experts, recipe.model), out, workers, progress)


def write_merge(
    recipe: MergeRecipe,
    experts: Sequence[Expert],
    out: str | Path,
    workers: int | None = None,
    progress: ProgressCallback | None = None,
    files: Mapping[str, Any] | None = None,
) -> MergeResult:
    """Merge opened experts as the recipe says. files: JSON content that is written beside the merge, by file name."""
    with _output(out, experts, progress) as (directory, counter):
        _merge_into(directory, recipe, experts, workers, counter)
        write_text(directory / RECIPE_FILE, recipe_text(recipe, out))
        for name, content in (files or {}).items():
            write_json(directory / name, content)
    tasks = tuple(expert.metadata.task or "" for expert in experts)
    return MergeResult(AdapterFile(out), recipe, tasks, tuple(expert.nnz for expert in experts))


def update(
    merged: str | Path,
    out: str | Path,
    *,
    add: Sequence[ExpertSource] = (),
    remove: Sequence[ExpertSource] = (),
    weights: Sequence[Weight] | None = None,
    base: str | Path | None = None,
    workers: int | None = None,
    progress: ProgressCallback | None = None,
) -> AdapterFile:
    """Add experts to a merge that kept its counts, or remove experts from it, into the directory `out`.

    The files of the result are byte for byte those of a merge of the experts that are then in it.
    weights: of the experts to add, 1 each by default. An expert is removed with the weight that it was merged with.
    Raises what `merge` raises; MissingFile and BadCounts for `merged`; ArgumentError if an expert to add is in the merge
    already, one to remove is not, or none would remain.
    """
    check_output(out)
    before, *opened = open_experts([merged, *add, *remove], base)
    _refuse_inside(out, [before, *opened])
    counter = StepCounter(_target_count([before, *opened]), progress)
    added, removed = opened[: len(add)], opened[len(add) :]
    update_merge(out, merged, add=added, remove=removed, weights=weights, workers=workers, progress=counter.step)
    return AdapterFile(out)


@dataclass(frozen=True)
class SplitResult(ShownAsTable):
    """The adapters that `split` wrote, one an expert, in the experts' order."""

    method: str
    paths: tuple[Path, ...]

    def table(self) -> ResultTable:
        """An adapter a row."""
        adapters = map(AdapterFile, self.paths)
        rows = tuple((str(adapter.path), adapter.metadata.task or "", f"{adapter.nnz:,}") for adapter in adapters)
        return ResultTable(f"Split by {self.method}", ("adapter", "task", "entries"), rows)


def split(
    experts: Sequence[ExpertSource],
    out: str | Path,
    method: str = "emr",
    weights: Sequence[Weight] | None = None,
    parameters: Mapping[str, Any] | None = None,
    *,
    base: str | Path | None = None,
    workers: int | None = None,
    progress: ProgressCallback | None = None,
    **values: Any,
) -> SplitResult:
    """Write what a merge leaves of each expert: the merged delta under that expert's mask, as adapters in `out`.

    Each adapter is named by its expert's task, or else its directory. method: a name in `sl.METHODS` that can be split.
    Raises ArgumentError for another method, and what `merge` raises.
    """
    check_output(out)
    opened = open_experts(experts, base)
    _refuse_inside(out, opened)
    counter = StepCounter(_target_count(opened), progress)
    chosen = complete_parameters(method, {**(parameters or {}), **values})
    paths = merge_per_expert(out, opened, method, weights, chosen, workers=workers, progress=counter.step)
    return SplitResult(method, tuple(paths))


def experts_table(merged: AdapterFile) -> ResultTable:
    """The experts that a merged adapter records, with their weights."""
    merge = merged.metadata.merge or {"method": "", "experts": []}
    rows = [(record["task"] or record["digest"], weight_text(record["weight"])) for record in merge["experts"]]
    return ResultTable(f"Merged by {merge['method']}", ("expert", "weight"), tuple(rows))


def weight_text(weight: object) -> str:
    """A weight as text: a number without trailing zeros, its patterns, or of many how many and their range."""
    if isinstance(weight, Mapping) and len(weight) > SHOWN_PATTERNS:
        return f"{len(weight)} patterns, {min(weight.values()):g} to {max(weight.values()):g}"
    return f"{weight:g}" if isinstance(weight, float) else str(weight)


@contextmanager
def _output(out: str | Path, experts: Sequence[Expert], progress: ProgressCallback | None):
    """The new directory `out`, which appears when the block ends, and a counter of targets."""
    _refuse_inside(out, experts)
    with atomic_directory(out) as directory:
        yield directory, StepCounter(_target_count(experts), progress)


def _merge_into(
    directory: Path, recipe: MergeRecipe, experts: Sequence[Expert], workers: int | None, counter: StepCounter
) -> None:
    """Merge opened experts into a directory that is there."""
    if recipe.keep_counts:
        merge_with_counts(directory, experts, recipe.weights, workers=workers, progress=counter.step)
        return
    merge_to(
        directory,
        experts,
        recipe.method,
        recipe.weights,
        recipe.parameters,
        layer_scaling=recipe.layer_scaling,
        workers=workers,
        progress=counter.step,
    )


def _place_of(source: ExpertSource) -> str | Path | None:
    """The path or hub name of an expert, None for one in memory."""
    return source if isinstance(source, str | Path) else as_expert(source).path


def _target_count(experts: Sequence[Expert]) -> int:
    return len({name for expert in experts for name in expert})


def _refuse_inside(out: str | Path, experts: Sequence[Expert]) -> None:
    """Raise ConfigError if the output would lie in an expert's directory."""
    for expert in experts:
        if expert.path is not None and expert.path.resolve() in Path(out).resolve().parents:
            raise ConfigError(f"{out} would lie in the expert {expert.path}; choose an output outside of it.")
