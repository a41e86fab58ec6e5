"""Core isolation from end to end: short runs, cores, groups, stages, fusion, and mixed rounds with cores frozen."""

import logging
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, cast

from transformers import TrainerCallback

from sparselet.adapter import CONFIG_FILE, AdapterFile, SparseAdapter
from sparselet.errors import ConfigError, OutputExists
from sparselet.evaluation import EvalSettings, evaluate
from sparselet.io.atomic import atomic_directory
from sparselet.io.json_files import read_object, write_json
from sparselet.io.paths import check_output
from sparselet.io.temporaries import held
from sparselet.masks import check_density
from sparselet.merging import merge_to
from sparselet.models import load_model, load_tokenizer
from sparselet.setting_checks import check_at_least, check_settings
from sparselet.tasks.task import Task, load_task
from sparselet.training import TrainSettings, train
from sparselet.training.methods import TRAIN_METHODS
from sparselet.training.processes import process_count
from sparselet.training.run_directory import work_directory
from sparselet.training.train import LoadedModel
from sparselet.workflows.cores import core, group

logger = logging.getLogger("sparselet")

ISOLATE_FILE = "isolate.json"  # in the output: what the run was started with
METHODS_OF_ISOLATION = ("sparse", "full-qkv")  # whose results are adapters of the base model


@dataclass(frozen=True)
class IsolateSettings:
    """What is isolated, and how often all tasks are trained together. Raises ConfigError, DensityOutOfRange."""

    core_density: float = 0.01
    """Fraction of the targets' entries that is a task's core."""
    core: Literal["largest", "random"] = "largest"
    """Which entries: the largest changes, or as many at random, as a control."""
    threshold: float = 0.1
    """Jaccard index of two cores from which their tasks are one stage."""
    freeze_cores: bool = True
    """Freeze the cores of earlier stages in each stage, and all of them in mixed rounds."""
    stage_epochs: float | None = None
    """Epochs of a stage; by default those of the short runs, `epochs`."""
    rounds: int = 1
    """Rounds on all tasks after the fusion."""
    round_epochs: float = 1.0
    """Epochs of a round."""
    rows: int = 0
    """Validation rows of each task that are answered after every step; 0 measures nothing."""

    def __post_init__(self) -> None:
        check_settings(self)
        check_density(self.core_density)
        check_at_least(self, 0, "rounds", "rows")
        if not 0 < self.threshold <= 1:
            raise ConfigError(f"threshold must be in (0, 1], got {self.threshold}.")
        for name in ("stage_epochs", "round_epochs"):
            if vars(self)[name] is not None and not vars(self)[name] > 0:
                raise ConfigError(f"{name} must be above 0, got {vars(self)[name]}.")


@dataclass(frozen=True)
class IsolateStep:
    """One step. kind: short, stage, fusion or round. tasks: those it trained or joined. frozen: entries of the cores that were
    frozen. loss: the validation loss of its run. scores: by task, Rouge-L of validation rows."""

    name: str
    kind: str
    tasks: tuple[str, ...]
    path: Path
    frozen: int
    loss: float | None
    scores: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Isolation:
    """tasks, and their cores' sizes. stages: tasks by their numbers. pairs: Jaccard index of two tasks' cores, and by chance.
    base: Rouge-L of the base model by task. The last step is the expert."""

    tasks: tuple[str, ...]
    core_entries: tuple[int, ...]
    stages: tuple[tuple[int, ...], ...]
    pairs: Mapping[tuple[int, int], tuple[float, float]]
    base: Mapping[str, float]
    steps: tuple[IsolateStep, ...]

    def forgotten(self, step: IsolateStep) -> float | None:
        """The mean loss of Rouge-L, over tasks of earlier stages, since the stage that trained them. None if there is none."""
        done, losses = self.steps[: self.steps.index(step)], []
        for task, score in step.scores.items():
            own = [each.scores[task] for each in done if each.kind == "stage" and task in each.tasks]
            losses += [before - score for before in own]
        return sum(losses) / len(losses) if losses else None


