"""Large targets in bands of rows: what is worked on at a time stays in the processor's cache, and every core has its band."""

from collections.abc import Iterator, Sequence

import torch

from sparselet.delta import SparseDelta, index_dtype

BAND = 2**19  # entries, about: a dozen bytes each while they are merged


def cut(deltas: Sequence[SparseDelta]) -> Iterator[list[SparseDelta]]:
    """The deltas of one target in bands of whole rows (of tiles), from the first to the last. deltas: on common blocks."""
    (rows, columns), side = deltas[0].shape, deltas[0].block_size
    height = max(1, BAND // (columns * side)) * side
    firsts = list(range(0, rows, height))
    blocks = [first // side * (columns // side) for first in firsts]
    firsts_of = [torch.searchsorted(d.indices, torch.tensor(blocks, dtype=d.indices.dtype)).tolist() for d in deltas]
    places = [[*at, len(d.indices)] for at, d in zip(firsts_of, deltas, strict=True)]
    for i, (first, block) in enumerate(zip(firsts, blocks, strict=True)):
        shape = (min(height, rows - first), columns)
        yield [
            SparseDelta(shape, d.indices[at[i] : at[i + 1]] - block, d.values[at[i] : at[i + 1]], side)
            for d, at in zip(deltas, places, strict=True)
        ]


def join(bands: Sequence[SparseDelta]) -> SparseDelta:
    """One delta of the bands below each other; those with entries have one block size."""
    shape = (sum(band.shape[0] for band in bands), bands[0].shape[1])
    filled = [band for band in bands if band.nnz]
    if not filled:
        return SparseDelta.empty(shape)
    side = filled[0].block_size
    kind = index_dtype(shape[0] * shape[1] // side**2)
    indices, row = [], 0
    for band in bands:
        if band.nnz:
            indices.append(band.indices.to(kind) + row // side * (shape[1] // side))
        row += band.shape[0]
    return SparseDelta(shape, torch.cat(indices), torch.cat([band.values for band in filled]), side)
