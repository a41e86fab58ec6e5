"""The settings of a study: one TOML file, whose presets override its settings.

[study]
model = "packaged:smollm2-135m"
held_in = ["sst2", "trec"]
held_out = ["copa"]
…

[preset.small]
train_rows = 128
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sparselet.errors import ConfigError, SparseletError, prefix_errors
from sparselet.io.toml_settings import parse_table, read_toml
from sparselet.masks import check_density
from sparselet.merging.methods import complete_parameters
from sparselet.models import MODEL_DTYPES
from sparselet.scores import get_score
from sparselet.setting_checks import check_seed, check_settings
from sparselet.tasks.builtin import BUILTIN
from sparselet.tasks.task import BUILTIN_PREFIX, SPLITS, load_task
from sparselet.training.settings import TrainSettings

# Keys of `learning_rate`. `sparse` is also used to train all entries of the targets, `multitask` for all weights on all tasks.
RATES = ("sparse", "block", "lora", "full", "multitask")
MERGE_KEYS = ("method", "arms", "numbers")  # of a merge in `merges`, beside the method's parameters


@dataclass(frozen=True)
class StudySettings:
    """Everything that a study's results depend on beside the tasks' rows and the base model's weights.

    Raises ConfigError, naming the field, and its subclasses.
    """

    held_in: tuple[str, ...]
    """Names of the tasks that experts are trained on and merged models are evaluated on."""
    held_out: tuple[str, ...]
    """Names of the tasks that merged models are evaluated on and no expert is trained on."""
    sweep_tasks: tuple[str, ...]
    """The held-in tasks on which learning rates, block sizes and selection are compared."""
    learning_rate: Mapping[str, float]
    """Peak learning rate of each of `RATES`."""
    lora_ranks: tuple[int, ...]
    """A LoRA rank for each of the first densities, with as many parameters: r · Σ(m + n) ≈ density · Σ m·n."""
    lora_rank: int
    """The LoRA rank that is compared with `density`."""
    targets: Mapping[str, tuple[str, ...]]
    """Layers to adapt instead, for each row of the table of targets: the ends of their names; [] is query, key and value."""
    name: str = "study"
    """Title."""
    preset: str = ""
    """The name of the preset."""
    model: str = "packaged:smollm2-135m"
    """Base model: a hub name, a local directory, or packaged:smollm2-135m."""
    dtype: str = "float32"
    """Dtype of the base model."""
    tasks_directory: str = ""
    """The directory of the tasks' directories; the argument `tasks` overrides it."""
    tables: tuple[str, ...] = ()
    """Tables to make; all by default."""
    claims: str = "paper"
    """Claims to judge: a name of `CLAIMS` in studies/tables.py."""
    threads: int = 1
    """Threads of a training or an evaluation; the last bits of sums depend on it."""
    seeds: tuple[int, ...] = (0,)
    """Each training is run once with each seed."""
    budget_hours: float | None = None
    """The plan warns if the estimated time is longer."""

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
    """Format prompts with the tokenizer's chat template, if it has one."""
    max_input_length: int = 2048
    """Tokens of a prompt; longer prompts are cut from the left."""
    max_new_tokens: int = 64
    """Longest answer, in tokens."""

    density: float = 0.1
    """Density of all sparse experts but those of the table of densities."""
    block_size: int = 16
    """Block size of block-sparse experts."""
    score: str = "mcs"
    """Score that entries are chosen by."""
    densities: tuple[float, ...] = (0.01, 0.1, 0.5, 1.0)
    """Densities to compare; 1 trains every entry of the targets."""
    scores: tuple[str, ...] = ("mcs", "mcs_neg", "cs", "gm", "wm", "gd", "random")
    """Scores to compare."""
    layer_drop_densities: tuple[float, ...] = (0.1,)
    """Densities of the table of layer drop; they also set its threshold."""
    full_merges: Mapping[str, Mapping[str, Any]] = field(default_factory=lambda: {"uniform": {}})
    """Methods that fully fine-tuned models are merged by, with their parameters."""
    learning_rates: tuple[float, ...] = (1e-3, 1e-4, 1e-6)
    """Learning rates to compare."""
    block_sizes: tuple[int, ...] = (8, 16, 32)
    """Block sizes to compare; each divides both sides of every target."""
    n_experts: tuple[int, ...] = (2, 5, 10, 20)
    """Numbers of experts to merge."""
    draws: int = 10
    """Random sets of experts for each number."""
    arms: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """For tables of recipes: settings of training by the name of an arm; `learning_rates` has those to compare."""
    finalists: tuple[str, ...] = ()
    """Names of the arms that are trained on all held-in tasks."""
    merges: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """For the table of many experts: by a row's name `method`, its parameters, and the `arms` and `numbers` that it is for."""
    groups: tuple[int, ...] = ()
    """For the table of many experts: into how many merges experts are grouped."""
    first_stage_epochs: float | None = None
    """Epochs of the experts that a second stage starts from; by default `epochs`."""
    second_stage_epochs: tuple[float, ...] = (1.0, 5.0)
    """Epochs of multitask training after merging."""
    second_stage_rows: int | None = None
    """Training rows of each task in the second stage; by default `train_rows`."""

    def __post_init__(self) -> None:
        check_settings(self)
        for seed in self.seeds:
            check_seed(seed)
        self._check_tasks()
        self._check_arms()
        self._check_merges()
        values = vars(self)
        for name in (*("threads", "batch_size", "max_new_tokens", "block_size", "draws", "lora_rank", "epochs"), *_ROWS):
            value = values[name]
            if value is not None and not value > 0:
                raise ConfigError(f"{name} must be above 0, got {value}.")
        for name in ("seeds", "densities", "scores", "learning_rates", "block_sizes", "n_experts", "second_stage_epochs"):
            if not values[name] or len(set(values[name])) < len(values[name]):
                raise ConfigError(f"{name} must have at least one value, and none twice; got {list(values[name])}.")
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
        merges = {method: complete_parameters(method, parameters) for method, parameters in self.full_merges.items()}
        object.__setattr__(self, "full_merges", merges)

    def _check_arms(self) -> None:
        arms = {}
        for name, arm in self.arms.items():
            with prefix_errors(f"arms.{name}"):
                if not {"learning_rate"} <= arm.keys() <= {*TrainSettings.__dataclass_fields__, "learning_rates"}:
                    raise ConfigError("an arm has learning_rate, learning_rates and settings of train; got " + ", ".join(arm))
                arms[name] = {key: tuple(value) if isinstance(value, list) else value for key, value in arm.items()}
                for rate in (arm["learning_rate"], *arm.get("learning_rates", ())):
                    changes = {**arms[name], "learning_rate": rate}
                    TrainSettings(**{**{k: v for k, v in changes.items() if k != "learning_rates"}, "task": ("task", "other")})
        object.__setattr__(self, "arms", arms)
        unknown = [name for name in self.finalists if name not in arms]
        if unknown:
            raise ConfigError(f"finalists names {unknown[0]!r}, which is not in arms; there are {', '.join(arms) or 'none'}.")

    def _check_merges(self) -> None:
        for name, merge in self.merges.items():
            with prefix_errors(f"merges.{name}"):
                if "method" not in merge:
                    raise ConfigError("method is missing.")
                complete_parameters(merge["method"], {k: v for k, v in merge.items() if k not in MERGE_KEYS})
                unknown = [arm for arm in merge.get("arms", ()) if arm not in self.arms]
                if unknown:
                    raise ConfigError(f"arms names {unknown[0]!r}, which is not in arms.")
        for count in self.groups:
            if not 1 < count < max(self.n_experts):
                raise ConfigError(
                    f"groups must be above 1 and below the {max(self.n_experts)} experts of n_experts, got {count}."
                )

    def _check_tasks(self) -> None:
        if len(self.held_in) < 2:
            raise ConfigError(f"held_in needs at least two tasks to merge experts of, got {len(self.held_in)}.")
        names = [*self.held_in, *self.held_out]
        for name in names:
            if names.count(name) > 1:
                raise ConfigError(f"task {name} is twice in held_in and held_out; name it once.")
        for name in self.sweep_tasks:
            if name not in self.held_in:
                raise ConfigError(
                    f"sweep_tasks names {name}, which is not a held_in task; use some of {', '.join(self.held_in)}."
                )


