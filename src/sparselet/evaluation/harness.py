"""Measuring a base model, adapters and merged adapters on the test splits of tasks."""

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sparselet.delta import SparseDelta
from sparselet.evaluation.generate import generate
from sparselet.evaluation.rouge import exact_match, rouge_l
from sparselet.resident import applied
from sparselet.tasks import Row, Task


@dataclass(frozen=True)
class Result:
    """One model on one task: mean Rouge-L F1 and exact match, both × 100, and what was answered."""

    task: str
    rougeL: float
    exact_match: float
    rows: int
    predictions: tuple[tuple[Row, str], ...]


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[Task],
    adapter: Mapping[str, SparseDelta] | None = None,
    *,
    limit: int | None = None,
    chat_template: bool = True,
    max_input_length: int = 2048,
    max_new_tokens: int = 64,
    batch_size: int = 64,
    progress: Callable[[int], None] | None = None,
) -> list[Result]:
    """Greedy answers to the first `limit` test rows of each task, scored.

    adapter: written into the model's weights meanwhile; the base model alone without one.
    Raises what `resident.applied` raises for an adapter that does not fit.
    """
    results = []
    with applied(model, adapter) if adapter is not None else contextlib.nullcontext():
        for task in tasks:
            rows = task.rows("test", limit)
            answers = generate(
                model,
                tokenizer,
                [row.input for row in rows],
                chat_template=chat_template,
                max_input_length=max_input_length,
                max_new_tokens=max_new_tokens,
                batch_size=batch_size,
                progress=progress,
            )
            targets = [row.target for row in rows]
            results.append(
                Result(
                    task=task.name,
                    rougeL=rouge_l(answers, targets),
                    exact_match=exact_match(answers, targets),
                    rows=len(rows),
                    predictions=tuple(zip(rows, answers, strict=True)),
                )
            )
    return results
