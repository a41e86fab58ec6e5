"""LiNeS: any merge with each layer scaled by its depth."""

from collections.abc import Iterable, Sequence

from sparselet.errors import ArgumentError
from sparselet.masks import layer_of
from sparselet.merging.algebra.ranges import require_finite_number

LayerScaling = Sequence[float]  # (α, β)


def check_layer_scaling(scaling: LayerScaling | None) -> tuple[float, float] | None:
    """(α, β) as floats. Raises ArgumentError unless they are two finite numbers."""
    if scaling is None:
        return None
    if isinstance(scaling, str) or not isinstance(scaling, Sequence) or len(scaling) != 2:
        raise ArgumentError(f"layer_scaling must be two numbers, alpha and beta, got {scaling!r:.60}.")
    for number in scaling:
        require_finite_number("layer_scaling", number)
    return float(scaling[0]), float(scaling[1])


def layer_factors(names: Iterable[str], scaling: LayerScaling) -> dict[str, float]:
    """LiNeS (Wang et al. 2025, ICLR, Eq. 2): the factor of each target, α + β·l/(L − 1) in layer l of L, counted from 0.

    A target's layer is the first number in its name. L is one more than the largest of the `names` that are alike up to that
    number, so that an encoder and a decoder have their own; the paper takes the model's, which differs where the experts leave
    the last layers as they are. Targets without a number, such as embeddings, and those of a single layer get α, as in the
    authors' code.

    scaling: (α, β). With β = 0 all targets get α, with (1, 0) the merge stays as it is.
    """
    alpha, beta = scaling
    places = {name: _place(name) for name in names}
    last: dict[str, int] = {}
    for stack, number in places.values():
        last[stack] = max(last.get(stack, 0), number)
    return {name: alpha + (beta * number / last[stack] if last[stack] else 0.0) for name, (stack, number) in places.items()}


def _place(name: str) -> tuple[str, int]:
    """The name of a target's stack of layers, and its number there; 0 without a number."""
    stack, _, number = layer_of(name).rpartition(".")
    return (stack, int(number)) if number.isdecimal() else (name, 0)
