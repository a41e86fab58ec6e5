"""Fingerprints of base weights: whether two base models have the same target weights, by a sample of each target."""

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor

from sparselet.errors import WrongBase

SAMPLE_SIZE = 4096
_STRIDE = 2654435761  # prime, so that the sample visits all rows and columns whatever the shape

Fingerprint = Mapping[str, str]


def sample_positions(size: int) -> Tensor:
    """Up to 4096 flat positions in a target of `size` entries, int64, the same for every target of this size.

    Position i is i · 2654435761 mod size; all entries when there are no more than 4096.
    """
    if size <= SAMPLE_SIZE:
        return torch.arange(size)
    return (torch.arange(SAMPLE_SIZE) * _STRIDE) % size


def fingerprint(sample: Tensor) -> dict[str, str]:
    """The fingerprint of a target from the sampled entries of its base weight, a 1-D floating tensor.

    `dtype` and `sample` (SHA-256 of the little-endian float64 values, 16 hex digits) tell two weights of one dtype
    apart; `signs` (SHA-256 of the sign bits) survives casting between float32, bfloat16 and float16.
    """
    sample = sample.detach().cpu()
    return {
        "dtype": str(sample.dtype).removeprefix("torch."),
        "sample": _digest(sample.double().numpy().astype("<f8").tobytes()),
        "signs": _digest(torch.signbit(sample).numpy().tobytes()),
    }


def fingerprint_weight(weight: Tensor) -> dict[str, str]:
    """The fingerprint of a whole weight [rows, columns]."""
    flat = weight.detach().reshape(-1)
    return fingerprint(flat[sample_positions(flat.numel()).to(flat.device)])


def same_base(first: Fingerprint | None, second: Fingerprint | None) -> bool:
    """Whether two fingerprints of one target can come from one base model.

    Weights of equal dtypes are compared by value, of different dtypes by sign. An absent fingerprint is compatible with all.
    """
    if not first or not second:
        return True
    key = "sample" if first["dtype"] == second["dtype"] else "signs"
    return first[key] == second[key]


def require_same_base(
    first: Mapping[str, Fingerprint | None], second: Mapping[str, Fingerprint | None], description: str
) -> None:
    """Raise WrongBase if a target of both has two fingerprints. description: the two, for the message."""
    differing = [name for name in first if name in second and not same_base(first[name], second[name])]
    if differing:
        raise WrongBase(
            f"{description}: the base weights differ in {len(differing)} of {len(first)} targets, first in {differing[0]}. "
            "A sparse delta only fits the base model it was trained on; use that model, "
            "or train again on this one."
        )


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]
