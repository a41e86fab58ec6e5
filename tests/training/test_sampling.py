"""Equal shares of several tasks: how many rows of each, which ones, and in what order."""

import os
import subprocess
import sys
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from helpers.paper import paper_config
from helpers.strategies import few
from hypothesis import given
from hypothesis import strategies as st

from sparselet.training.sampling import LengthGroupedSampler, balanced_rows
from sparselet.training.scoring import draw_rows
from sparselet.tuner.mask_state import seeded

sizes_of_tasks = st.lists(st.integers(1, 60), min_size=1, max_size=5)
seeds, epochs = st.integers(0, 2**31), st.integers(0, 9)


def by_task(rows, sizes):
    """How often each task's rows are taken, as one count a task."""
    ends = torch.tensor(sizes).cumsum(0).tolist()
    counts = [Counter() for _ in sizes]
    for row in rows:
        counts[next(i for i, end in enumerate(ends) if row < end)][row] += 1
    return counts


@few
@given(sizes_of_tasks, seeds, epochs)
def test_every_task_gives_equally_many_rows_and_all_together_as_many_as_there_are(sizes, seed, epoch):
    rows = balanced_rows(sizes, seed, epoch)
    shares = [counts.total() for counts in by_task(rows, sizes)]
    assert sum(shares) == sum(sizes)
    assert max(shares) - min(shares) <= 1
    assert set(rows) <= set(range(sum(sizes)))


@few
@given(sizes_of_tasks, seeds, epochs)
def test_every_row_of_a_small_task_is_seen_in_each_epoch_about_equally_often(sizes, seed, epoch):
    for size, counts in zip(sizes, by_task(balanced_rows(sizes, seed, epoch), sizes), strict=True):
        if size <= counts.total():
            assert len(counts) == size
            assert max(counts.values()) - min(counts.values()) <= 2


@few
@given(sizes_of_tasks, seeds, st.integers(1, 5))
def test_the_rows_of_a_task_are_seen_equally_often_over_the_epochs(sizes, seed, count):
    """The rows beyond whole passes come from permutations that go on from epoch to epoch."""
    seen = [Counter() for _ in sizes]
    for epoch in range(count):
        for total, counts in zip(seen, by_task(balanced_rows(sizes, seed, epoch), sizes), strict=True):
            total.update(counts)
    for size, total in zip(sizes, seen, strict=True):
        often = [total[row] for row in range(sum(sizes)) if row in total] + [0] * (size - len(total))
        assert max(often) - min(often) <= 1


@few
@given(sizes_of_tasks, seeds, epochs)
def test_the_draw_depends_on_its_arguments_alone(sizes, seed, epoch):
    first = balanced_rows(sizes, seed, epoch)
    torch.rand(3)
    assert balanced_rows(sizes, seed, epoch) == first


def test_another_process_draws_the_same():
    code = "from sparselet.training.sampling import *; print(list(LengthGroupedSampler([*range(26)], 4, 3, [5, 21])))"
    environment = {**os.environ, "PYTHONHASHSEED": "12345"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, env=environment)
    assert done.stdout.strip() == str(list(LengthGroupedSampler([*range(26)], 4, 3, [5, 21]))), done.stderr


def test_seed_and_epoch_change_what_a_large_task_gives():
    drawn = {(seed, epoch): tuple(balanced_rows([4, 40], seed, epoch)[22:]) for seed in (0, 1) for epoch in (0, 1)}
    assert len(set(drawn.values())) == 4
    assert not set(drawn[0, 0]) & set(drawn[0, 1][:18])  # 40 rows: what was seen comes again after all others


def test_one_task_gives_all_its_rows_in_the_order_of_the_seed():
    """What runs on one task have always done, so that their bytes stay."""
    assert balanced_rows([7], 5, 3) == list(range(7))
    sampler = LengthGroupedSampler([1] * 7, 7, 5, [7])
    sampler.set_epoch(3)
    assert list(sampler) == torch.randperm(7, generator=seeded(5, "order", 3)).tolist()


@few
@given(sizes_of_tasks, st.integers(1, 6), seeds, epochs, st.data())
def test_the_sampler_gives_the_rows_of_the_draw_in_whole_batches_of_like_length(sizes, batch, seed, epoch, data):
    total = sum(sizes)
    lengths = data.draw(st.lists(st.integers(1, 30), min_size=total, max_size=total))
    sampler = LengthGroupedSampler(lengths, batch, seed, sizes)
    sampler.set_epoch(epoch)
    order = list(sampler)
    assert sorted(order) == sorted(balanced_rows(sizes, seed, epoch))
    assert len(sampler) == len(order)
    batches = [order[i : i + batch] for i in range(0, total, batch)]
    assert all([lengths[row] for row in b] == sorted((lengths[row] for row in b), reverse=True) for b in batches)


def test_tasks_are_mixed_within_an_epoch():
    sampler = LengthGroupedSampler([1] * 80, 8, 0, [40, 40])
    order = list(sampler)
    assert all(0 < sum(row < 40 for row in order[i : i + 8]) < 8 for i in range(0, 80, 8))


@pytest.mark.parametrize(("processes", "accumulation"), [(1, 1), (1, 3), (2, 1), (2, 3)])
def test_scoring_batches_have_the_rows_of_a_step_however_it_is_divided(processes, accumulation):
    config, rows = paper_config(score_batches=2), [3, 3, 3, *range(40, 60)]
    whole = draw_rows(50, shares(1, 0, 12, 1), config, 7, rows)
    assert [[len(part) for part in parts] for parts in whole] == [[12], [12]]
    assert {row for (part,) in whole for row in part} <= set(rows)
    size = 12 // processes // accumulation
    drawn = [draw_rows(50, shares(processes, rank, size, accumulation), config, 7, rows) for rank in range(processes)]
    for i, (expected,) in enumerate(whole):
        assert all([len(part) for part in own[i]] == [size] * accumulation for own in drawn)
        assert sorted(row for own in drawn for part in own[i] for row in part) == sorted(expected)


def test_processes_score_as_many_micro_batches_where_rows_are_few():
    drawn = [draw_rows(5, shares(2, rank, 1, 4), paper_config(), 0, None)[0] for rank in (0, 1)]
    assert len(drawn[0]) == len(drawn[1])
    assert all(part for own in drawn for part in own)
    assert sorted(row for own in drawn for part in own for row in part) == list(range(5))


def shares(processes, rank, size, accumulation):
    """What a Trainer's arguments say of how a step is divided."""
    return SimpleNamespace(
        world_size=processes,
        process_index=rank,
        per_device_train_batch_size=size,
        gradient_accumulation_steps=accumulation,
    )
