"""What a study is told: one TOML file, whose presets override its settings.

[study]
model = "packaged:smollm2-135m"
held_in = ["sst2", "trec"]
held_out = ["copa"]
…

[preset.small]
train_rows = 128
"""

from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, get_args, get_origin, get_type_hints

from sparselet.errors import ConfigError, SparseletError
from sparselet.io.toml_settings import read_toml
from sparselet.masks import check_density
from sparselet.merging.methods import complete_parameters
from sparselet.models import MODEL_DTYPES
from sparselet.scores import get_score
from sparselet.setting_checks import check_seed, check_settings
from sparselet.tasks.builtin import BUILTIN
from sparselet.tasks.task import BUILTIN_PREFIX, load_task

# What a learning rate is given for. `sparse` is also that of all entries of the targets, `full` also of all weights later on.
RATES = ("sparse", "block", "lora", "full", "multitask")


@dataclass(frozen=True)
class StudySettings:
    """Everything that a study's results depend on beside the tasks' rows and the base model's weights.

    Raises ConfigError, naming the field, and its kin.
    """

    held_in: tuple[str, ...]
    """Tasks that experts are trained on and merged models are asked. Names; where they are is told apart."""
    held_out: tuple[str, ...]
    """Tasks that only merged models are asked."""
    sweep_tasks: tuple[str, ...]
    """The held-in tasks on which learning rates, block sizes and selection are compared."""
    learning_rate: Mapping[str, float]
    """Peak learning rate of each of `RATES`."""
    lora_ranks: tuple[int, ...]
    """Ranks that have as many parameters as the first of the densities, in their order: r · Σ(m + n) ≈ density · Σ m·n."""
    lora_rank: int
    """The rank that is compared beside `density`."""
    targets: Mapping[str, tuple[str, ...]]
    """Which layers to adapt instead, by the name of the arm: what their names end in, [] for query, key and value."""
    name: str = "study"
    """Title."""
    preset: str = ""
    """The preset that was chosen."""
    model: str = "packaged:smollm2-135m"
    """Base model: a hub name, a local directory, or packaged:smollm2-135m."""
    dtype: str = "float32"
    """Dtype of the base model."""
    tasks_directory: str = ""
    """The directory of the tasks' directories, where the command line gives none."""
    tables: tuple[str, ...] = ()
    """Tables to make; all by default."""
    threads: int = 1
    """Threads of a training or an evaluation; sums differ in their last bits with it."""
    seeds: tuple[int, ...] = (0,)
    """Everything is trained once with each."""
    budget_hours: float | None = None
    """The plan warns if it is estimated to take longer."""

    train_rows: int | None = None
    """Training rows of each task; all by default."""
    validation_rows: int | None = None
    """Validation rows of each task; all by default."""
    test_rows: int | None = None
    """Test rows of each task; all by default."""
    epochs: float = 5.0
    """Passes over the training rows."""
    batch_size: int = 16
    """Rows an optimizer step."""
    gradient_accumulation: int = 1
    """Micro-batches an optimizer step."""
    patience: int = 0
    """Stop after this many epochs without a better validation loss; 0 never."""
    chat_template: bool = True
    """Ask through the tokenizer's chat template, where it has one."""
    max_input_length: int = 2048
    """Tokens of a prompt; longer ones are cut from the left."""
    max_new_tokens: int = 64
    """Longest answer, in tokens."""

    density: float = 0.1
    """That of all sparse experts but those of the sweep."""
    block_size: int = 16
    """Of block-sparse experts."""
    score: str = "mcs"
    """By which entries are chosen."""
    densities: tuple[float, ...] = (0.01, 0.1, 0.5, 1.0)
    """Of the sweep; 1 trains every entry of the targets."""
    scores: tuple[str, ...] = ("mcs", "mcs_neg", "cs", "gm", "wm", "gd", "random")
    """Scores to compare."""
    layer_drop_densities: tuple[float, ...] = (0.1,)
    """Densities at which layers are dropped, which set the threshold as well."""
    full_merges: Mapping[str, Mapping[str, Any]] = field(default_factory=lambda: {"uniform": {}})
    """Methods that fully fine-tuned models are merged by, with their parameters."""
    learning_rates: tuple[float, ...] = (1e-3, 1e-4, 1e-6)
    """Learning rates to compare."""
    block_sizes: tuple[int, ...] = (8, 16, 32)
    """Block sizes to compare; each divides both sides of every target."""
    n_experts: tuple[int, ...] = (2, 5, 10, 20)
    """How many experts are merged."""
    draws: int = 10
    """Random sets of experts for each number."""
    first_stage_epochs: float | None = None
    """Epochs of the experts that a second stage starts from; as all others by default."""
    second_stage_epochs: tuple[float, ...] = (1.0, 5.0)
    """Epochs of multitask training after merging."""
    second_stage_rows: int | None = None
    """Training rows of each task in it; as in the first by default."""

    def __post_init__(self) -> None:
        check_settings(self)
        for seed in self.seeds:
            check_seed(seed)
        self._check_tasks()
        for name in (*("threads", "batch_size", "max_new_tokens", "block_size", "draws", "lora_rank", "epochs"), *_ROWS):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ConfigError(f"{name} must be above 0, got {value}.")
        for name in ("seeds", "densities", "scores", "learning_rates", "block_sizes", "n_experts", "second_stage_epochs"):
            values = getattr(self, name)
            if not values or len(set(values)) < len(values):
                raise ConfigError(f"{name} must have at least one value, and none twice; got {list(values)}.")
        for density in (self.density, *self.densities, *self.layer_drop_densities):
            check_density(density)
        for score in (self.score, *self.scores):
            get_score(score)
        if len(self.lora_ranks) > len(self.densities):
            raise ConfigError(f"lora_ranks has {len(self.lora_ranks)} ranks for {len(self.densities)} densities; one each.")
        if self.dtype not in MODEL_DTYPES:
            raise ConfigError(f"dtype must be one of {', '.join(MODEL_DTYPES)}, got {self.dtype!r}.")
        if set(self.learning_rate) != set(RATES):
            raise ConfigError(f"learning_rate must have {', '.join(RATES)}, got {', '.join(self.learning_rate) or 'none'}.")
        if not all(2 <= n <= len(self.held_in) for n in self.n_experts):
            raise ConfigError(f"n_experts must lie between 2 and the {len(self.held_in)} held_in tasks, got {self.n_experts}.")
        merges = {method: complete_parameters(method, given) for method, given in self.full_merges.items()}
        object.__setattr__(self, "full_merges", merges)

    def _check_tasks(self) -> None:
        if len(self.held_in) < 2:
            raise ConfigError(f"held_in needs at least two tasks to merge experts of, got {len(self.held_in)}.")
        every = [*self.held_in, *self.held_out]
        for name in every:
            if every.count(name) > 1:
                raise ConfigError(f"task {name} is there twice in held_in and held_out; name it once.")
        for name in self.sweep_tasks:
            if name not in self.held_in:
                raise ConfigError(
                    f"sweep_tasks names {name}, which is no held_in task; take some of {', '.join(self.held_in)}."
                )


