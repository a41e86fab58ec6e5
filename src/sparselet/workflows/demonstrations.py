"""Demonstrations in the order of the sparsity of their hidden states, and what that order is worth."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sparselet.activations.probe import probe
from sparselet.activations.statistics import sparsity
from sparselet.activations.summary import STATISTICS
from sparselet.errors import ConfigError
from sparselet.evaluation import EvalSettings, evaluate
from sparselet.evaluation.metrics import rouge_l_of_each
from sparselet.intervals import MeanInterval, mean_interval
from sparselet.tasks.rows import Row
from sparselet.tasks.task import Task
from sparselet.tuner.mask_state import seeded
from sparselet.workflows.probing import probe_rows, with_demonstrations


def order_demonstrations(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    demonstrations: Sequence[Row],
    *,
    layer: int = -1,
    statistic: str = "top5",
    chat_template: bool = False,
) -> list[Row]:
    """The demonstrations from the densest to the sparsest state at their prompt's last token (arXiv 2603.03415's curriculum,
    without its cut into five levels).

    statistic: one of `Sparsity`'s fields; by `effective_rank`, which is small for sparse states, the order is the other way
    round, still from dense to sparse. Raises ConfigError for another name, and what `probe_rows` and `probe` raise.
    """
    if statistic not in STATISTICS:
        raise ConfigError(f"statistic must be one of {', '.join(STATISTICS)}, got {statistic!r}.")
    if not demonstrations:
        return []
    states = probe(model, probe_rows(model, tokenizer, demonstrations, chat_template=chat_template), [layer]).states[0, :, 0]
    numbers = vars(sparsity(states))[statistic]
    order = numbers.argsort(descending=statistic == "effective_rank", stable=True)
    return [demonstrations[i] for i in order.tolist()]


@dataclass(frozen=True)
class OrderComparison:
    """Rouge-L × 100 with demonstrations ordered by sparsity and in random order, and the paired difference over rows."""

    ordered: MeanInterval
    random: MeanInterval
    difference: MeanInterval


def compare_orders(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    *,
    demonstrations: int = 8,
    settings: EvalSettings | None = None,
    layer: int = -1,
    statistic: str = "top5",
    seed: int = 0,
    progress: Callable[[int], None] | None = None,
) -> OrderComparison:
    """Answer a task's rows after the same demonstrations, drawn once per row from its training split, in either order.

    settings: which rows, and how they are answered, by default 100 test rows. Raises ConfigError (too few training rows), and
    what `order_demonstrations` and `evaluate` raise.
    """
    settings = settings or EvalSettings(rows=100, chat_template=False)
    rows, pool = task.rows(settings.split, settings.rows), task.rows("train")
    if len(pool) < demonstrations:
        raise ConfigError(f"demonstrations must be at most {len(pool)}, the task's training rows, got {demonstrations}.")
    template = settings.chat_template is not False
    ranked = order_demonstrations(model, tokenizer, pool, layer=layer, statistic=statistic, chat_template=template)
    place = {id(row): i for i, row in enumerate(ranked)}
    scores = []
    drawn = [
        [pool[k] for k in torch.randperm(len(pool), generator=seeded(seed, "order", i))[:demonstrations].tolist()]
        for i in range(len(rows))
    ]
    for chosen in ([sorted(own, key=lambda row: place[id(row)]) for own in drawn], drawn):
        prompted = tuple(with_demonstrations(row, own) for row, own in zip(rows, chosen, strict=True))
        (result,) = evaluate(model, tokenizer, [Task(task.name, {settings.split: prompted})], None, settings, progress)
        answers, targets = [answer for _, answer in result.predictions], [row.target for row in rows]
        scores.append(100 * np.array(rouge_l_of_each(answers, targets)))
    return OrderComparison(*(mean_interval(numbers) for numbers in (*scores, scores[0] - scores[1])))
