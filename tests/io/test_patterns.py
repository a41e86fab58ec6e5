"""Regular expressions from files: what `re` says, in bounded time."""

import contextlib
import re
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparselet.errors import ConfigError
from sparselet.io.patterns import first_matches, groups

NAMES = ["model.layers.0.self_attn.q_proj", "model.layers.11.mlp.up_proj", "lm_head", "a" * 60, ""]
PATTERNS = st.lists(st.text("aq._|*+?()[]^$\\d01", max_size=8), max_size=3)


@given(PATTERNS, st.lists(st.text("aq._01", max_size=12), max_size=3))
def test_matches_are_those_of_re(patterns, names):
    try:
        compiled = [re.compile(pattern) for pattern in patterns]
    except re.error:
        return
    try:
        found = first_matches(patterns, names)
    except ConfigError:  # what one of the two libraries does not take
        return
    assert found == {name: next((i for i, p in enumerate(compiled) if p.match(name)), None) for name in names}


def test_groups_of_whole_matches():
    assert groups(r"model\.layers\.(\d+)\..*_(proj)", NAMES) == {NAMES[0]: ("0", "proj"), NAMES[1]: ("11", "proj")}
    assert groups("lm|lm_head", NAMES) == {"lm_head": ()}


@pytest.mark.parametrize(
    "pattern", ["(a+)+b", "(a|a)*b", "(.*a){30}b", "(a|aa)+$b", "((a?){40}){40}a{1500}b", "(?:a*){40}b", "a" * 5000, "(" * 3000]
)
def test_no_pattern_takes_for_ever(pattern):
    begun = time.process_time()
    with contextlib.suppress(ConfigError):
        assert first_matches([pattern], ["a" * 60] * 3) == {"a" * 60: None}
    assert time.process_time() - begun < 4


def test_a_slow_pattern_is_refused_by_name():
    with pytest.raises(ConfigError, match=r"\(a\|aa\)\+\$b' takes too long to match 'aaaa"):
        first_matches(["(a|aa)+$b"], ["a" * 60])


@pytest.mark.parametrize("pattern", ["(", "[", "*", "(?R)", "a{2,1}", "(?P<a>x)(?P<a>y)", "\\"])
def test_what_is_no_regular_expression_is_refused(pattern):
    with pytest.raises(ConfigError, match="is not a regular expression"):
        first_matches([pattern], NAMES)
