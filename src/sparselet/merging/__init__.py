"""Merging experts into one. A method is a function of deltas and weights, and a line in `METHODS`."""

from sparselet.merging.engine.per_task import is_per_task, merge_per_task
from sparselet.merging.engine.stream import merge, merge_to
from sparselet.merging.incremental import change_merge, merge_with_counts
from sparselet.merging.methods import METHODS, per_expert_methods
from sparselet.merging.methods.average import overlap, uniform
from sparselet.merging.recipe import MergeRecipe, read_recipe, recipe_text

__all__ = [
    "METHODS",
    "MergeRecipe",
    "change_merge",
    "is_per_task",
    "merge",
    "merge_per_task",
    "merge_to",
    "merge_with_counts",
    "overlap",
    "per_expert_methods",
    "read_recipe",
    "recipe_text",
    "uniform",
]
