"""Which requests begin and which expert is next, by a clock of the test."""

import itertools

import pytest

from sparselet.errors import RequestRefused, ServerBusy
from sparselet.serving.limits import ServingLimits
from sparselet.serving.request import GenerationRequest, Sampling
from sparselet.serving.scheduler import SWAPS_IN_SLICE, Scheduler
from sparselet.serving.served_expert import ServedExpert

A, B, C = (ServedExpert(name, None) for name in "ABC")
SWAP = 0.1


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock():
    return Clock()


def scheduler(clock, **limits):
    return Scheduler(ServingLimits(**{"max_wait": 1.0, **limits}), clock)


def add(to, expert, tokens=10):
    request = GenerationRequest(expert, [5] * 5, frozenset(), Sampling(max_tokens=tokens), print, arrived=to.clock.now)
    to.add(request)
    return request


def begin(to):
    group = to.choose(SWAP)
    return group.expert.digest, to.admit(group)


def test_the_engine_stays_until_another_group_is_overdue(clock):
    to = scheduler(clock)
    add(to, A)
    assert begin(to)[0] == "A"
    add(to, B)
    clock.now = 0.9
    assert begin(to)[0] == "A"
    clock.now = 1.1
    assert begin(to)[0] == "B"
    clock.now = 1.1 + SWAPS_IN_SLICE * SWAP - 0.01
    assert begin(to)[0] == "B"
    clock.now = 2.2
    assert begin(to)[0] == "A"  # its request has begun, and waited since it was left


def test_a_group_without_work_is_left_at_once(clock):
    to = scheduler(clock)
    first, second = add(to, A), add(to, B)
    name, admitted = begin(to)
    assert (name, admitted) == ("A", [first])
    to.finish(to.active, first)
    assert begin(to) == ("B", [second])
    to.finish(to.active, second)
    assert to.choose(SWAP) is None


def test_no_group_waits_longer_than_the_slices_of_the_others(clock):
    to = scheduler(clock, max_wait=0.2)
    served: dict[str, list[float]] = {}
    for expert in (A, B, C):
        add(to, expert, 1000)
    for _ in range(500):
        name, _ = begin(to)
        served.setdefault(name, []).append(clock.now)
        clock.now += 0.05
    bound = 3 * (SWAPS_IN_SLICE * SWAP + SWAP) + 0.2
    for times in served.values():
        assert max(b - a for a, b in itertools.pairwise(times)) <= bound
    assert set(served) == set("ABC")


def test_rows_and_tokens_of_the_cache_bound_what_begins(clock):
    to = scheduler(clock, max_rows=2, cache_tokens=50)
    requests = [add(to, A) for _ in range(3)]
    assert begin(to) == ("A", requests[:2])
    add(to, B, 20)  # 15 + 15 + 25 tokens
    clock.now = 5
    assert begin(to) == ("A", [])  # B has no room, and the third A must not take it
    to.finish(to.active, requests[0])
    assert begin(to)[0] == "B"


def test_an_overdue_request_without_room_keeps_others_from_beginning(clock):
    to = scheduler(clock, cache_tokens=45)
    first = add(to, A)
    begin(to)
    large = add(to, B, 35)
    clock.now = 2
    late = add(to, A)
    assert begin(to) == ("A", [])
    to.finish(to.active, first)
    assert begin(to) == ("B", [large])
    assert to.waiting == 1
    assert late in to.groups["A"].waiting


def test_a_full_queue_and_a_request_larger_than_the_cache(clock):
    to = scheduler(clock, max_queue=1, cache_tokens=20)
    with pytest.raises(RequestRefused, match="21 tokens"):
        add(to, A, 16)
    add(to, A)
    with pytest.raises(ServerBusy) as busy:
        add(to, A)
    assert busy.value.retry_after >= 1


def test_cancelled_requests_that_wait_are_dropped(clock):
    to = scheduler(clock)
    first, second = add(to, A), add(to, A)
    first.cancelled = True
    to.drop_cancelled()
    assert to.waiting == 1
    assert begin(to) == ("A", [second])
