"""The choice of the fastest version of the masked weight gradient, by a cost model."""

import os

import torch

from sparselet.errors import ArgumentError
from sparselet.kernels.bands import HEIGHT, WAIT
from sparselet.kernels.reference import ENTRY, Block

VARIANTS = ("dense", "bands", "triton")
FORCE = "SPARSELET_KERNEL"  # the environment variable that names one of them

# Nanoseconds of one core, float32, measured by benchmarks/bench_select.py; only their ratios matter, which differ less between
# processors than the numbers do.
_MULTIPLY = 0.023  # one multiplication and addition of a large product
_NARROW = 0.03  # the same in a product as narrow as a band
_PICK = 1.5  # reading one masked entry from a dense gradient
_COPY = 0.33  # copying one number of a band's columns
_TURN = 0.75  # transposing one number of the inputs
_SORT = 60.0  # assigning one masked entry to its band
_BAND = 10_000.0  # calling the operations of one band, which is not divided among cores


def choose(shape: tuple[int, int], tokens: int, blocks: int, block: Block, device: torch.device) -> str:
    """The version that is expected to be fastest, or the one that SPARSELET_KERNEL names.

    "dense": the product and a gather; "bands": `bands`, on a CPU; "triton": `triton`, on CUDA, which is used only where
    SPARSELET_KERNEL names it, since its time has not been measured. For whole rows or columns "lines", which is a part of the
    dense product, unless "dense" is named.

    shape: (rows, columns) of the weight. tokens: rows of the batch, of all sequences together. blocks: of the mask.
    Raises ArgumentError for another name.
    """
    forced = _forced()
    if block != ENTRY and block in ((1, shape[1]), (shape[0], 1)) and forced != "dense":
        return "lines"
    if forced is not None:
        return forced
    if device.type != "cpu":
        return "dense"  # the product of a band is too small to fill such a device
    expected = costs(shape, tokens, blocks, block, torch.get_num_threads())
    return min(expected, key=lambda name: expected[name])


def writes_in_one_pass(device: torch.device) -> bool:
    """Whether `triton` adds values to the displaced entries and writes them in one pass: on CUDA, where SPARSELET_KERNEL names
    it; on the CPU only with Triton's interpreter (TRITON_INTERPRET=1), since models are often loaded there and moved later.

    Raises ArgumentError for another name.
    """
    return _forced() == "triton" and (device.type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1")


def _forced() -> str | None:
    forced = os.environ.get(FORCE)
    if forced is not None and forced not in VARIANTS:
        raise ArgumentError(f"{FORCE} must be one of {', '.join(VARIANTS)}, got {forced!r}.")
    return forced


def costs(shape: tuple[int, int], tokens: int, blocks: int, block: Block, threads: int = 1) -> dict[str, float]:
    """The expected time of each version for entries or tiles on a CPU, in nanoseconds. Arguments as in `choose`."""
    rows, columns = shape
    entries = blocks * block[0] * block[1]
    dense = _MULTIPLY * rows * columns * tokens + _PICK * entries
    height = HEIGHT if block == ENTRY else block[0]
    present = min(-(-rows // height), blocks)  # bands with entries
    if block == ENTRY:
        touched = 1 - (1 - blocks / (rows * columns)) ** height  # of a band's columns, for a mask without structure
        touched_columns, sorting = present * columns * touched, _SORT * entries
    else:
        touched_columns, sorting = blocks * block[1], 0.0  # of all bands together
    inputs = _TURN * (rows + columns) * tokens
    products = (_NARROW * height + _COPY) * touched_columns * tokens
    products = min(products, products / threads + _NARROW * WAIT * present)  # by one thread, or by all
    return {"dense": dense / threads, "bands": products + (inputs + sorting) / threads + _BAND * present}
