"""Which training rows an epoch takes, and in what order: all of one task, or an equal share of each of several."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch.utils.data import Dataset, Sampler

from sparselet.tuner.mask_state import seeded

UNCOUNTED = -1  # the number of a row whose labels do not count


class Rows(Dataset[dict[str, list[int]]]):
    """Training rows by number; as `UNCOUNTED` there is one more, which the collator of `without_labels` knows."""

    def __init__(self, rows: Sequence[dict[str, list[int]]]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, number: int) -> dict[str, list[int]]:
        return {**self.rows[0], "uncounted": []} if number == UNCOUNTED else self.rows[number]


def without_labels(
    collate: Callable[[Sequence[dict[str, list[int]]]], dict[str, Any]], ignored: int
) -> Callable[[Sequence[dict[str, list[int]]]], dict[str, Any]]:
    """A collator that gives the rows that do not count the label `ignored` throughout."""

    def collated(rows: Sequence[dict[str, list[int]]]) -> dict[str, Any]:
        batch = collate(rows)
        batch["labels"][[i for i, row in enumerate(rows) if "uncounted" in row]] = ignored
        return batch

    return collated


def balanced_rows(sizes: Sequence[int], seed: int, epoch: int) -> list[int]:
    """The numbers of the rows that an epoch takes of several tasks, by task; as many as there are rows in all.

    sizes: rows of each task; the rows are numbered through, task after task. Of n rows in all each of T tasks gives
    n // T, the first n mod T one more. A task takes all its rows as often as they fit into its share, and what is left of
    the share from an endless row of permutations, which goes on where the epoch before stopped. So every row of a small
    task is seen in each epoch, and all rows of a large one over some epochs. Depends on its arguments alone.
    """
    rows: list[int] = []
    first = 0
    for task, size in enumerate(sizes):
        share = sum(sizes) // len(sizes) + (task < sum(sizes) % len(sizes))
        rows += list(range(first, first + size)) * (share // size)
        remainder = share % size
        start = epoch * remainder
        permutations = [
            torch.randperm(size, generator=seeded(seed, "task", task, number)) + first
            for number in range(start // size, -(-(start + remainder) // size))
        ]
        if remainder:
            rows += torch.cat(permutations)[start % size :][:remainder].tolist()
        first += size
    return rows


class LengthGroupedSampler(Sampler[int]):
    """The rows of an epoch in random order, then sorted by length within groups of eight batches, then the batches shuffled.

    lengths: of all rows, task after task. sizes: rows of each task. The order depends on seed and epoch alone, so that a
    resumed run sees the batches of an undisturbed one; transformers' own sampler draws from the global generator.
    multiple: the rows that all processes take at a time. The last of an epoch are filled up to it by row `UNCOUNTED`, where
        accelerate would take rows of the epoch's beginning once more.
    """

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int, sizes: Sequence[int], multiple: int = 1) -> None:
        self.lengths, self.batch_size, self.seed, self.sizes, self.epoch = list(lengths), batch_size, seed, sizes, 0
        self.uncounted = -len(self.lengths) % multiple

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch that iteration gives."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths) + self.uncounted

    def __iter__(self) -> Iterator[int]:
        chosen = balanced_rows(self.sizes, self.seed, self.epoch)
        generator = seeded(self.seed, "order", self.epoch)
        order = [chosen[i] for i in torch.randperm(len(chosen), generator=generator).tolist()]
        group = 8 * self.batch_size
        batches: list[list[int]] = []
        for start in range(0, len(order), group):
            rows = sorted(order[start : start + group], key=lambda row: -self.lengths[row])
            batches += [rows[i : i + self.batch_size] for i in range(0, len(rows), self.batch_size)]
        # A short batch must stay last, or all batches after it would be cut at other rows.
        full, short = [b for b in batches if len(b) == self.batch_size], [b for b in batches if len(b) < self.batch_size]
        for i in torch.randperm(len(full), generator=generator).tolist():
            yield from full[i]
        for batch in short:
            yield from batch
        yield from [UNCOUNTED] * self.uncounted