class Isolator:
    """A run of core isolation in a directory, in which finished steps are kept.

    watch: gives the callbacks of a training run, by its name. base: the base model and tokenizer, if they are loaded.
    """

    def __init__(
        self,
        settings: TrainSettings,
        how: IsolateSettings,
        out: Path,
        watch: Callable[[str], Sequence[TrainerCallback]],
        base: LoadedModel | None,
    ) -> None:
        _check(settings, how)
        self.settings, self.how, self.out, self.watch = settings, how, out, watch
        columns = {"input": settings.input_column, "target": settings.target_column}
        self.tasks = [load_task(source, ("train", "validation"), columns) for source in settings.tasks]
        self.names = _file_names(self.tasks)
        self.base = base

    def run(self) -> Isolation:
        """All steps that are not done. Raises OutputExists, ConfigError for another run in `out`, and what the steps raise."""
        if not (self.out / ISOLATE_FILE).is_file():
            check_output(self.out)
            with atomic_directory(self.out) as directory:
                write_json(directory / ISOLATE_FILE, self._identity())
        with held(self.out) as acquired:
            if not acquired:
                raise OutputExists(f"another process runs in {self.out}. Wait for it, or choose another output.")
            _require_same(self.out, self._identity())
            return self._run()

    def _run(self) -> Isolation:
        how, everything = self.how, tuple(range(len(self.tasks)))
        shorts = [self._train(f"short/{name}", self.settings, (i,)) for i, name in enumerate(self.names)]
        cores = [self._core(name, AdapterFile(short)) for name, short in zip(self.names, shorts, strict=True)]
        stages, pairs = group(cores, how.threshold)
        steps = [self._step("short", short, (i,)) for i, short in enumerate(shorts)]
        last, frozen = None, []
        for number, stage in enumerate(stages, 1):
            last = self._stage(number, stage, [shorts[i] for i in stage], last, frozen)
            steps.append(self._step("stage", last, stage, frozen))
            frozen = [*frozen, *(cores[i] for i in stage if how.freeze_cores)]
        members = [*(shorts[i] for stage in stages for i in stage), cast(Path, last)]
        last = self._fuse("fused" if how.rounds else "expert", members)
        steps.append(self._step("fusion", last, everything))
        for number in range(1, how.rounds + 1):
            name = f"round-{number}" if number < how.rounds else "expert"
            settings = replace(self.settings, epochs=how.round_epochs, profile=self.settings.profile and name == "expert")
            last = self._train(name, _continued(settings, last, frozen), everything)
            steps.append(self._step("round", last, everything, frozen))
        chances = {pair: (overlap.jaccard, overlap.chance) for pair, overlap in pairs.items()}
        names, sizes = tuple(task.name for task in self.tasks), tuple(each.nnz for each in cores)
        return Isolation(names, sizes, tuple(map(tuple, stages)), chances, self._scores("base", None), tuple(steps))

    def _identity(self) -> dict[str, Any]:
        data = {task.name: task.fingerprint() for task in self.tasks}
        identity = {"train": asdict(self.settings), "isolate": asdict(self.how), "data": data}
        identity["train"] = {k: list(v) if isinstance(v, tuple) else v for k, v in identity["train"].items()}
        return identity

    def _loaded(self) -> LoadedModel:
        if self.base is None:
            self.base = load_model(self.settings.model, self.settings.dtype), load_tokenizer(self.settings.model)
        return self.base

    def _train(self, name: str, settings: TrainSettings, tasks: Sequence[int]) -> Path:
        path = self.out / name
        unfinished = work_directory(path).exists()
        if unfinished or not (path / CONFIG_FILE).is_file():
            settings = replace(settings, task=tuple(self.settings.tasks[i] for i in tasks))
            train(settings, path, resume=unfinished, base=self._loaded(), callbacks=self.watch(name))
        return path

    def _core(self, name: str, expert: AdapterFile) -> AdapterFile:
        path = self.out / "cores" / name
        if not (path / CONFIG_FILE).is_file():
            core(expert, self.how.core_density, core=self.how.core, seed=self.settings.seed).save(path)
        return AdapterFile(path)

    def _stage(
        self, number: int, stage: Sequence[int], shorts: Sequence[Path], before: Path | None, frozen: Sequence[AdapterFile]
    ) -> Path:
        """Train the tasks of a stage from the stage before it; the first stage of one task is its short run."""
        epochs = self.how.stage_epochs or self.settings.epochs
        if before is None and len(stage) == 1 and epochs == self.settings.epochs:
            return shorts[0]
        start = before
        if self.settings.method == "sparse":
            start = self.out / "starts" / str(number)
            if not (start / CONFIG_FILE).is_file():
                _joined_masks(before, shorts).save(start)
        settings = replace(self.settings, epochs=epochs, profile=False)
        return self._train(f"stage-{number}", _continued(settings, start, frozen), stage)

    def _fuse(self, name: str, experts: Sequence[Path]) -> Path:
        path = self.out / name
        if not (path / CONFIG_FILE).is_file():
            parameters = {"density": self.how.core_density, "core": self.how.core, "seed": self.settings.seed}
            merge_to(path, experts, "cpi", parameters=parameters)
        return path

    def _step(self, kind: str, path: Path, tasks: Sequence[int], frozen: Sequence[AdapterFile] = ()) -> IsolateStep:
        name, metrics = str(path.relative_to(self.out)), AdapterFile(path).metadata.metrics
        loss = metrics["validation_loss"] if metrics and kind != "fusion" else None
        scores = {} if kind == "short" else self._scores(name, path)
        names, size = tuple(self.tasks[i].name for i in tasks), sum(each.nnz for each in frozen)
        return IsolateStep(name, kind, names, path, size, loss, scores)

    def _scores(self, name: str, path: Path | None) -> dict[str, float]:
        """Rouge-L of validation rows by task, kept in a file."""
        file = self.out / "scores" / f"{name.replace('/', '-')}.json"
        if not self.how.rows:
            return {}
        if not file.is_file():
            settings = EvalSettings(
                self.how.rows, self.settings.chat_template, self.settings.max_input_length, split="validation"
            )
            logger.info("measuring %s on %d validation rows of each task.", name, self.how.rows)
            results = evaluate(*self._loaded(), self.tasks, None if path is None else SparseAdapter.load(path), settings)
            file.parent.mkdir(exist_ok=True)
            write_json(file, {result.task: result.scores["rougeL"] for result in results})
        return read_object(file)


