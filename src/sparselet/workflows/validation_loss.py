"""The loss of a model on the targets of tasks' rows."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sparselet.errors import TaskError
from sparselet.evaluation import EvalSettings
from sparselet.generation.prefix import batch_loss
from sparselet.generation.prompts import prompt_format
from sparselet.tasks.task import Task
from sparselet.training.collate import Encoded, collator, encode

LOSS_BATCH = 8


class ValidationLoss:
    """Rows of tasks, encoded once, and the loss of the model on them with the weights that it has when it is called.

    rows: of each task by name. settings: split, number of rows, template and longest prompt.
    Raises TaskError (a row that does not fit, two tasks of one name), ModelError.
    """

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tasks: Sequence[Task], settings: EvalSettings
    ) -> None:
        form = prompt_format(model, tokenizer, settings.chat_template is not False)
        self._model, self._collate = model, collator(model, form)
        self.rows: dict[str, list[Encoded]] = {}
        for task in tasks:
            if task.name in self.rows:
                raise TaskError(f"two tasks are called {task.name}; rename a directory.")
            where = f"task {task.name}, split {settings.split}"
            self.rows[task.name] = encode(task.rows(settings.split, settings.rows), form, settings.max_input_length, where)

    @torch.no_grad()
    def by_task(self) -> dict[str, float]:
        """The mean loss a target token of each task, in nats."""
        losses = {}
        for name, rows in self.rows.items():
            parts = [rows[i : i + LOSS_BATCH] for i in range(0, len(rows), LOSS_BATCH)]
            counts = [sum(_scored(row) for row in part) for part in parts]
            losses[name] = sum(float(self.of(p)) * n for p, n in zip(parts, counts, strict=True)) / sum(counts)
        return losses

    def of(self, rows: Sequence[Encoded]) -> Tensor:
        """The mean loss of one batch's target tokens, with a gradient where the weights ask for one."""
        batch: dict[str, Any] = self._collate(rows)
        moved = {name: value.to(self._model.device) if isinstance(value, Tensor) else value for name, value in batch.items()}
        return batch_loss(self._model, moved)


def _scored(row: Encoded) -> int:
    return sum(label >= 0 for label in row.get("labels", row["target"]))
