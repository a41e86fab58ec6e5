"""What a table is made of: experts, merges and evaluations of a study, as units. Nothing is trained here.

A table's row reads as in the paper:

    experts = study.experts(score="gm")
    merged = study.merge(experts, "overlap")
    row = study.individual(experts), study.held_in(merged), study.held_out(merged)

The same expert asked for by two tables is one unit, which is trained once.
"""

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from typing import Any

from sparselet.evaluation import EvalSettings
from sparselet.merging.methods import complete_parameters
from sparselet.studies.engine.unit import Unit
from sparselet.studies.settings import StudySettings
from sparselet.studies.table import Cell
from sparselet.training.settings import TrainSettings

# One mapping a seed: the expert of each task.
Experts = tuple[Mapping[str, Unit], ...]
# One a seed: a merge, or whatever else is one model for all tasks. None is the base model.
Subject = tuple[Unit | None, ...]

BASE: Subject = (None,)


@dataclass(frozen=True)
class Study:
    """Makes the units of a study.

    data: of each task the fingerprints of its rows, `train` and `test`. base: the base model's fingerprint.
    """

    settings: StudySettings
    data: Mapping[str, Mapping[str, str]]
    base: str

    # What is trained and merged

    def experts(self, tasks: Sequence[str] = (), **changes: Any) -> Experts:
        """One expert for each held-in task, or for these; sparse with the study's settings, except for the changes.

        changes: fields of `TrainSettings`. Raises TypeError for another, ConfigError and its kin for a value out of range.
        """
        named = self._in_order(tasks or self.settings.held_in)
        return tuple({task: self._trained((task,), seed, changes) for task in named} for seed in self.settings.seeds)

    def dense(self) -> Experts:
        """Experts of which every entry of the targets is trained: density 1."""
        return self.experts(method="full-qkv", learning_rate=self.settings.learning_rate["sparse"])

    def multitask(self) -> Subject:
        """One model, all weights trained on all held-in tasks."""
        return tuple(self._trained(self.settings.held_in, seed, {"method": "multitask"}) for seed in self.settings.seeds)

    def second_stage(self, merged: Subject, epochs: float, all_weights: bool) -> Subject:
        """A merge trained on, on all held-in tasks: the merged entries alone, or all weights."""
        rows = self.settings.second_stage_rows or self.settings.train_rows
        changes = {"method": "multitask" if all_weights else "sparse", "epochs": epochs, "train_rows": rows}
        started = zip(self.settings.seeds, merged, strict=True)
        return tuple(self._trained(self.settings.held_in, seed, changes, start) for seed, start in started)

    def merge(
        self, experts: Experts, method: str, parameters: Mapping[str, Any] | None = None, tasks: Sequence[str] = ()
    ) -> Subject:
        """The experts, or those of these tasks, merged into one. Raises UnknownMethod, ArgumentError."""
        settings = {"method": method, "parameters": complete_parameters(method, parameters or {})}
        merges = []
        for own in experts:
            inputs = tuple(own[task] for task in self._in_order(tasks or tuple(own)))
            merges.append(Unit("merge", settings, inputs, f"{method} of {len(inputs)}: {_without_task(inputs[0].label)}"))
        return tuple(merges)

    # What is measured: cells of a table

    def individual(self, experts: Experts, paper: float | None = None) -> Cell:
        """Each expert on the test rows of its own task."""
        return Cell(tuple(tuple(self.score(unit, task) for task, unit in own.items()) for own in experts), paper=paper)

    def held_in(self, subject: Subject, paper: float | None = None, tasks: Sequence[str] = ()) -> Cell:
        """A model on the held-in tasks, or on these."""
        return self._asked(subject, tasks or self.settings.held_in, paper)

    def held_out(self, subject: Subject, paper: float | None = None) -> Cell:
        """A model on the held-out tasks."""
        return self._asked(subject, self.settings.held_out, paper)

    def own_masks(self, merged: Subject, experts: Experts, paper: float | None = None) -> Cell:
        """The merge on each expert's task, with only the entries in that expert's masks: m_i ∘ ΔW_m."""
        pairs = zip(merged, experts, strict=True)
        return Cell(tuple(tuple(self.score(one, task, own[task]) for task in own) for one, own in pairs), paper=paper)

    def parameters(self, trained: Experts | Subject, paper: float | None = None) -> Cell:
        """The numbers trained for one expert, in percent of those of full fine-tuning."""
        every = Cell(_units(self.experts(method="full")), "parameters")
        return Cell(_units(trained), "parameters", paper, percent_of=every)

    def active_layers(self, experts: Experts, paper: float | None = None) -> Cell:
        """The layers in which an expert has entries."""
        return Cell(_units(experts), "active_layers", paper)

    def score(self, subject: Unit | None, task: str, masks: Unit | None = None) -> Unit:
        """A model on one task's test rows; with `masks`, with only the entries in that expert's masks."""
        settings = self.settings
        asked = {
            "rows": settings.test_rows,
            "chat_template": None if settings.chat_template else False,
            "max_input_length": settings.max_input_length,
            "max_new_tokens": settings.max_new_tokens,
        }
        told = {
            **self._model(),
            "task": task,
            "data": self.data[task]["test"],
            "eval": _changed(EvalSettings, asked),
            "mask": masks is not None,
        }
        inputs = tuple(unit for unit in (subject, masks) if unit is not None)
        label = f"{subject.label if subject else 'base'}{', own mask only' if masks else ''}, asked {task}"
        return Unit("evaluate", told, inputs, label)

    # Random sets of tasks

    def draws(self, n: int) -> Iterator[tuple[str, ...]]:
        """Random sets of n held-in tasks, no two the same: as many as the study wants, or as there are."""
        wanted = min(self.settings.draws, math.comb(len(self.settings.held_in), n))
        seen: set[tuple[str, ...]] = set()
        turn = 0
        while len(seen) < wanted:
            drawn = sorted(self.settings.held_in, key=lambda task: hashlib.sha256(f"{n} {turn} {task}".encode()).digest())[:n]
            turn += 1
            found = self._in_order(drawn)
            if found not in seen:
                seen.add(found)
                yield found

    def _trained(self, tasks: Sequence[str], seed: int, changes: Mapping[str, Any], start: Unit | None = None) -> Unit:
        """A training; from the merge `start`, if there is one."""
        settings = self.settings
        train = {
            "epochs": settings.epochs,
            "batch_size": settings.batch_size,
            "gradient_accumulation": settings.gradient_accumulation,
            "patience": settings.patience,
            "train_rows": settings.train_rows,
            "validation_rows": settings.validation_rows,
            "max_input_length": settings.max_input_length,
            "chat_template": settings.chat_template,
            "dtype": settings.dtype,
            "seed": seed,
            "learning_rate": settings.learning_rate[_rate(changes)],
        }
        if changes.get("method", "sparse") == "sparse" and start is None:
            train |= {"density": settings.density, "score": settings.score}
        elif changes.get("method") == "lora":
            train |= {"lora_rank": settings.lora_rank}
        train |= changes
        TrainSettings(task=tuple(tasks), init_from=None if start is None else "a merge", **train)  # refuses what is wrong
        told = {
            **self._model(),
            "task": list(tasks),
            "data": {task: self.data[task]["train"] for task in tasks},
            "train": _changed(TrainSettings, train),
        }
        named = tasks[0] if len(tasks) == 1 else f"{len(tasks)} tasks"
        how = ", ".join(_told(name, value) for name, value in changes.items() if value is not None)
        after = f", after {start.label}" if start is not None else ""
        return Unit("train", told, () if start is None else (start,), f"{named}: {how or 'sparse'}{after}")

    def _asked(self, subject: Subject, tasks: Sequence[str], paper: float | None) -> Cell:
        return Cell(tuple(tuple(self.score(one, task) for task in tasks) for one in subject), paper=paper)

    def _model(self) -> dict[str, Any]:
        settings = self.settings
        return {"model": settings.model, "base": self.base, "dtype": settings.dtype, "threads": settings.threads}

    def _in_order(self, tasks: Sequence[str]) -> tuple[str, ...]:
        """Tasks as the study orders them, so that one set of experts has one merge."""
        return tuple(sorted(tasks, key=self.settings.held_in.index))


def _rate(changes: Mapping[str, Any]) -> str:
    """Which of the study's learning rates a training takes."""
    method = changes.get("method", "sparse")
    if method == "sparse" and changes.get("block_size", 1) > 1:
        return "block"
    return "sparse" if method == "full-qkv" else method


def _units(trained: Experts | Subject) -> tuple[tuple[Unit, ...], ...]:
    """The units of each seed."""
    return tuple(tuple(own.values()) if isinstance(own, Mapping) else (own,) if own else () for own in trained)


def _changed(kind: type, given: Mapping[str, Any]) -> dict[str, Any]:
    """What of these differs from the kind's defaults, as JSON holds it."""
    defaults = {f.name: None if f.default is MISSING else f.default for f in fields(kind)}
    told = {name: value for name, value in given.items() if value != defaults[name]}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in told.items()}


def _told(name: str, value: Any) -> str:
    if name == "method":
        return str(value)
    if isinstance(value, tuple):
        return f"{name.replace('_', ' ')} {'+'.join(map(str, value))}"
    return f"{name.replace('_', ' ')} {value:g}" if isinstance(value, float) else f"{name.replace('_', ' ')} {value}"


def _without_task(label: str) -> str:
    return label.partition(": ")[2]
