"""Operations on masked entries: read, write, gradient. `reference` defines them."""

from sparselet.kernels.reference import (
    as_tiles,
    gather,
    masked_weight_gradient,
    tile_entries,
    tile_sum,
    weight_gradient,
    write,
)

__all__ = ["as_tiles", "gather", "masked_weight_gradient", "tile_entries", "tile_sum", "weight_gradient", "write"]
