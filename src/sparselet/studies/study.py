"""Study: makes the experts, merges and evaluations that tables consist of, as units. Nothing is trained here.

A table's row reads as in the paper:

    experts = study.experts(score="gm")
    merged = study.merge(experts, "overlap")
    row = study.individual(experts), study.held_in(merged), study.held_out(merged)

Two tables that need the same expert share its unit, which is trained once.
"""

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sparselet.evaluation import EvalSettings
from sparselet.merging.methods import complete_parameters
from sparselet.studies.engine.unit import AnalysisUnit, EvalUnit, MergeUnit, ModelSettings, TrainUnit
from sparselet.studies.settings import StudySettings
from sparselet.studies.table import Cell
from sparselet.tasks.task import SPLITS
from sparselet.training.settings import TrainSettings
from sparselet.training_recipes import RECIPES

# For each seed the expert of each task.
Experts = tuple[Mapping[str, TrainUnit], ...]
# For each seed one model for all tasks: a merge or a training. None is the base model.
Subject = tuple[TrainUnit | MergeUnit | None, ...]

BASE: Subject = (None,)


@dataclass(frozen=True)
class Study:
    """Makes the units of a study.

    data: for each task the fingerprints of its rows, as `fingerprint_tasks` gives them. base: the base model's fingerprint.
    """

    settings: StudySettings
    data: Mapping[str, Mapping[str, str]]
    base: str

    # Trainings and merges

    def experts(self, tasks: Sequence[str] = (), **changes: Any) -> Experts:
        """One expert for each of the tasks, by default all held-in tasks; sparse, with the study's settings.

        changes: fields of `TrainSettings` that differ. Raises TypeError for an unknown field, ConfigError and its subclasses
        for a value out of range.
        """
        names = self._in_order(tasks or self.settings.held_in)
        return tuple({task: self._train_unit((task,), seed, changes) for task in names} for seed in self.settings.seeds)

    def arm(self, name: str, tasks: Sequence[str] = (), learning_rate: float | None = None) -> Experts:
        """The experts of one of the settings' arms, by default at its own learning rate."""
        changes = {key: value for key, value in self.settings.arms[name].items() if key != "learning_rates"}
        return self.experts(tasks, **{**changes, "learning_rate": learning_rate or changes["learning_rate"]})

    def dense(self) -> Experts:
        """Experts that train every entry of the targets: density 1."""
        return self.experts(method="full-qkv", learning_rate=self.settings.learning_rate["sparse"])

    def multitask(self) -> Subject:
        """One model, all weights trained on all held-in tasks."""
        return tuple(self._train_unit(self.settings.held_in, seed, {"method": "multitask"}) for seed in self.settings.seeds)

    def second_stage(self, merged: Sequence[MergeUnit], epochs: float, all_weights: bool) -> Subject:
        """Further training of a merge on all held-in tasks: only the merged entries, or all weights."""
        rows = self.settings.second_stage_rows or self.settings.train_rows
        changes = {"method": "multitask" if all_weights else "sparse", "epochs": epochs, "train_rows": rows}
        merge_of_seed = zip(self.settings.seeds, merged, strict=True)
        return tuple(self._train_unit(self.settings.held_in, seed, changes, initial) for seed, initial in merge_of_seed)

    def merge(
        self, experts: Experts, method: str, parameters: Mapping[str, Any] | None = None, tasks: Sequence[str] = ()
    ) -> tuple[MergeUnit, ...]:
        """The merge of the experts of the tasks, by default of all. Raises UnknownMethod, ArgumentError."""
        parameters = complete_parameters(method, parameters or {})
        merges = []
        for by_task in experts:
            inputs = tuple(by_task[task] for task in self._in_order(tasks or tuple(by_task)))
            label = f"{method} of {len(inputs)}: {inputs[0].label.partition(': ')[2]}"
            merges.append(MergeUnit(method, parameters, inputs, label))
        return tuple(merges)

    # Evaluations and sizes: the cells of a table

    def individual(self, experts: Experts, paper: float | None = None) -> Cell:
        """Each expert on the test rows of its own task."""
        return Cell(tuple(tuple(self.score(unit, task) for task, unit in by_task.items()) for by_task in experts), paper=paper)

    def held_in(self, subject: Subject, paper: float | None = None, tasks: Sequence[str] = ()) -> Cell:
        """A model on these tasks, by default on the held-in tasks."""
        return self._evaluate(subject, tasks or self.settings.held_in, paper)

    def held_out(self, subject: Subject, paper: float | None = None) -> Cell:
        """A model on the held-out tasks."""
        return self._evaluate(subject, self.settings.held_out, paper)

    def own_masks(self, merged: Subject, experts: Experts, paper: float | None = None) -> Cell:
        """The merge on each expert's task, restricted to the entries in that expert's masks: m_i ∘ ΔW_m."""
        pairs = zip(merged, experts, strict=True)
        draws = (tuple(self.score(unit, task, by_task[task]) for task in by_task) for unit, by_task in pairs)
        return Cell(tuple(draws), paper=paper)

    def parameters(self, trained: Experts | Subject, paper: float | None = None) -> Cell:
        """The trained numbers of one expert, in percent of those of full fine-tuning."""
        full = Cell(_units(self.experts(method="full")), "parameters")
        return Cell(_units(trained), "parameters", paper, percent_of=full)

    def trained_numbers(self, trained: Experts | Subject) -> Cell:
        """How many numbers are trained for one expert."""
        return Cell(_units(trained), "parameters")

    def active_layers(self, experts: Experts, paper: float | None = None) -> Cell:
        """The number of layers in which an expert has entries."""
        return Cell(_units(experts), "active_layers", paper)

    def score(self, subject: TrainUnit | MergeUnit | None, task: str, mask: TrainUnit | None = None) -> EvalUnit:
        """A model on one task's test rows. mask: of the model's delta only the entries in this expert's masks are kept."""
        settings = self.settings
        eval_settings = EvalSettings(
            rows=settings.test_rows,
            chat_template=None if settings.chat_template else False,
            max_input_length=settings.max_input_length,
            max_new_tokens=settings.max_new_tokens,
        )
        label = f"{subject.label if subject else 'base'}{', own mask only' if mask else ''}, asked {task}"
        return EvalUnit(self._model(), task, self.data[task]["test"], eval_settings, subject, mask, label)

    def analyse(
        self,
        analysis: str,
        subject: str,
        experts: Sequence[TrainUnit] = (),
        tasks: Sequence[str] = (),
        splits: tuple[str, ...] = SPLITS,
        **settings: Any,
    ) -> AnalysisUnit:
        """One of ANALYSES on experts or the base model.

        subject: what its numbers are of. tasks: whose rows it reads. splits: all, or `test`; of held-out tasks only `test`.
        """
        data = {task: self.data[task]["all" if splits == SPLITS else "test"] for task in tasks}
        label = f"{analysis}: {subject}"
        return AnalysisUnit(self._model(), analysis, settings, subject, data, tuple(experts), label, splits)

    # Random sets of tasks

    def draws(self, n: int) -> Iterator[tuple[str, ...]]:
        """Random sets of n held-in tasks, all different: `settings.draws` of them, or all that exist."""
        count = min(self.settings.draws, math.comb(len(self.settings.held_in), n))
        seen: set[tuple[str, ...]] = set()
        turn = 0
        while len(seen) < count:
            drawn = sorted(self.settings.held_in, key=lambda task: hashlib.sha256(f"{n} {turn} {task}".encode()).digest())[:n]
            turn += 1
            tasks = self._in_order(drawn)
            if tasks not in seen:
                seen.add(tasks)
                yield tasks

    def _train_unit(
        self, tasks: Sequence[str], seed: int, changes: Mapping[str, Any], initial: MergeUnit | None = None
    ) -> TrainUnit:
        """A training. initial: the merge that it starts from."""
        settings = self.settings
        train: dict[str, Any] = {
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
            "learning_rate": settings.learning_rate[_learning_rate_name(changes)],
        }
        if changes.get("method", "sparse") == "sparse" and initial is None:
            density = {} if "entries" in changes else {"density": settings.density}
            train |= {**RECIPES["paper"], "score": settings.score, **density, "learning_rate": train["learning_rate"]}
        elif changes.get("method") in ("lora", "shira"):
            train |= {"lora_rank": settings.lora_rank}
        train |= changes
        data = {task: self.data[task]["train"] for task in tasks}
        name = tasks[0] if len(tasks) == 1 else f"{len(tasks)} tasks"
        arm = ", ".join(_describe_change(key, value) for key, value in changes.items() if value is not None)
        label = f"{name}: {arm or 'sparse'}{f', after {initial.label}' if initial else ''}"
        train_settings = TrainSettings(task=tuple(tasks), init_from=initial.key if initial else None, **train)
        return TrainUnit(self._model(), data, train_settings, initial, label)

    def _evaluate(self, subject: Subject, tasks: Sequence[str], paper: float | None) -> Cell:
        return Cell(tuple(tuple(self.score(unit, task) for task in tasks) for unit in subject), paper=paper)

    def _model(self) -> ModelSettings:
        return ModelSettings(self.settings.model, self.base, self.settings.dtype, self.settings.threads)

    def _in_order(self, tasks: Sequence[str]) -> tuple[str, ...]:
        """Tasks in the order of the settings, so that one set of experts has one merge."""
        return tuple(sorted(tasks, key=self.settings.held_in.index))


def _learning_rate_name(changes: Mapping[str, Any]) -> str:
    """Which of the study's learning rates a training uses."""
    method = changes.get("method", "sparse")
    if method == "sparse" and changes.get("block_size", 1) != 1:
        return "block"
    return {"full-qkv": "sparse", "super-tuning": "sparse", "shira": "sparse"}.get(method, method)


def _units(trained: Experts | Subject) -> tuple[tuple[Any, ...], ...]:
    """The units of each seed."""
    return tuple(tuple(item.values()) if isinstance(item, Mapping) else (item,) if item else () for item in trained)


def _describe_change(name: str, value: Any) -> str:
    if name == "method":
        return str(value)
    if isinstance(value, tuple):
        return f"{name.replace('_', ' ')} {'+'.join(map(str, value))}"
    return f"{name.replace('_', ' ')} {value:g}" if isinstance(value, float) else f"{name.replace('_', ' ')} {value}"
