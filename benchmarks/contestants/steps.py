"""A step of training, the same for every contestant: forward, backward, fused AdamW."""

import gc
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from contestants.models import make_batch, make_model

RATE = 1e-4


@dataclass
class Training:
    """A model that is ready to be trained, and how far it is.

    module: what is called with the batch. optimizer: None where nothing is trained, as for the floor.
    first: the loss of its first step; all contestants begin at the same model, so it must be the same for all.
    """

    module: nn.Module
    batch: dict[str, Any]
    optimizer: torch.optim.Optimizer | None
    first: Tensor | None = None

    def step(self) -> Tensor:
        """The loss before the step."""
        if self.optimizer is not None:
            self.optimizer.zero_grad()
        loss = self.module(**self.batch).loss
        loss.backward()
        if self.optimizer is not None:
            self.optimizer.step()
        self.first = loss.detach() if self.first is None else self.first
        return loss.detach()


def trained(module: nn.Module, batch: dict[str, Any]) -> Training:
    """Trains whatever of the module requires a gradient."""
    module.train()
    return Training(module, batch, torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], lr=RATE, fused=True))


def model_and_batch(job: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The job's model, all of it frozen, and its batch."""
    model = make_model(job["model"], job["dtype"], job["device"])
    model.requires_grad_(False)
    return model, make_batch(model, job["batch"], job["tokens"])


_kept: dict[str, Any] = {}


def kept(job: dict[str, Any], build: Callable[[dict[str, Any]], Any]) -> Any:
    """What `build` makes of the job, once for all jobs that differ only in what is done with it.

    Without `keep` only the last is held: it goes before the next is built.
    """
    key = json.dumps([job["variant"], *(job[field] for field in ("model", "dtype", "device", "batch", "tokens"))])
    if key in _kept:
        return _kept[key]
    if not job["keep"]:
        _kept.clear()
        gc.collect()
    _kept[key] = build(job)
    return _kept[key]


def step_job(build: Callable[[dict[str, Any]], Training]) -> Callable[[dict[str, Any]], Callable[[], dict[str, Any]]]:
    """The job of a step. What is built anew has made `warm` steps before it is measured.

    Returns the loss of the first step, that of this one, and how many numbers are trained.
    """

    def prepare(job: dict[str, Any]) -> Callable[[], dict[str, Any]]:
        training = kept(job, build)
        if training.first is None:
            for _ in range(job["warm"]):
                training.step()
        count = sum(p.numel() for p in training.module.parameters() if p.requires_grad)

        def start() -> dict[str, Any]:
            last = training.step()
            return {"first": training.first, "last": last, "trained": count}

        return start

    return prepare


def several(steps: Sequence[Callable[[], Any]]) -> Callable[[], Any]:
    """One after the other; the value is that of the last."""

    def start() -> Any:
        for step in steps[:-1]:
            step()
        return steps[-1]()

    return start


def swap_merged(model: Any, names: tuple[str, str]) -> Callable[[], None]:
    """The merged adapter out of a `PeftModel`'s weights, the other one in. The first is merged before the clock starts."""
    layer = next(module for module in model.modules() if hasattr(module, "merged_adapters"))
    if not layer.merged_adapters:
        model.merge_adapter([names[0]])

    def start() -> None:
        other = names[layer.merged_adapters[0] == names[0]]
        model.unmerge_adapter()
        model.merge_adapter([other])

    return start
