"""Other forms of rows: the same tokens in another order, demonstrations, and demonstrations ordered by sparsity."""

import pytest
import torch

import sparselet as sl
from sparselet.activations.statistics import sparsity
from sparselet.errors import ConfigError, TaskError
from sparselet.models import load_model, load_tokenizer
from sparselet.tasks.rows import Message, Row
from sparselet.tasks.task import load_task
from sparselet.workflows.demonstrations import compare_orders
from sparselet.workflows.probing import demonstrated_rows, probe_rows, shuffled_rows, text_rows, with_demonstrations

ROWS = [Row(f"prompt number {i}", f"answer {i}") for i in range(6)]


@pytest.fixture(scope="module")
def loaded(base_dir):
    return load_model(base_dir), load_tokenizer(base_dir)


def test_a_shuffled_row_has_the_same_tokens_and_the_same_ends(loaded):
    rows = probe_rows(*loaded, ROWS)
    mixed = shuffled_rows(rows, seed=3)
    assert mixed == shuffled_rows(rows, seed=3) != shuffled_rows(rows, seed=4)
    for row, other in zip(rows, mixed, strict=True):
        prompt = len(row.tokens) - row.scored
        assert sorted(row.tokens[:prompt]) == sorted(other.tokens[:prompt])
        assert (row.tokens[0], row.tokens[prompt - 1 :]) == (other.tokens[0], other.tokens[prompt - 1 :])
        assert row != other
    short = probe_rows(*loaded, [Row("a", "b")])
    assert shuffled_rows(short) == short


def test_prompts_are_cut_from_the_left_and_texts_are_halved(loaded):
    model, tokenizer = loaded
    (whole,), (cut,) = (probe_rows(*loaded, ROWS[:1], max_length=length) for length in (100, 5))
    assert cut.tokens == whole.tokens[-5 - whole.scored :]
    (row,) = text_rows(*loaded, ["eight ch"])
    assert (len(row.tokens), row.scored) == (8, 4)
    with pytest.raises(TaskError, match="text 1: has one token only"):
        text_rows(model, tokenizer, ["a"])


def test_demonstrations_come_before_the_prompt_and_differ_by_row():
    row = with_demonstrations(ROWS[0], ROWS[1:3])
    assert row.input == "prompt number 1\nanswer 1\n\nprompt number 2\nanswer 2\n\nprompt number 0"
    assert row.target == "answer 0"
    drawn = demonstrated_rows(ROWS, ROWS, 2)
    assert drawn == demonstrated_rows(ROWS, ROWS, 2)
    assert len({row.input.rpartition("\n\n")[0] for row in drawn}) > 1
    with pytest.raises(ConfigError, match="demonstrations must be at most 6"):
        demonstrated_rows(ROWS, ROWS, 7)
    with pytest.raises(TaskError, match="conversations"):
        with_demonstrations(Row((Message("user", "a"),), "b"), ROWS[:1])


@pytest.mark.parametrize("statistic", ["top5", "effective_rank"])
def test_demonstrations_are_ordered_from_dense_to_sparse(loaded, statistic):
    ordered = sl.order_demonstrations(*loaded, ROWS, statistic=statistic, layer=1)
    assert sorted(ordered, key=str) == sorted(ROWS, key=str)
    model = loaded[0]
    numbers = []
    for row in probe_rows(*loaded, ordered):
        with torch.no_grad():
            states = model(input_ids=torch.tensor([row.tokens[: -row.scored]]), output_hidden_states=True).hidden_states[1]
        numbers.append(float(vars(sparsity(states[0, -1:]))[statistic]))
    assert numbers == pytest.approx(sorted(numbers, reverse=statistic == "effective_rank"), abs=1e-6)
    assert sl.order_demonstrations(*loaded, []) == []
    with pytest.raises(ConfigError, match="statistic must be one of hoyer"):
        sl.order_demonstrations(*loaded, ROWS, statistic="size")


def test_orders_are_compared_on_the_same_rows(loaded, task_dir):
    task, settings = load_task(task_dir), sl.EvalSettings(rows=3, max_new_tokens=3, chat_template=False)
    comparison = compare_orders(*loaded, task, demonstrations=3, settings=settings)
    assert comparison.difference.mean == pytest.approx(comparison.ordered.mean - comparison.random.mean)
    assert comparison.difference.count == 3
    alone = compare_orders(*loaded, task, demonstrations=1, settings=settings)  # one demonstration has one order
    assert alone.difference.mean == 0
