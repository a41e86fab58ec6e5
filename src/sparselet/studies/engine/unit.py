"""Units of a study's work: what is trained, merged or evaluated, each with a key of all that determines its result."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, dataclass, field, fields
from functools import cached_property
from typing import Any, ClassVar, Literal, TypeVar

from sparselet.errors import ConfigError
from sparselet.evaluation import EvalSettings
from sparselet.tasks.task import SPLITS
from sparselet.training.settings import TrainSettings

# Raised when the same settings give another result: units of earlier versions are then done again.
ALGORITHM = 1

Kind = Literal["train", "merge", "evaluate", "analyse"]
KINDS: tuple[Kind, ...] = ("train", "merge", "evaluate", "analyse")
Settings = TypeVar("Settings", TrainSettings, EvalSettings)

# Values that a unit's settings do not name: of defaults that have changed since, the first, so that keys stay what they were.
FIRST_DEFAULTS: dict[str, Any] = {"learning_rate": 1e-4}
FIRST_SELECTION: dict[str, Any] = {"when": "paper", "score": "mcs"}  # of trainings that select masks
# Fields of TrainSettings that depend on the machine. A unit has the names of its tasks and its initial merge instead.
MACHINE_SETTINGS = ("model", "task", "init_from")


@dataclass(frozen=True)
class ModelSettings:
    """The base model of a unit: name, fingerprint of its files, dtype, and the number of threads that compute with it."""

    model: str
    base: str
    dtype: str = "float32"
    threads: int = 1


@dataclass(frozen=True, eq=False)
class TrainUnit:
    """A training.

    data: fingerprint of the training and validation rows of each task. settings: `task` has the names of the tasks, and
    `init_from` the key of `initial`; `model` is not used. initial: the merge that a second stage starts from. label: text for
    people, no part of the key.
    """

    kind: ClassVar[Kind] = "train"
    model: ModelSettings
    data: Mapping[str, str]
    settings: TrainSettings
    initial: "MergeUnit | None" = None
    label: str = ""

    @property
    def inputs(self) -> "tuple[Unit, ...]":
        """The units whose results it reads."""
        return () if self.initial is None else (self.initial,)

    def to_json(self) -> dict[str, Any]:
        """The settings as JSON values: of `TrainSettings` what differs from its first defaults."""
        first = _first_defaults(self.settings.method, self.settings.init_from)
        changed = {name: value for name, value in _changed(self.settings, first).items() if name not in MACHINE_SETTINGS}
        model = {**vars(self.model)}
        return {**model, "task": list(self.settings.tasks), "data": dict(self.data), "train": changed}

    @cached_property
    def key(self) -> str:
        """SHA-256 of the settings and the inputs' keys, 32 hex digits."""
        return _key(self)


@dataclass(frozen=True, eq=False)
class MergeUnit:
    """A merge of experts by a method of METHODS. parameters: all of the method's, defaults included."""

    kind: ClassVar[Kind] = "merge"
    method: str
    parameters: Mapping[str, Any]
    experts: tuple[TrainUnit, ...]
    label: str = ""

    @property
    def inputs(self) -> "tuple[Unit, ...]":
        """The units whose results it reads."""
        return self.experts

    def to_json(self) -> dict[str, Any]:
        """The settings as JSON values."""
        return {"method": self.method, "parameters": dict(self.parameters)}

    @cached_property
    def key(self) -> str:
        """SHA-256 of the settings and the inputs' keys, 32 hex digits."""
        return _key(self)


@dataclass(frozen=True, eq=False)
class EvalUnit:
    """An evaluation of one subject on one task.

    data: fingerprint of the task's test rows. subject: an expert or a merge; None is the base model. mask: of the subject only
    the entries in this expert's masks are kept.
    """

    kind: ClassVar[Kind] = "evaluate"
    model: ModelSettings
    task: str
    data: str
    settings: EvalSettings
    subject: TrainUnit | MergeUnit | None = None
    mask: TrainUnit | None = None
    label: str = ""

    @property
    def inputs(self) -> "tuple[Unit, ...]":
        """The units whose results it reads."""
        return tuple(unit for unit in (self.subject, self.mask) if unit is not None)

    def to_json(self) -> dict[str, Any]:
        """The settings as JSON values: of `EvalSettings` what differs from its defaults."""
        settings = {"task": self.task, "data": self.data, "eval": _changed(self.settings, {}), "mask": self.mask is not None}
        return {**vars(self.model), **settings}

    @cached_property
    def key(self) -> str:
        """SHA-256 of the settings and the inputs' keys, 32 hex digits."""
        return _key(self)


