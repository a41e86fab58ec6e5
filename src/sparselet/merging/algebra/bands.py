"""Large targets in bands of rows, so that each core works on a band that fits in its cache."""

from collections.abc import Iterator, Sequence

import torch

from sparselet.delta import SparseDelta, index_dtype

BAND = 2**19  # entries per band, about; each takes a dozen bytes during a merge


def split_into_bands(deltas: Sequence[SparseDelta]) -> Iterator[list[SparseDelta]]:
    """The deltas of one target in bands of complete rows (of blocks), top to bottom. deltas: of one block."""
    (rows, columns), (h, w) = deltas[0].shape, deltas[0].block
    height = max(1, BAND // (columns * h)) * h
    firsts = list(range(0, rows, height))
    blocks = [first // h * (columns // w) for first in firsts]
    starts = [torch.searchsorted(d.indices, torch.tensor(blocks, dtype=d.indices.dtype)).tolist() for d in deltas]
    bounds = [[*start, len(d.indices)] for start, d in zip(starts, deltas, strict=True)]
    for i, (first, block) in enumerate(zip(firsts, blocks, strict=True)):
        shape = (min(height, rows - first), columns)
        yield [
            SparseDelta(shape, d.indices[bound[i] : bound[i + 1]] - block, d.values[bound[i] : bound[i + 1]])
            for d, bound in zip(deltas, bounds, strict=True)
        ]


def join_bands(bands: Sequence[SparseDelta]) -> SparseDelta:
    """The bands below each other as one delta. bands: those with entries have one block."""
    shape = (sum(band.shape[0] for band in bands), bands[0].shape[1])
    filled = [band for band in bands if band.nnz]
    if not filled:
        return SparseDelta.empty(shape)
    h, w = filled[0].block
    dtype = index_dtype(shape[0] * shape[1] // (h * w))
    indices, row = [], 0
    for band in bands:
        if band.nnz:
            indices.append(band.indices.to(dtype) + row // h * (shape[1] // w))
        row += band.shape[0]
    return SparseDelta(shape, torch.cat(indices), torch.cat([band.values for band in filled]))
