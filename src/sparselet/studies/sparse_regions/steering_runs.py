"""A model taught worked sums in a verbose and a terse form, and what a steering vector does to its answers."""

import random
import re
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sparselet.adapter import SparseAdapter
from sparselet.apply import apply_temporarily
from sparselet.evaluation import EvalSettings
from sparselet.tasks.rows import Row
from sparselet.tasks.task import Task, write_task
from sparselet.training import TrainSettings, train
from sparselet.workflows.steering import Pair, SteerSettings, fit_vector, steered_scores

BRIEFLY, IN_STEPS = "Briefly: ", "In steps: "  # in front of a quarter of the training prompts each
VERBOSE = 0.9  # share of the other rows with a verbose target, so that the model is verbose by itself
GOAL = 20.0  # percent fewer tokens
HELD_BACK = 16  # validation rows of each task


def steering_run(
    base: tuple[PreTrainedModel, PreTrainedTokenizerBase],
    *,
    seed: int,
    train_settings: Mapping[str, Any],
    train_rows: int,
    pairs: int,
    kl: float,
    rows: int,
    max_new_tokens: int,
    progress: Callable[[float], None],
) -> dict[str, float]:
    """By arm (none, steered, reversed, random), of sums, and of other prompts and vectors with their name in front.

    tokens: the mean length of answers. fewer: how much shorter they are than unsteered ones, in percent. accuracy: of their
    last number, in percent. goal fewer: 20. second: differences. brief: sums that are asked for briefly. ends: sums, by a
    vector of the last tokens of answers, as ASC has it; the others' is of prompts that ask for the one or the other.

    A sparse expert learns both tasks; vectors are of sums. train_settings: fields of `TrainSettings`. train_rows, rows: of
    each task.
    """
    source = random.Random(seed)
    sums, differences = (worked(name, source, train_rows + HELD_BACK + rows + pairs) for name in ("sums", "differences"))
    tasks = [_task(name, own, train_rows, rows, source) for name, own in (("sums", sums), ("differences", differences))]
    model, tokenizer = base
    with tempfile.TemporaryDirectory() as directory:
        places = tuple(str(write_task(task, Path(directory, "tasks"))) for task in tasks)
        settings = TrainSettings(**train_settings, task=places, chat_template=False, profile=False, seed=seed)
        expert = cast(SparseAdapter, train(settings, Path(directory, "expert"), base=base))
    progress(0.6)
    numbers = {"goal fewer": GOAL}
    fitted = [Pair(terse, verbose, prompt, BRIEFLY + prompt, IN_STEPS + prompt) for prompt, verbose, terse in sums[-pairs:]]
    briefly = Task("sums", {"test": tuple(replace(row, input=f"{BRIEFLY}{row.input}") for row in tasks[0].rows("test"))})
    how = EvalSettings(rows, False, max_new_tokens=max_new_tokens)
    with apply_temporarily(model, expert):
        of_prompts, of_answers = (
            fit_vector(model, tokenizer, own, SteerSettings(kl=kl), chat_template=False)
            for own in (fitted, [Pair(pair.concise, pair.verbose, pair.prompt) for pair in fitted])
        )
        progress(0.7)
        measured = {
            "": (of_prompts, tasks[0]),
            "second ": (of_prompts, tasks[1]),
            "brief ": (of_prompts, briefly),
            "ends ": (of_answers, tasks[0]),
        }
        for prefix, (vector, task) in measured.items():
            scores = steered_scores(model, tokenizer, vector, [task], how, metrics=[last_number], seed=seed)
            for score in scores:
                numbers[f"{prefix}{score.arm} tokens"] = score.tokens
                numbers[f"{prefix}{score.arm} fewer"] = 100 * (1 - score.tokens / max(1.0, scores[0].tokens))
                numbers[f"{prefix}{score.arm} accuracy"] = score.mean("last_number")
    progress(1.0)
    return numbers


def worked(kind: str, source: random.Random, count: int) -> list[tuple[str, str, str]]:
    """Prompts with a verbose and a terse answer: sums, or differences, of two numbers from 10 to 99."""
    rows: dict[str, tuple[str, str, str]] = {}
    while len(rows) < count:
        a, b = sorted((source.randrange(10, 100), source.randrange(10, 100)), reverse=True)
        tens, ones = 10 * (b // 10), b % 10
        if kind == "sums":
            result, steps = (
                a + b,
                f"First add the tens: {a} + {tens} = {a + tens}. Then add the ones: {a + tens} + {ones} = {a + b}.",
            )
        else:
            result, steps = (
                a - b,
                f"First take the tens: {a} - {tens} = {a - tens}. Then take the ones: {a - tens} - {ones} = {a - b}.",
            )
        prompt, terse = f"What is {a} {'+' if kind == 'sums' else '-'} {b}?\nAnswer:", f"The answer is {result}."
        rows[prompt] = (prompt, f"{steps} {terse}", terse)
    return list(rows.values())


def last_number(answers: Sequence[str], targets: Sequence[str]) -> float:
    """Answers whose last number is that of their target, per hundred."""
    numbers = [[(re.findall(r"\d+", text) or [""])[-1] for text in texts] for texts in (answers, targets)]
    return 100 * sum(a == t for a, t in zip(*numbers, strict=True)) / len(targets)


def _task(name: str, worked_rows: Sequence[tuple[str, str, str]], train: int, test: int, source: random.Random) -> Task:
    """A quarter of the prompts ask for the terse answer and a quarter for the verbose one, but for test rows."""

    def taught(prompt: str, verbose: str, terse: str) -> Row:
        drawn = source.random()
        if drawn < 0.25:
            return Row(BRIEFLY + prompt, terse)
        if drawn < 0.5:
            return Row(IN_STEPS + prompt, verbose)
        return Row(prompt, verbose if source.random() < VERBOSE else terse)

    rows = [taught(*row) for row in worked_rows[: train + HELD_BACK]]
    tested = [Row(prompt, verbose) for prompt, verbose, _ in worked_rows[len(rows) : len(rows) + test]]
    splits = {"train": rows[:train], "validation": rows[train:], "test": tested}
    return Task(name, {split: tuple(own) for split, own in splits.items()})
