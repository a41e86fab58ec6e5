"""Several items at once: in order, within the bound, and all put back afterwards."""

import threading

import pytest
import torch

from sparselet.errors import ArgumentError
from sparselet.merging.engine import parallel
from sparselet.merging.engine.parallel import map_in_order


@pytest.fixture(autouse=True)
def three_threads(one_thread):
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(1)


class Watched:
    """Work that notes which items were started, and with how many threads of torch; from `waiting` on they wait for a gate."""

    def __init__(self, waiting: int | None = None) -> None:
        self.started: list[int] = []
        self.threads: set[int] = set()
        self.gate = threading.Event()
        self.waiting = waiting

    def __call__(self, item: int) -> int:
        self.started.append(item)
        self.threads.add(torch.get_num_threads())
        if self.waiting is not None and item >= self.waiting:
            assert self.gate.wait(10)
        return item * 10


def free(item):
    return 0


@pytest.mark.parametrize("workers", [1, 2, 3, 8, None])
def test_results_come_in_the_order_of_the_items(workers):
    finished = threading.Event()

    def work(item):
        if item == 0 and workers != 1:
            assert finished.wait(10)  # the first is the last to end
        if item == 1:
            finished.set()
        return item * 10

    assert list(map_in_order(work, range(20), free, workers)) == [item * 10 for item in range(20)]
    assert list(map_in_order(work, [], free, workers)) == []


@pytest.mark.parametrize(("workers", "inside"), [(1, 3), (2, 1), (None, 1)])
def test_each_works_with_one_thread_and_the_setting_comes_back(workers, inside):
    work = Watched()
    assert len(list(map_in_order(work, range(5), free, workers))) == 5
    assert work.threads == {inside}
    assert torch.get_num_threads() == 3


@pytest.mark.parametrize("workers", [1, 2])
def test_an_error_comes_in_its_turn_and_what_was_not_started_is_not(workers):
    started = []

    def work(item):
        started.append(item)
        if item == 3:
            raise ArgumentError("item 3 is wrong")
        return item

    results = map_in_order(work, range(1000), free, workers)
    assert [next(results) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(ArgumentError, match="item 3 is wrong"):
        next(results)
    assert len(started) <= 3 + 2 * workers + 1
    assert torch.get_num_threads() == 3


def test_what_is_pending_is_cancelled_when_the_consumer_gives_up():
    work = Watched(waiting=1)
    results = map_in_order(work, range(100), free, 2)
    assert next(results) == 0
    threading.Timer(0.2, work.gate.set).start()
    results.close()
    assert set(work.started) <= {0, 1, 2}  # two workers are at 1 and 2; 3 was waiting for one of them
    assert torch.get_num_threads() == 3


def test_no_more_are_under_way_than_memory_and_workers_allow(monkeypatch):
    monkeypatch.setattr(parallel, "MAX_MEMORY", 10)
    sizes = {0: 4, 1: 4, 2: 4, 3: 25, 4: 1, 5: 9, 6: 1}
    taken, asked, most = [], [], []

    def bytes_of(item):
        asked.append(item)
        return sizes[item]

    lock = threading.Lock()
    running: set[int] = set()

    def work(item):
        with lock:
            running.add(item)
            most.append(sum(sizes[one] for one in running))
        threading.Event().wait(0.01)
        with lock:
            running.discard(item)
        return item

    for item in map_in_order(work, sizes, bytes_of, 3):
        taken.append(item)
    assert taken == asked == list(sizes)
    assert max(most) == 25  # the one that is too large for the bound, alone
    assert sorted(most)[-2] <= 10


def test_results_that_nobody_takes_do_not_pile_up():
    work = Watched()
    results = map_in_order(work, range(100), free, 3)
    next(results)
    threading.Event().wait(0.2)
    assert len(work.started) <= 6  # two a worker, the one that was taken among them
    results.close()


@pytest.mark.parametrize("workers", [0, -1])
def test_no_workers_are_refused_at_once(workers):
    with pytest.raises(ArgumentError, match=f"workers must be at least 1, got {workers}"):
        map_in_order(free, [1], free, workers)
