"""The k-th largest of very many numbers, exactly, without sorting or copying them all; and where marks are."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

_CHUNK = 2**22  # numbers looked at together
_DIGIT = 16  # bits of a pass
_BITS = {torch.float32: torch.int32, torch.float64: torch.int64}


def kth_largest(parts: Sequence[Tensor], k: int) -> Tensor:
    """The k-th largest of all numbers in `parts`, a scalar of their dtype; k from 1 to how many there are.

    parts: float tensors of one dtype and device, without NaN; 16-bit ones are compared in float32.

    Radix selection: seen as integers, floats of one sign are in the order of their bits, and the others follow when their
    other bits are flipped. A histogram of the upper 16 bits tells in which bin the number lies, then one of the next 16 bits
    of what falls in that bin, and so on: two passes for float32. Beside `parts` a few million numbers are in memory. For one
    part on the CPU numpy's partition is faster, which copies it.
    """
    dtype = torch.promote_types(parts[0].dtype, torch.float32)
    if len(parts) == 1 and parts[0].device.type == "cpu":
        numbers = parts[0].detach().reshape(-1).to(dtype).numpy()
        return torch.tensor(np.partition(numbers, len(numbers) - k)[len(numbers) - k]).to(parts[0].dtype)
    whole = _BITS[dtype].itemsize * 8
    prefix = 0  # of the number's bits, from the highest; as an unsigned integer
    for low in range(whole - _DIGIT, -1, -_DIGIT):
        counts = torch.zeros(2**_DIGIT, dtype=torch.int64, device=parts[0].device)
        for part in parts:
            for chunk in part.detach().reshape(-1).split(_CHUNK):
                keys = _ordered(chunk.to(dtype))
                if low < whole - _DIGIT:
                    keys = keys[keys >> (low + _DIGIT) == _signed(prefix, whole - low - _DIGIT)]
                counts += torch.bincount((keys >> low) & (2**_DIGIT - 1), minlength=2**_DIGIT)
        if low == whole - _DIGIT:
            counts = counts.roll(2 ** (_DIGIT - 1))  # the highest bit is the sign: negative keys have it, and come first
        at_least = counts.flip(0).cumsum(0).flip(0)
        digit = int((at_least >= k).sum()) - 1
        k -= int(at_least[digit] - counts[digit])
        if low == whole - _DIGIT:
            digit ^= 2 ** (_DIGIT - 1)
        prefix = prefix << _DIGIT | digit
    key = torch.tensor(_signed(prefix, whole), dtype=_BITS[dtype])
    return _ordered(key.view(dtype)).view(dtype).to(parts[0].dtype).to(parts[0].device)


def selected(marks: Tensor) -> Tensor:
    """The places [n] at which `marks` [blocks] is not 0, ascending, int64."""
    if marks.device.type != "cpu":
        return marks.nonzero().squeeze(1)
    return torch.from_numpy((marks.numpy() != 0).nonzero()[0])  # of bool, and numpy's: many times as fast as torch's


def _ordered(numbers: Tensor) -> Tensor:
    """The bits of floats as signed integers in the order of the floats; it undoes itself."""
    bits = numbers.view(_BITS[numbers.dtype])
    negative = bits >> (bits.element_size() * 8 - 1)  # all bits, or none
    return bits ^ (negative & torch.iinfo(bits.dtype).max)


def _signed(number: int, bits: int) -> int:
    """An unsigned integer of so many bits as a signed one."""
    return number - 2**bits if number >= 2 ** (bits - 1) else number