def _check(settings: TrainSettings, how: IsolateSettings) -> None:
    if settings.method not in METHODS_OF_ISOLATION:
        raise ConfigError(
            f"method must be {' or '.join(METHODS_OF_ISOLATION)}, whose results are changes of one base; got {settings.method}."
        )
    if settings.method == "sparse" and settings.entries is None and how.freeze_cores and how.core_density >= settings.density:
        raise ConfigError(
            f"core_density must be below density, {settings.density:g}, or the cores are all that is trained; got "
            f"{how.core_density:g}."
        )
    if len(settings.tasks) < 2:
        raise ConfigError(f"task must name at least two tasks to isolate from one another, got {len(settings.tasks)}.")
    for name in ("init_from", "freeze"):
        if vars(settings)[name]:
            raise ConfigError(f"{name} is chosen by the run itself; leave it out.")
    if process_count() > 1:
        raise ConfigError("core isolation runs in one process; start it without torchrun.")


def _require_same(out: Path, identity: Mapping[str, Any]) -> None:
    """Raise ConfigError unless the run in `out` was started with this."""
    previous = read_object(out / ISOLATE_FILE)
    for part, values in identity.items():
        before = previous.get(part) or {}
        for name in values:
            if before.get(name) != values[name]:
                what = f"other rows in {name}" if part == "data" else f"{name} = {before.get(name)!r}, not {values[name]!r}"
                raise ConfigError(f"the run in {out} was started with {what}. Choose another output, or the same settings.")


def _continued(settings: TrainSettings, start: Path | None, frozen: Sequence[AdapterFile]) -> TrainSettings:
    """Settings of a run from an adapter, whose masks stand where the method trains entries."""
    method = TRAIN_METHODS[settings.method]
    chosen: dict[str, Any] = {"freeze": tuple(str(each.path) for each in frozen)}
    if start is not None:
        chosen["init_from"] = str(start)
        if method.initial == "entries":
            chosen |= {name: TrainSettings.__dataclass_fields__[name].default for name in method.settings if name != "freeze"}
    return replace(settings, **chosen)


def _joined_masks(before: Path | None, experts: Sequence[Path]) -> SparseAdapter:
    """The change so far, on the masks of these experts too, where it is 0."""
    files = [AdapterFile(path) for path in experts]
    first = files[0] if before is None else AdapterFile(before)
    deltas = {} if before is None else {name: first[name] for name in first}
    for file in files:
        for name in file:
            added = file[name].scale(0.0)
            deltas[name] = deltas[name] + added if name in deltas else added
    fingerprints = {name: fp for file in [first, *files] for name, fp in file.fingerprints.items()}
    return SparseAdapter(deltas, first.metadata, fingerprints)


def _file_names(tasks: Sequence[Task]) -> list[str]:
    """A name for each task's files. Raises ConfigError for two tasks of one name."""
    names = [re.sub(r"[^\w.-]", "-", task.name) for task in tasks]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f"task: {name} is the name of {names.count(name)} tasks. Give each once, by its own name.")
    return names
