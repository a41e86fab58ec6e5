"""Kept values against a list in the order of use."""

from helpers.strategies import few
from hypothesis import given
from hypothesis import strategies as st

from sparselet.serving.latest import Latest


@few
@given(st.integers(1, 12), st.lists(st.tuples(st.booleans(), st.integers(0, 5), st.integers(1, 6)), max_size=30))
def test_the_values_used_last_are_kept_within_the_bound(limit, steps):
    kept, used = Latest(limit, lambda size: size), []  # (key, size), the most recently used last
    for keeps, key, size in steps:
        found = dict(used).get(key)
        if keeps:
            assert kept.keep(key, size) == size
        else:
            assert kept.get(key) == found
            size = found
        if size is not None:
            used = [pair for pair in used if pair[0] != key] + [(key, size)]
        while sum(size for _, size in used) > limit:
            used.pop(0)
        assert kept.size == sum(size for _, size in used)
    for key in range(6):
        assert kept.get(key) == dict(used).get(key)
