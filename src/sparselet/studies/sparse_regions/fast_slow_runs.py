"""A run of fast–slow training, measured: rewards, steps to a reward, and how far the model is from the base by then."""

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sparselet.apply import apply_temporarily
from sparselet.evaluation import EvalSettings, evaluate
from sparselet.evaluation_mode import evaluation_mode
from sparselet.expert import Expert
from sparselet.generation.prompts import in_prompt, prompt_format
from sparselet.io.json_files import read_object
from sparselet.tasks.task import Task, write_task
from sparselet.training import TrainSettings
from sparselet.training.collate import encode
from sparselet.training.run_directory import RUN_FILE
from sparselet.workflows.fast_slow import fast_slow
from sparselet.workflows.fast_slow_settings import FastSlowSettings
from sparselet.workflows.rollouts import AfterSteps
from sparselet.workflows.validation_loss import ValidationLoss

Base = tuple[PreTrainedModel, PreTrainedTokenizerBase]

DRIFT_ROWS = 16  # validation rows of each task that the distance from the base is measured on


def fast_slow_run(
    base: Base,
    task: Task,
    second: Task,
    *,
    train: Mapping[str, Any],
    how: Mapping[str, Any],
    gain: float,
    rows: int,
    progress: Callable[[float], None],
) -> dict[str, float]:
    """The numbers of one run, times 100 but for steps.

    base first, base final, tuned first, tuned final: the reward of test rows, under the first prompt and the final one.
    steps, KL, loss: at the first round whose best prompt has a reward by `gain` above the base model's under the first prompt,
    or at the end where none has: the optimizer steps until then; KL(π ‖ base) of the next token over the targets of
    validation rows under the first prompt, in nats; and how much the loss of the second task has risen.
    train, how: fields of `TrainSettings` and `FastSlowSettings`. second: a task that is not trained on. rows: test rows.
    """
    settings = FastSlowSettings(**how)
    drift = Drift(base, task, second, settings.prompts[0], settings.fast_every)
    with tempfile.TemporaryDirectory() as directory:
        place = write_task(task, Path(directory))
        chosen = TrainSettings(**train, task=str(place), method="fast-slow", chat_template=False)
        out = Path(directory, "expert")
        expert = fast_slow(chosen, settings, out, base=base, callbacks=[drift])
        rounds = read_object(out / RUN_FILE)["rounds"]
    figures = expert.metadata.metrics or {}
    prompts = {"first": settings.prompts[0], "final": str(expert.metadata.prompt)}

    def scores(who: str, adapter: Expert | None) -> dict[str, float]:
        numbers = {}
        for name, prompt in prompts.items():
            how_asked = EvalSettings(rows, False, max_new_tokens=settings.max_new_tokens, prompt=prompt)
            (result,) = evaluate(*base, [task], adapter, how_asked, metrics=[settings.reward])
            numbers[f"{who} {name}"] = result.scores[settings.reward]
        return numbers

    numbers = scores("base", None) | scores("tuned", expert)
    with apply_temporarily(base[0], expert):
        drift.measure(figures["steps"])
    target = figures["reward_base_seed"] + gain
    reached = [each["step"] for each in rounds if each["pool"][0]["reward"] >= target]
    step = min(reached, default=figures["steps"])
    kl, loss = drift.steps[step]
    progress(1.0)
    return numbers | {"steps": float(step), "KL": 100 * kl, "loss": 100 * (loss - drift.steps[0][1])}


class Drift(AfterSteps):
    """By step, KL(π ‖ base) over targets of a task's validation rows in `prompt`, and the loss of the second task.

    As a callback it measures after each `interval` steps; made, it has measured the base model.
    """

    def __init__(self, base: Base, task: Task, second: Task, prompt: str, interval: int = 0) -> None:
        super().__init__(interval, self.measure)
        model, tokenizer = base
        form = prompt_format(model, tokenizer, False)
        source = EvalSettings(DRIFT_ROWS, False, split="validation")
        rows = [replace(row, input=in_prompt(prompt, row.input)) for row in task.rows("validation", DRIFT_ROWS)]
        self.rows = [(row["prompt"], row["target"]) for row in encode(rows, form, source.max_input_length, task.name)]
        self.model, self.loss = model, ValidationLoss(model, tokenizer, [second], source)
        self.before = [self._distributions(*row) for row in self.rows]
        self.steps: dict[int, tuple[float, float]] = {}
        self.measure(0)

    def measure(self, step: int) -> None:
        """Measure the model as it is now."""
        sums, count = 0.0, 0
        with evaluation_mode(self.model):
            for row, before in zip(self.rows, self.before, strict=True):
                now = self._distributions(*row)
                sums, count = sums + float((now.exp() * (now - before)).sum()), count + len(now)
            (loss,) = self.loss.by_task().values()
        self.steps[step] = (sums / count, loss)

    @torch.no_grad()
    def _distributions(self, prompt: list[int], target: list[int]) -> Tensor:
        """log p of each token of the target, float64 [tokens, vocabulary]."""
        tokens = torch.tensor([prompt + target], device=self.model.device)
        logits = self.model(input_ids=tokens, use_cache=False).logits[0, len(prompt) - 1 : -1]
        return logits.double().log_softmax(-1).cpu()
