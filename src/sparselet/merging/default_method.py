"""`default_method`: how experts are merged where nobody says how."""

from collections.abc import Mapping, Sequence

from sparselet.adapter import expert_profile
from sparselet.expert import Expert
from sparselet.merging.engine.plan import Weight
from sparselet.merging.methods.regmean import REGMEAN
from sparselet.merging.methods.tsv import TSV


def default_method(experts: Sequence[Expert], weights: Sequence[Weight] | None = None) -> str:
    """The method of a merge that names none, the best measured for what the experts bring (docs/results.md).

    regmean, if every expert that changes anything has a profile and no weight is below 0; else tsv. Raises what reading
    profiles raises.
    """
    numbers = [number for weight in weights or () for number in (weight.values() if isinstance(weight, Mapping) else [weight])]
    profiled = all(expert_profile(expert) is not None for expert in experts if len(expert))
    return REGMEAN.name if profiled and not any(number < 0 for number in numbers) else TSV.name
