"""Radix selection: the k-th largest of very many numbers, exactly, without sorting or copying them; and the places of marks.

Floats of one sign, seen as integers, have the order of their bits; negative ones have it once their other bits are flipped. A
histogram of the upper 16 bits shows which of these *digits* the k-th largest number has; a histogram of the next 16 bits, among
the numbers with that digit, shows its next digit: two passes for float32, four for float64.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from sparselet.kernels.reference import selected

_CHUNK = 2**22  # numbers counted together
_DIGIT_BITS = 16
_INTEGERS = {torch.float32: torch.int32, torch.float64: torch.int64}


def kth_largest(parts: Sequence[Tensor], k: int) -> Tensor:
    """The k-th largest of all numbers in `parts`, a scalar of their dtype; k from 1 to their count.

    parts: float tensors of one dtype and device, without NaN; 16-bit ones are compared in float32. A few million numbers are in
    memory beside them; a single part on the CPU is copied instead, for numpy's partition, which is faster.
    """
    dtype = torch.promote_types(parts[0].dtype, torch.float32)
    if len(parts) == 1 and parts[0].device.type == "cpu":
        numbers = parts[0].detach().reshape(-1).to(dtype).numpy()
        return torch.tensor(np.partition(numbers, len(numbers) - k)[len(numbers) - k]).to(parts[0].dtype)
    digits: list[int] = []
    for _ in range(dtype.itemsize * 8 // _DIGIT_BITS):
        counts = digit_counts(parts[0], digits)
        for part in parts[1:]:
            counts += digit_counts(part, digits)
        digit, k = digit_of_rank(counts, k)
        digits.append(digit)
    return number_of(digits, dtype).to(parts[0])


def digit_counts(numbers: Tensor, digits: Sequence[int] = ()) -> Tensor:
    """How often each value of the next digit occurs, int64 [2¹⁶], among the numbers whose first digits are `digits`.

    numbers: floats of any shape; those of 16 bits are counted in float32.
    """
    dtype = torch.promote_types(numbers.dtype, torch.float32)
    shift = dtype.itemsize * 8 - _DIGIT_BITS * (len(digits) + 1)  # bits below the next digit
    counts = torch.zeros(2**_DIGIT_BITS, dtype=torch.int64, device=numbers.device)
    for chunk in numbers.detach().reshape(-1).split(_CHUNK):
        keys = _ordered(chunk.to(dtype))
        if digits:
            keys = keys.index_select(0, selected(keys >> (shift + _DIGIT_BITS) == _prefix(digits)))
        values = keys >> shift
        values = values & (2**_DIGIT_BITS - 1) if digits else values + 2 ** (_DIGIT_BITS - 1)  # the first digit has the sign
        counts += torch.bincount(values, minlength=2**_DIGIT_BITS)
    return counts


def digit_of_rank(counts: Tensor, k: int) -> tuple[int, int]:
    """The digit of the k-th largest number, and its rank among the numbers with that digit; (0, 0) for k beyond their count."""
    at_least = counts.flip(0).cumsum(0).flip(0)
    if k > int(at_least[0]):
        return 0, 0
    digit = int((at_least >= k).sum()) - 1
    return digit, k - int(at_least[digit] - counts[digit])


def number_of(digits: Sequence[int], dtype: torch.dtype) -> Tensor:
    """The number with these digits, a scalar of `dtype` (float32 or float64)."""
    return _ordered(torch.tensor(_prefix(digits), dtype=_INTEGERS[dtype]).view(dtype)).view(dtype)


def _prefix(digits: Sequence[int]) -> int:
    """The digits together, as the upper bits of `_ordered`."""
    prefix = digits[0] - 2 ** (_DIGIT_BITS - 1)
    for digit in digits[1:]:
        prefix = prefix << _DIGIT_BITS | digit
    return prefix


def _ordered(numbers: Tensor) -> Tensor:
    """The bits of floats as signed integers in the order of the floats; its own inverse."""
    bits = numbers.view(_INTEGERS[numbers.dtype])
    negative = bits >> (bits.element_size() * 8 - 1)  # all bits, or none
    return bits ^ (negative & torch.iinfo(bits.dtype).max)
