"""Prompts of a stated length: the answer follows from the text alone, and equal seeds give equal rows."""

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparselet.errors import TaskError
from sparselet.tasks.builtin import SIZES
from sparselet.tasks.long_context import COPIED_WORDS, CUE_WORDS, HOPS, LONG_CONTEXT, long_rows, word_count
from sparselet.tasks.task import load_task

NAME = r"the ([a-z]+ [a-z]+)"


def answer(kind: str, prompt: str) -> str:
    """The answer by a search of the text, which knows the sentences' form and nothing else."""
    text, question = prompt.rsplit("\n", 1)
    if kind == "ngrams":
        return str(text.count(re.search(r"say ([a-z ]+)\?", question)[1]))
    if kind == "copy":
        cue = question.partition("Note: ")[2]
        return re.search(rf"Note: {cue} ([^.]+)\.", text)[1]
    name = re.search(rf"(?:code of|does) {NAME}", question)[1]
    if kind == "needle":
        return re.search(rf"code of the {name} is (\d+)\.", text)[1]
    hops = 0
    while (number := re.search(rf"The {name} has (\d+)\.", text)) is None:
        name, hops = re.search(rf"The {name} has as many as {NAME}\.", text)[1], hops + 1
    assert hops == (HOPS if kind == "variables" else 0)
    return number[1]


@settings(max_examples=60, deadline=None)
@given(kind=st.sampled_from(sorted(LONG_CONTEXT)), length=st.integers(160, 1500), seed=st.integers(0, 2**32 - 1))
def test_the_text_has_the_answer_and_the_length_that_is_stated(kind, length, seed):
    for row in long_rows(kind, length, 2, seed):
        assert answer(kind, row.input) == row.target
        assert length - 16 < word_count(row.input) <= length
        assert row.input == row.input.strip()


@settings(max_examples=20, deadline=None)
@given(kind=st.sampled_from(sorted(LONG_CONTEXT)), seed=st.integers(0, 99), split=st.sampled_from(["train", "test"]))
def test_equal_seeds_give_equal_rows_and_the_same_questions_at_each_length(kind, seed, split):
    rows = long_rows(kind, 200, 3, seed, split)
    assert rows == long_rows(kind, 200, 3, seed, split) == long_rows(kind, 200, 5, seed, split)[:3]
    longer = long_rows(kind, 400, 3, seed, split)
    assert [row.target for row in longer] == [row.target for row in rows]
    assert [row.input.rsplit("\n")[-1] for row in longer] == [row.input.rsplit("\n")[-1] for row in rows]
    other = {"train": "test", "test": "train"}[split]
    assert not {row.input for row in rows} & {row.input for row in long_rows(kind, 200, 3, seed, other)}


def test_a_tokenizers_length_is_kept_as_well():
    for row in long_rows("needle", 900, 2, count=len):
        assert 800 < len(row.input) <= 900


def test_facts_are_at_all_depths_and_counts_are_of_all_sizes():
    depths = [row.input.index("The code of") / len(row.input) for row in long_rows("needle", 400, 200)]
    assert min(depths) < 0.05
    assert max(depths) > 0.85
    assert 0.4 < sum(depths) / 200 < 0.55
    assert {row.target for row in long_rows("ngrams", 400, 200)} == set("123456789")
    (row,) = long_rows("copy", 400, 1)
    assert len(row.target.split()) == COPIED_WORDS
    assert len(row.input.rsplit("Note: ")[-1].split()) == CUE_WORDS


@pytest.mark.parametrize("kind", sorted(LONG_CONTEXT))
def test_the_task_is_read_by_its_name(kind):
    task = load_task(f"builtin:{kind}:length=150,seed=2", ("test",))
    assert task.name == f"{kind}:length=150,seed=2"
    assert task.rows("test") == long_rows(kind, 150, SIZES["test"], 2, "test")
    assert load_task(f"builtin:{kind}", ("validation",)).rows("validation") == long_rows(kind, 512, 30, 0, "validation")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("needle:size=3", "expected NAME:length=WORDS"),
        ("needle:length=-3", "expected NAME:length=WORDS"),
        ("needle:length=5", "length must be at least"),
        ("recall:length=999999", "names fill"),
        ("animal_class:length=5", "no built-in task"),
        ("haystack", "no built-in task is called 'haystack'; there are .*needle"),
    ],
)
def test_a_length_that_cannot_be_and_unknown_settings_are_refused(name, message):
    with pytest.raises(TaskError, match=message):
        load_task(f"builtin:{name}", ("test",))
