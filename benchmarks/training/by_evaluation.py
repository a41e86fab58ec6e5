"""Answers to several tasks: sparselet's `evaluate`, and model.generate in the rows' own order."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from racing.worker import serve
from transformers import AutoModelForCausalLM

from sparselet import models
from sparselet.evaluation import EvalSettings, evaluate
from sparselet.tasks import load_task
from training.models import DTYPES
from training.plain_lora import generate, load_tokenizer, read_rows


def by_sparselet(job: dict[str, Any]) -> Callable[[], dict[str, int]]:
    """Everything but rows and length of answers at its default."""
    tasks = [load_task(path, ("test",)) for path in job["tasks"]]
    model = models.load_model(job["model"], job["dtype"]).to(job["device"])
    tokenizer = models.load_tokenizer(job["model"])
    settings = EvalSettings(rows=job["rows"], max_new_tokens=job["max_new_tokens"])

    def start() -> dict[str, int]:
        results = evaluate(model, tokenizer, tasks, settings=settings)
        return _written(job, [[answer for _, answer in result.predictions] for result in results])

    return start


def plainly(job: dict[str, Any]) -> Callable[[], dict[str, int]]:
    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=DTYPES[job["dtype"]]).to(job["device"])
    tokenizer = load_tokenizer(job["model"])
    tasks = [read_rows(Path(path) / "test.jsonl", job["rows"]) for path in job["tasks"]]

    def start() -> dict[str, int]:
        found = []
        for rows in tasks:
            prompts = [row["input"] for row in rows]
            found.append(generate(model, tokenizer, prompts, job["batch"], job["max_new_tokens"]))
        return _written(job, found)

    return start


def _written(job: dict[str, Any], answers: list[list[str]]) -> dict[str, int]:
    Path(job["answers"]).write_text(json.dumps(answers))
    return {"rows": sum(map(len, answers))}


if __name__ == "__main__":
    jobs = {"sparselet": by_sparselet, "plain": plainly}
    serve(jobs, ("sparselet", "torch", "transformers", "peft"), threads=torch.get_num_threads())
