"""Scores of a served expert or merge on rows of tasks, answered in the engine's queue like any client's requests."""

from collections.abc import Callable, Sequence
from typing import Any

from fastapi import Request

from sparselet.errors import RequestRefused
from sparselet.intervals import mean_interval
from sparselet.serving.outputs import next_output, output_queue
from sparselet.serving.request import GenerationRequest, Sampling
from sparselet.serving.served_expert import ServedExpert
from sparselet.serving.service import Service
from sparselet.tasks.rows import Message, Prompt
from sparselet.tasks.task import Task

MEASURED_SPLIT = "validation"  # merges are chosen by it, so not by test rows
MEASURED_TOKENS = 64  # as of `sparselet eval`

ScoreAnswers = Callable[[Sequence[str], Sequence[str]], Sequence[float]]
"""Scores in [0, 1] of answers, by their targets."""


class Measuring:
    """The tasks, with validation rows, that a service's experts can be measured on, and the score."""

    def __init__(self, service: Service, tasks: Sequence[Task], score_answers: ScoreAnswers) -> None:
        self.service, self.score_answers = service, score_answers
        self.tasks = {task.name: task.rows(MEASURED_SPLIT) for task in tasks}

    async def score(self, expert: ServedExpert, task: str, rows: int, http: Request) -> dict[str, Any] | None:
        """The mean score × 100 of greedy answers to the first rows of a task, with the ends of its 95 % interval.

        None if the client has gone. Raises RequestRefused for an unknown task, and what `Service.encode` and the engine raise.
        """
        if task not in self.tasks:
            raise RequestRefused(f"task must be one of {', '.join(self.tasks) or 'none'}, got {task!r:.100}.", "task")
        chosen = self.tasks[task][:rows]
        answers = await self._answers(expert, [row.input for row in chosen], http)
        if answers is None:
            return None
        interval = mean_interval([100 * score for score in self.score_answers(answers, [row.target for row in chosen])])
        return {"task": task, "rows": interval.count, "mean": interval.mean, "low": interval.low, "high": interval.high}

    async def _answers(self, expert: ServedExpert, prompts: Sequence[Prompt], http: Request) -> list[str] | None:
        """As many at a time as are answered together, so that others' requests find room in the queue."""
        answers: list[str] = []
        together = self.service.engine.limits.max_rows
        for start in range(0, len(prompts), together):
            submitted = []
            try:
                for prompt in prompts[start : start + together]:
                    outputs, emit = output_queue()
                    turns = [Message("user", prompt)] if isinstance(prompt, str) else prompt
                    encoded = self.service.encode(expert, turns)
                    sampling = Sampling(max_tokens=min(MEASURED_TOKENS, encoded.room))
                    request = GenerationRequest(expert, encoded.tokens, encoded.ends, sampling, emit)
                    self.service.engine.submit(request)
                    submitted.append((request, outputs))
                for _, outputs in submitted:
                    output = await next_output(outputs, http)
                    if output is None:
                        return None
                    if output.error is not None:
                        raise output.error
                    answers.append(output.text)
            finally:
                for request, _ in submitted:
                    request.cancelled = True  # has no effect on an answer that has ended
        return answers