@dataclass(frozen=True, eq=False)
class AnalysisUnit:
    """A function of ANALYSES on experts or on the base model.

    settings: its arguments, JSON values. subject: what its numbers are of, such as a task or a pair of experts: a table's cell
    has one number for each subject. data: fingerprints of the rows of the tasks that it reads, of these splits.
    """

    kind: ClassVar[Kind] = "analyse"
    model: ModelSettings
    analysis: str
    settings: Mapping[str, Any]
    subject: str
    data: Mapping[str, str] = field(default_factory=dict)
    experts: tuple[TrainUnit, ...] = ()
    label: str = ""
    splits: tuple[str, ...] = SPLITS

    @property
    def inputs(self) -> "tuple[Unit, ...]":
        """The units whose results it reads."""
        return self.experts

    def to_json(self) -> dict[str, Any]:
        """The settings as JSON values: the splits where they are not all."""
        own = {"analysis": self.analysis, "arguments": dict(self.settings), "subject": self.subject, "data": dict(self.data)}
        own |= {} if self.splits == SPLITS else {"splits": list(self.splits)}
        return {**vars(self.model), **own}

    @cached_property
    def key(self) -> str:
        """SHA-256 of the settings and the inputs' keys, 32 hex digits."""
        return _key(self)


Unit = TrainUnit | MergeUnit | EvalUnit | AnalysisUnit


def closure(units: Iterable[Unit]) -> dict[str, Unit]:
    """The units and all their inputs, by key, each after its inputs."""
    result: dict[str, Unit] = {}
    for unit in units:
        if unit.key not in result:
            result |= closure(unit.inputs) | {unit.key: unit}
    return result


def units_to_json(units: Iterable[Unit]) -> list[dict[str, Any]]:
    """The units and all their inputs as JSON values, each after its inputs, which it names by key."""
    return [
        {"kind": u.kind, "settings": u.to_json(), "inputs": [i.key for i in u.inputs], "label": u.label}
        for u in closure(units).values()
    ]


def units_from_json(content: Iterable[Mapping[str, Any]]) -> dict[str, Unit]:
    """The units of `units_to_json`, by key. Raises ConfigError for an unknown setting."""
    units: dict[str, Any] = {}
    for entry in content:
        settings, label = entry["settings"], entry["label"]
        inputs: list[Any] = [units[key] for key in entry["inputs"]]
        if entry["kind"] == "merge":
            unit = MergeUnit(settings["method"], settings["parameters"], tuple(inputs), label)
        else:
            model = ModelSettings(settings["model"], settings["base"], settings["dtype"], settings["threads"])
            if entry["kind"] == "train":
                initial = inputs[0] if inputs else None
                names = {"task": settings["task"], "init_from": initial.key if initial else None}
                first = _first_defaults(settings["train"].get("method", TrainSettings.method), names["init_from"])
                train = _from_json(TrainSettings, "train", {**first, **settings["train"], **names})
                unit = TrainUnit(model, settings["data"], train, initial, label)
            elif entry["kind"] == "analyse":
                values = (settings["analysis"], settings["arguments"], settings["subject"], settings["data"])
                unit = AnalysisUnit(model, *values, tuple(inputs), label, tuple(settings.get("splits", SPLITS)))
            else:
                eval_settings = _from_json(EvalSettings, "eval", settings["eval"])
                subject, mask = [*inputs, None, None][:2]
                unit = EvalUnit(model, settings["task"], settings["data"], eval_settings, subject, mask, label)
        units[unit.key] = unit
    return units


def _key(unit: Unit) -> str:
    content = [ALGORITHM, unit.kind, unit.to_json(), [u.key for u in unit.inputs]]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:32]


def _first_defaults(method: str, init_from: str | None) -> dict[str, Any]:
    """The first defaults of a training, of those that have changed since."""
    return FIRST_DEFAULTS | (FIRST_SELECTION if method == "sparse" and init_from is None else {})


def _changed(settings: TrainSettings | EvalSettings, first: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that differ from their defaults, or their first defaults, tuples as lists."""
    defaults = {f.name: None if f.default is MISSING else f.default for f in fields(settings)} | dict(first)
    changed = {name: value for name, value in vars(settings).items() if value != defaults[name]}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in changed.items()}


def _from_json(settings: type[Settings], name: str, values: Mapping[str, Any]) -> Settings:
    """Settings from JSON values, lists as tuples. Raises ConfigError."""
    names = {field.name for field in fields(settings)}
    for key in values:
        if key not in names:
            raise ConfigError(f"{name} has no setting {key!r}; it has {', '.join(sorted(names))}.")
    fitted: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}
    return settings(**fitted)
