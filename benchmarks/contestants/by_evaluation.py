"""Answers to several tasks: sparselet's `evaluate`, model.generate in the rows' own order, and matrix products alone."""

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from racing.worker import serve
from torch import nn
from torch.nn import functional
from transformers import AutoModelForCausalLM

from contestants.models import DTYPES
from contestants.plain_lora import generate, load_tokenizer, read_rows
from sparselet import models
from sparselet.evaluation import EvalSettings, evaluate
from sparselet.tasks.task import load_task


def by_sparselet(job: dict[str, Any]) -> Callable[[], dict[str, int]]:
    """Everything but rows and length of answers at its default."""
    tasks = [load_task(path, ("test",)) for path in job["tasks"]]
    model = models.load_model(job["model"], job["dtype"]).to(job["device"])
    tokenizer = models.load_tokenizer(job["model"])
    settings = EvalSettings(rows=job["rows"], max_new_tokens=job["max_new_tokens"])
    counted = count_products(model)

    def start() -> dict[str, int]:
        counted.clear()
        results = evaluate(model, tokenizer, tasks, settings=settings)
        write_products(Path(job["products"]), model, counted)
        return _written(job, [[answer for _, answer in result.predictions] for result in results])

    return start


def plainly(job: dict[str, Any]) -> Callable[[], dict[str, int]]:
    model = AutoModelForCausalLM.from_pretrained(job["model"], trust_remote_code=False, dtype=DTYPES[job["dtype"]]).to(
        job["device"]
    )
    tokenizer = load_tokenizer(job["model"])
    tasks = [read_rows(Path(path) / "test.jsonl", job["rows"]) for path in job["tasks"]]

    def start() -> dict[str, int]:
        found = []
        for rows in tasks:
            prompts = [row["input"] for row in rows]
            found.append(generate(model, tokenizer, prompts, job["batch"], job["max_new_tokens"]))
        return _written(job, found)

    return start


def count_products(model: nn.Module) -> Counter[tuple[int, int, int]]:
    """How often, from now on, a linear layer takes (rows, inputs, outputs)."""
    counted: Counter[tuple[int, int, int]] = Counter()

    def count(layer: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        assert isinstance(layer, nn.Linear)
        counted[inputs[0].numel() // layer.in_features, layer.in_features, layer.out_features] += 1

    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.register_forward_pre_hook(count)
    return counted


def write_products(file: Path, model: nn.Module, counted: Counter[tuple[int, int, int]]) -> None:
    """What was counted, and how many layers there are of (inputs, outputs)."""
    layers = Counter((m.in_features, m.out_features) for m in model.modules() if isinstance(m, nn.Linear))
    content = {"products": counted, "weights": layers}
    file.write_text(json.dumps({name: [[*shape, n] for shape, n in found.items()] for name, found in content.items()}))


def products(job: dict[str, Any]) -> Callable[[], dict[str, int]]:
    """The products x Wᵀ that sparselet's linear layers made, with numbers of no meaning, and nothing else.

    There are as many weights of a shape as the model has, and they take turns, so that they come from memory as in the model.
    """
    kind: dict[str, Any] = {"dtype": DTYPES[job["dtype"]], "device": job["device"]}
    asked = json.loads(Path(job["products"]).read_text())
    weights = {
        (inputs, outputs): [torch.randn(outputs, inputs, **kind) for _ in range(count)]
        for inputs, outputs, count in asked["weights"]
    }

    @torch.inference_mode()
    def start() -> dict[str, int]:
        for rows, inputs, outputs, count in asked["products"]:
            x, turns = torch.randn(rows, inputs, **kind), weights[inputs, outputs]
            for number in range(count):
                functional.linear(x, turns[number % len(turns)])
        return {"products": sum(count for *_, count in asked["products"])}

    return start


def _written(job: dict[str, Any], answers: list[list[str]]) -> dict[str, int]:
    Path(job["answers"]).write_text(json.dumps(answers))
    return {"rows": sum(map(len, answers))}


JOBS = {"sparselet": by_sparselet, "plain": plainly, "products": products}

if __name__ == "__main__":
    serve(JOBS, ("sparselet", "torch", "transformers", "peft"), threads=torch.get_num_threads())
