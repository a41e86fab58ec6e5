"""`MergeMethod`: what the engine, the command line, the documentation and the tests need to know of a merge method."""

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sparselet.delta import SparseDelta
from sparselet.errors import UnknownMethod

# Each call yields the deltas and weights of every target, one of each per expert.
AllTargets = Callable[[], Iterable[tuple[Sequence[SparseDelta], Sequence[float]]]]
GlobalStats = Callable[[AllTargets, Mapping[str, Any]], Any]
STATS = "stats"  # the keyword by which a function takes its statistics
MOMENTS = "moments"  # and the one by which it takes the second moments of the experts' inputs


@dataclass(frozen=True)
class MergeMethod:
    """A merge method.

    name: as users write it. formula: ΔW_m in one line. source: the publication.
    function: `(deltas, weights, *, parameters) -> SparseDelta`, with the deltas of one target, one per expert (empty where the
        expert has no such target), and one weight each. Its parameters are keyword-only and have defaults.
    elementwise: a merged entry depends on the experts' values at that entry alone, and on statistics; so bands of a target's
        rows can be merged one by one.
    global_stats: `(targets, parameters) -> statistics`, over all targets before the first one is merged; of a method with a
        parameter `trim` that is "target", over one target at a time. `function` takes the result as `stats`.
    per_expert: `(deltas, weights, *, parameters) -> list[SparseDelta]`, what the merge keeps of each expert; its parameters are
        some of those of `function`.
    per_expert_stats: `global_stats` of `per_expert`, always over all targets.
    needs_profiles: `function` takes `moments`, for each expert the second moment of its inputs of the target (`profiles`), or
        None where its profile has none.
    dense: `function` writes out the target and a square matrix of its columns, so targets beyond any model's are refused.
    linear: the result is Σ wᵢ times that of expert i alone with weight 1 among the others with 0, on the same mask.
    tried: the parameters that `auto_merge` tries, each beside the defaults; none for a method that it leaves out.
    for_dense: `auto_merge` tries it where the experts are dense or of whole rows.
    """

    name: str
    function: Callable[..., SparseDelta]
    formula: str
    source: str
    elementwise: bool = False
    global_stats: GlobalStats | None = None
    per_expert: Callable[..., list[SparseDelta]] | None = None
    per_expert_stats: GlobalStats | None = None
    needs_profiles: bool = False
    dense: bool = False
    linear: bool = False
    tried: tuple[Mapping[str, Any], ...] = ()
    for_dense: bool = False

    @property
    def defaults(self) -> dict[str, Any]:
        """The parameters with their defaults."""
        return keyword_defaults(self.function)

    def complete_parameters(self, parameters: Mapping[str, Any]) -> dict[str, Any]:
        """All parameters: the given ones, and the defaults of the others.

        Raises UnknownMethod for an unknown parameter, ArgumentError for a value out of range.
        """
        defaults = self.defaults
        for name in sorted(parameters):
            if name not in defaults:
                takes = f"it takes {', '.join(defaults)}" if defaults else "it takes none"
                raise UnknownMethod(f"{self.name} has no parameter {name!r}; {takes}.")
        complete = {**defaults, **parameters}
        self.function([SparseDelta.empty((1, 1))] * 2, [1.0, 1.0], **complete)  # refuses values before any work is done
        return complete


def keyword_defaults(function: Callable[..., Any]) -> dict[str, Any]:
    """The keyword-only parameters of a function with their defaults, without `stats` and `moments`."""
    parameters = inspect.signature(function).parameters.values()
    return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY and p.name not in (STATS, MOMENTS)}
