"""Which version of the masked weight gradient is fastest, by what each has to do."""

import os

import torch

from sparselet.errors import ArgumentError
from sparselet.kernels.bands import HEIGHT

VARIANTS = ("dense", "bands", "triton")
FORCE = "SPARSELET_KERNEL"  # the environment variable that names one of them

# Nanoseconds of one core, float32, as found by benchmarks/bench_select.py; their ratios matter, which differ less between
# processors than the numbers do.
_MULTIPLY = 0.023  # one multiplication and addition of a large product
_NARROW = 0.03  # the same of a product as narrow as a band
_PICK = 1.5  # reading one masked entry out of a dense gradient
_COPY = 0.33  # copying one number of a band's columns
_TURN = 0.75  # transposing one number of the inputs
_SORT = 60.0  # one masked entry on its way to its band
_BAND = 10_000.0  # calling the operations of one band, which does not divide among cores


def choose(shape: tuple[int, int], tokens: int, blocks: int, block_size: int, device: torch.device) -> str:
    """The version that is expected to be fastest, or the one that SPARSELET_KERNEL names.

    "dense": the product and a gather; "bands": `bands`, on a CPU; "triton": `triton`, on CUDA, which is made only where it is
    named until its time has been measured.

    shape: (rows, columns) of the weight. tokens: rows of the batch, of all sequences together. blocks: of the mask.
    Raises ArgumentError for another name.
    """
    forced = _forced()
    if forced is not None:
        return forced
    if device.type != "cpu":
        return "dense"  # the product of a band is too small to fill such a device
    expected = costs(shape, tokens, blocks, block_size, torch.get_num_threads())
    return min(expected, key=lambda name: expected[name])


def writes_in_one_pass(device: torch.device) -> bool:
    """Whether values are added to what they displace and written by `triton`: on CUDA, where SPARSELET_KERNEL names it.

    On the CPU only by Triton's interpreter (TRITON_INTERPRET=1): a model is often loaded there and moved later.
    Raises ArgumentError for another name.
    """
    return _forced() == "triton" and (device.type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1")


def _forced() -> str | None:
    forced = os.environ.get(FORCE)
    if forced is not None and forced not in VARIANTS:
        raise ArgumentError(f"{FORCE} must be one of {', '.join(VARIANTS)}, got {forced!r}.")
    return forced


def costs(shape: tuple[int, int], tokens: int, blocks: int, block_size: int, threads: int = 1) -> dict[str, float]:
    """What each version is expected to take on a CPU, in nanoseconds. Parameters as of `choose`."""
    rows, columns = shape
    entries = blocks * block_size**2
    dense = _MULTIPLY * rows * columns * tokens + _PICK * entries
    height = HEIGHT if block_size == 1 else block_size
    present = min(-(-rows // height), blocks)  # bands with entries
    if block_size == 1:
        touched = 1 - (1 - blocks / (rows * columns)) ** height  # of a band's columns, for a mask without structure
        wanted, sorting = present * columns * touched, _SORT * entries
    else:
        wanted, sorting = blocks * block_size, 0.0  # columns of all bands together
    inputs = _TURN * (rows + columns) * tokens
    bands = _NARROW * height * wanted * tokens + _COPY * wanted * tokens + inputs + sorting
    return {"dense": dense / threads, "bands": bands / threads + _BAND * present}
