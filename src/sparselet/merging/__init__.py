"""Merge experts into one. `METHODS` holds the merge methods by name."""

from sparselet.merging.engine.per_expert import merge_per_expert
from sparselet.merging.engine.stream import merge, merge_to
from sparselet.merging.incremental import merge_with_counts, update_merge
from sparselet.merging.methods import METHODS, per_expert_methods
from sparselet.merging.methods.average import overlap, uniform
from sparselet.merging.recipe import MergeRecipe, read_recipe, recipe_text

__all__ = [
    "METHODS",
    "MergeRecipe",
    "merge",
    "merge_per_expert",
    "merge_to",
    "merge_with_counts",
    "overlap",
    "per_expert_methods",
    "read_recipe",
    "recipe_text",
    "uniform",
    "update_merge",
]
