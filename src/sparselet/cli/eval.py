"""`sparselet eval`."""

import json as json_library
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from sparselet.adapter import AdapterFile, SparseAdapter
from sparselet.cli.opening import open_experts, template_of
from sparselet.cli.terminal import print_json, progress, quiet_libraries, say, table
from sparselet.evaluation import EvalResult, EvalSettings, evaluate
from sparselet.evaluation.metrics import DEFAULT_METRICS, choose_metrics
from sparselet.expert import Expert
from sparselet.io.atomic import write_text
from sparselet.io.paths import check_output
from sparselet.models import load_model, load_tokenizer
from sparselet.tasks.task import load_task

_TITLES = {"rougeL": "Rouge-L", "exact_match": "exact match", "chrf": "chrF"}


def eval_(
    *,
    task: Annotated[list[str], Parameter(consume_multiple=True, negative="")],
    model: str = "packaged:smollm2-135m",
    adapter: Annotated[list[str] | None, Parameter(consume_multiple=True, negative="")] = None,
    base: bool | None = None,
    metric: Annotated[list[str] | None, Parameter(consume_multiple=True, negative="")] = None,
    input_column: str = "input",
    target_column: str = "target",
    rows: int | None = None,
    chat_template: bool | None = None,
    max_input_length: int = 2048,
    max_new_tokens: int = 64,
    batch_size: int | None = None,
    dtype: str = "float32",
    predictions: Path | None = None,
    json: bool = False,
) -> None:
    """Measure models on tasks: mean Rouge-L (F1 × 100) and exact match of greedy answers to the test rows, or other metrics.

    The base model is loaded once; each adapter, expert or merged, is written into it for its turn.

        sparselet eval --task builtin:table_order --adapter expert-a merged
        sparselet eval --task task-a task-b --model merged-checkpoint

    Parameters
    ----------
    task
        Tasks: directories, builtin:NAME, or hub data sets.
    model
        Base model or merged checkpoint: a hub name, a directory, or packaged:smollm2-135m.
    adapter
        Experts to measure on that model: directories or hub names of sparse adapters, PEFT adapters or full checkpoints.
    base
        Measure the model without an adapter too; by default only when no adapter is given.
    metric
        What is measured, the first one shown first: rougeL, exact_match, chrf (sacrebleu's chrF2), or MODULE:FUNCTION, a Python
        function of answers and targets that returns a number. By default rougeL and exact_match.
    input_column
        What the tasks' rows call the prompt; by default input, prompt or messages, whichever they have.
    target_column
        What the tasks' rows call the text to produce; by default target or completion, whichever they have.
    rows
        Use only the first test rows of each task.
    chat_template
        Ask through the tokenizer's chat template; by default as the adapters were trained.
    max_input_length
        Tokens of a prompt; longer ones are cut from the left.
    max_new_tokens
        Longest answer, in tokens.
    batch_size
        Rows answered together; by default as many as hold 16,384 tokens with their answers.
    dtype
        Dtype of the model: float32, bfloat16 or float16.
    predictions
        Write every answer to this file, as JSON lines.
    json
        Print the result as JSON.
    """
    quiet_libraries()
    if predictions is not None:
        check_output(predictions, directory=False)
    asked = EvalSettings(rows, True, max_input_length, max_new_tokens, batch_size)
    metrics, names = metric or DEFAULT_METRICS, adapter or []
    choose_metrics(metrics)  # before anything is loaded
    adapters = {name: _checked(expert) for name, expert in zip(names, open_experts(names, model), strict=True)}
    asked = replace(asked, chat_template=template_of(chat_template, adapters.values()))
    tasks = [load_task(source, ("test",), {"input": input_column, "target": target_column}) for source in task]
    loaded, tokenizer = load_model(model, dtype), load_tokenizer(model)
    models: dict[str, Expert | None] = dict(adapters)
    if base or (base is None and not adapters):
        models = {model: None, **models}
    results: dict[str, list[EvalResult]] = {}
    total = len(models) * sum(len(t.rows("test", rows)) for t in tasks)
    with progress(total, "answering") as advance:
        for name, one in models.items():
            results[name] = evaluate(loaded, tokenizer, tasks, one, asked, advance, metrics)
    if predictions is not None:
        write_text(predictions, _jsonl(results))
    if json:
        print_json({name: {r.task: {**r.scores, "rows": r.rows} for r in found} for name, found in results.items()})
        return
    first, *others = (_TITLES.get(name, name) for name in metrics)
    columns = [f"{first} ({', '.join(others)})" if others else first, *(t.name for t in tasks), "mean"]
    shown = [
        [name, *(_shown(r, metrics) for r in found), sum(r.scores[metrics[0]] for r in found) / len(found)]
        for name, found in results.items()
    ]
    table(f"{sum(r.rows for r in next(iter(results.values())))} test rows", columns, shown)
    if predictions is not None:
        say(f"Answers written to {predictions}")
    if not adapters:
        say("Next: sparselet train --task TASK --out EXPERT, then measure it with --adapter EXPERT.")


def _checked(expert: Expert) -> Expert:
    """An expert, checked to the last value before anything is measured; a sparse one in memory."""
    if isinstance(expert, AdapterFile):
        return SparseAdapter.load(expert.path)
    expert.check_values()
    return expert


def _shown(result: EvalResult, metrics: Sequence[str]) -> str:
    first, *others = (result.scores[name] for name in metrics)
    return f"{first:.1f} ({', '.join(f'{score:.0f}' for score in others)})" if others else f"{first:.1f}"


def _jsonl(results: dict[str, list[EvalResult]]) -> str:
    lines = [
        {"model": name, "task": r.task, **row.as_json(), "answer": answer}
        for name, found in results.items()
        for r in found
        for row, answer in r.predictions
    ]
    return "".join(json_library.dumps(line, ensure_ascii=False) + "\n" for line in lines)