_ROWS = ("train_rows", "validation_rows", "test_rows", "second_stage_rows")


def read_study(file: str | Path, preset: str = "") -> StudySettings:
    """The settings of a study: its table `study`, overridden key by key by that of the preset.

    Raises ConfigError for what is no study, an unknown preset or key, and a wrong value, naming the file; and what
    `StudySettings` raises.
    """
    file = Path(file)
    content = read_toml(file)
    try:
        return _settings(content, preset)
    except SparseletError as error:
        raise type(error)(f"{file}: {error}") from error


def task_places(settings: StudySettings, directory: str | Path | None = None) -> dict[str, str]:
    """Where each task is: `directory`/NAME; built in, for a built-in task that is not there. Raises ConfigError."""
    root = directory or settings.tasks_directory or None
    places = {}
    for name in (*settings.held_in, *settings.held_out):
        own = Path(root) / name if root else None
        if own is not None and own.is_dir():
            places[name] = str(own.resolve())
        elif name in BUILTIN:
            places[name] = BUILTIN_PREFIX + name
        else:
            raise ConfigError(
                f"task {name} is not a directory in {root or 'any place'}; set `tasks` to the directory that holds it."
            )
    return places


def describe_tasks(settings: StudySettings, places: Mapping[str, Any]) -> dict[str, dict[str, str]]:
    """The fingerprints of each task's rows: `train` (training and validation rows; held-in tasks only) and `test`.

    places: has `tasks`, the directory or built-in name of each. Raises TaskError, naming file and line.
    """
    found: dict[str, dict[str, str]] = {}
    for name in (*settings.held_in, *settings.held_out):
        place = places["tasks"][name]
        found[name] = {"test": load_task(place, ("test",)).fingerprint()}
        if name in settings.held_in:
            found[name]["train"] = load_task(place, ("train", "validation")).fingerprint()
    return found


def _settings(content: Mapping[str, Any], preset: str) -> StudySettings:
    presets = content.get("preset", {})
    unknown = sorted(set(content) - {"study", "preset"})
    if unknown:
        raise ConfigError(f"unknown table {unknown[0]!r}; a study has [study] and [preset.NAME].")
    if not isinstance(content.get("study", {}), Mapping) or not isinstance(presets, Mapping):
        raise ConfigError("study and preset must be tables: [study], [preset.NAME].")
    if preset and preset not in presets:
        raise ConfigError(f"there is no preset {preset!r}; there are {', '.join(presets) or 'none'}.")
    chosen = presets[preset] if preset else {}
    if not isinstance(chosen, Mapping):
        raise ConfigError(f"preset.{preset} must be a table, got {chosen!r}.")
    given = {**content.get("study", {}), **chosen}
    hints = get_type_hints(StudySettings)
    for key in given:
        if key not in hints or key == "preset":
            raise ConfigError(f"unknown key {key!r}; a study has {', '.join(name for name in hints if name != 'preset')}.")
    for own in fields(StudySettings):
        if own.default is MISSING and own.default_factory is MISSING and own.name not in given:
            raise ConfigError(f"{own.name} is missing.")
    return StudySettings(**{key: _fit(value, hints[key], key) for key, value in given.items()}, preset=preset)


_KINDS = {str: "text", bool: "true or false", int: "a whole number", float: "a number"}


def _fit(value: Any, hint: Any, where: str) -> Any:
    """A TOML value as a field's type: lists as tuples, whole numbers as floats where one is wanted. Raises ConfigError."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is UnionType:
        return _fit(value, next(kind for kind in arguments if kind is not NoneType), where)
    if origin is tuple:
        if not isinstance(value, list):
            raise ConfigError(f"{where} must be a list, got {value!r}.")
        return tuple(_fit(one, arguments[0], f"{where}[{i}]") for i, one in enumerate(value))
    if origin is not None:
        if not isinstance(value, Mapping):
            raise ConfigError(f"{where} must be a table, got {value!r}.")
        return {key: _fit(one, arguments[1], f"{where}.{key}") for key, one in value.items()}
    if hint is Any:
        return value
    if hint is float and type(value) is int:
        return float(value)
    if type(value) is not hint:
        raise ConfigError(f"{where} must be {_KINDS[hint]}, got {value!r}.")
    return value