_ROWS = ("train_rows", "validation_rows", "test_rows", "second_stage_rows")


def read_study(file: str | Path, preset: str = "") -> StudySettings:
    """The settings of a study: the file's table `study`, overridden key by key by the preset's table.

    Raises ConfigError, naming the file, for an unknown table, preset or key, a missing key and a wrong value; and what
    `StudySettings` raises.
    """
    file = Path(file)
    content = read_toml(file)
    try:
        return _settings(content, preset)
    except SparseletError as error:
        raise type(error)(f"{file}: {error}") from error


def task_sources(settings: StudySettings, directory: str | Path | None = None) -> dict[str, str]:
    """The source of each task: `directory`/NAME if that is a directory, else the built-in task. Raises ConfigError."""
    root = directory or settings.tasks_directory or None
    sources = {}
    for name in (*settings.held_in, *settings.held_out):
        path = Path(root) / name if root else None
        if path is not None and path.is_dir():
            sources[name] = str(path.resolve())
        elif name in BUILTIN:
            sources[name] = BUILTIN_PREFIX + name
        else:
            raise ConfigError(
                f"task {name} is not a directory in {root or 'any place'}; set `tasks` to the directory that holds it."
            )
    return sources


def fingerprint_tasks(settings: StudySettings, sources: Mapping[str, str]) -> dict[str, dict[str, str]]:
    """The fingerprints of each task's rows: `test`, and of held-in tasks `train` (training and validation rows) and `all`.

    sources: of `task_sources`. Raises TaskError, naming file and line.
    """
    fingerprints: dict[str, dict[str, str]] = {}
    for name in (*settings.held_in, *settings.held_out):
        fingerprints[name] = {"test": load_task(sources[name], ("test",)).fingerprint()}
        if name in settings.held_in:
            fingerprints[name]["train"] = load_task(sources[name], ("train", "validation")).fingerprint()
            fingerprints[name]["all"] = load_task(sources[name], SPLITS).fingerprint()
    return fingerprints


def _settings(content: Mapping[str, Any], preset: str) -> StudySettings:
    presets = content.get("preset", {})
    unknown = sorted(set(content) - {"study", "preset"})
    if unknown:
        raise ConfigError(f"unknown table {unknown[0]!r}; a study has [study] and [preset.NAME].")
    if not isinstance(content.get("study", {}), Mapping) or not isinstance(presets, Mapping):
        raise ConfigError("study and preset must be tables: [study], [preset.NAME].")
    if preset and preset not in presets:
        raise ConfigError(f"there is no preset {preset!r}; there are {', '.join(presets) or 'none'}.")
    overrides = presets[preset] if preset else {}
    if not isinstance(overrides, Mapping):
        raise ConfigError(f"preset.{preset} must be a table, got {overrides!r}.")
    table = {**content.get("study", {}), **overrides}
    if "preset" in table:
        raise ConfigError("unknown key 'preset'; presets are tables of their own, [preset.NAME].")
    return parse_table(StudySettings, {**table, "preset": preset})
