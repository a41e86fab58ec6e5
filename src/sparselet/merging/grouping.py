"""Experts in groups that are alike, so that each group merges with less loss than all together."""

import itertools
from collections.abc import Callable

import torch
from torch import Tensor

from sparselet.errors import ArgumentError
from sparselet.merging.algebra.gram import cosines, gram
from sparselet.merging.engine.plan import MergePlan


def change_cosines(plan: MergePlan, progress: Callable[[str], None] | None = None) -> Tensor:
    """cos θᵢⱼ of the experts' whole changes, float64 [N, N], by their inner products over all targets.

    progress: called with each target's name after it was read.
    """
    products = torch.zeros(len(plan.experts), len(plan.experts), dtype=torch.float64)
    for name in plan.shapes:
        products += gram(plan.deltas(name))
        if progress is not None:
            progress(name)
    return cosines(products)


def greedy_groups(similarity: Tensor, count: int) -> list[list[int]]:
    """FlexMerge's grouping (ICLR 2026): from single experts on, the most similar groups are joined until `count` are left.

    Two groups are as similar as their least similar members. The paper groups the parts of a block by themselves; here whole
    experts are, so that a group is one adapter that a router can choose. Of equal pairs the first is joined.

    similarity: symmetric [N, N]. Returns the members of each group, ascending. Raises ArgumentError unless 1 ≤ count ≤ N.
    """
    check_group_count(count, len(similarity))
    groups = [[i] for i in range(len(similarity))]
    while len(groups) > count:
        pairs = itertools.combinations(range(len(groups)), 2)
        first, second = max(pairs, key=lambda pair: least_similarity(similarity, groups[pair[0]] + groups[pair[1]]))
        groups[first] = sorted(groups[first] + groups.pop(second))
    return groups


def least_similarity(similarity: Tensor, members: list[int]) -> float:
    """The similarity of the two least similar members; of a single one that to itself."""
    if len(members) == 1:
        return float(similarity[members[0], members[0]])
    return min(float(similarity[i, j]) for i, j in itertools.combinations(members, 2))


def check_group_count(count: int, experts: int) -> None:
    """Raise ArgumentError unless `count` is an integer from 1 to the number of experts."""
    if isinstance(count, bool) or not isinstance(count, int) or not 1 <= count <= experts:
        raise ArgumentError(f"groups must be from 1 to {experts}, the number of experts, got {count!r}.")
