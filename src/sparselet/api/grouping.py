"""`merge_groups`: a few merged adapters in place of one, each with a profile, for a router to choose among."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from sparselet.adapter import AdapterFile, require_profile
from sparselet.api.merging import MergeResult, write_merge
from sparselet.api.opening import open_experts
from sparselet.api.progress import ProgressCallback, StepCounter
from sparselet.io.atomic import atomic_directory
from sparselet.io.paths import check_output
from sparselet.merging import MergeRecipe
from sparselet.merging.algebra.ranges import require_choice
from sparselet.merging.engine.plan import MergePlan
from sparselet.merging.grouping import change_cosines, check_group_count, greedy_groups, least_similarity
from sparselet.merging.methods.regmean import REGMEAN
from sparselet.profiles.file import PROFILE_FILE, write_profile
from sparselet.profiles.pool import pool_profiles
from sparselet.profiles.router import prompt_similarity
from sparselet.result_table import ResultTable, ShownAsTable

SIMILARITIES = ("prompts", "change")


@dataclass(frozen=True)
class GroupedMerge(ShownAsTable):
    """Merges of groups of experts, as they were written. similarities: of each group, that of its least similar members."""

    merges: tuple[MergeResult, ...]
    similarities: tuple[float, ...]

    def table(self) -> ResultTable:
        """A group a row."""
        rows = [
            (str(merge.adapter.path), ", ".join(merge.recipe.experts), f"{merge.adapter.nnz:,}", f"{similarity:.3g}")
            for merge, similarity in zip(self.merges, self.similarities, strict=True)
        ]
        title = f"Merged in groups by {self.merges[0].recipe.method}"
        return ResultTable(title, ("adapter", "experts", "entries", "least similarity"), tuple(rows))


def merge_groups(
    recipe: MergeRecipe | Sequence[str | Path],
    groups: int,
    out: str | Path,
    *,
    by: str = "prompts",
    base: str | None = None,
    workers: int | None = None,
    progress: ProgressCallback | None = None,
) -> GroupedMerge:
    """Merge experts into `groups` adapters, each of experts that are alike, and pool the profiles of each group.

        sl.merge_groups(["expert-a", "expert-b", "expert-c"], 2, "library")
        sl.evaluate_routed(["library/group-1", "library/group-2"], ["task-a", "task-b", "task-c"])

    recipe: experts, which regmean merges, or how each group is merged. groups: how many (`merging.grouping.greedy_groups`).
    by: what makes two experts alike: "prompts", minus the distance of their prompts' mean states, as a router measures it, so
        that those which a router would confuse are in one group; "change", the cosine of their changes, which says little
        where masks were drawn at random.
    out: the directory of `group-1`, `group-2`, …, each an adapter with its profile and its recipe, largest group first.
    Raises, before any expert is read, ArgumentError (`groups`, `by`), MissingProfile, WrongBase, and what `merge` raises.
    """
    check_output(out)
    if not isinstance(recipe, MergeRecipe):
        recipe = MergeRecipe(tuple(map(str, recipe)), REGMEAN.name)
    if base is not None:
        recipe = replace(recipe, model=base)
    check_group_count(groups, len(recipe.experts))
    require_choice("by", by, SIMILARITIES)
    experts = open_experts(recipe.experts, recipe.model)
    named = zip(experts, recipe.experts, strict=True)
    profiles = [require_profile(expert, name, "groups are routed by profiles") for expert, name in named]
    near = prompt_similarity(profiles)  # refuses profiles of several base models
    how = (recipe.method, recipe.weights, recipe.parameters)
    plan = MergePlan(experts, *how, layer_scaling=recipe.layer_scaling)
    plan.check_values()
    counter = StepCounter(2 * len(plan.shapes), progress)
    similarity = change_cosines(plan, counter.step) if by == "change" else near
    members = sorted(greedy_groups(similarity, groups), key=lambda group: -len(group))
    merges = []
    with atomic_directory(out) as directory:
        for number, group in enumerate(members, 1):
            own = replace(
                recipe,
                experts=tuple(recipe.experts[i] for i in group),
                weights=tuple(recipe.weights[i] for i in group),
            )
            place = f"group-{number}"
            written = write_merge(own, [experts[i] for i in group], directory / place, workers)
            write_profile(pool_profiles([profiles[i] for i in group]), directory / place / PROFILE_FILE)
            merges.append((written, Path(out) / place))
            counter.advance(len(plan.shapes) * len(group) / len(experts))
    placed = tuple(replace(written, adapter=AdapterFile(path)) for written, path in merges)
    return GroupedMerge(placed, tuple(least_similarity(similarity, group) for group in members))
