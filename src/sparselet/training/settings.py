"""`TrainSettings`: the settings of a training run, each with its default and its explanation."""

from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Literal

from sparselet.errors import ConfigError
from sparselet.selection_settings import SelectionSettings
from sparselet.setting_checks import check_at_least, parse_count
from sparselet.training.methods import TRAIN_METHODS

if TYPE_CHECKING:
    MethodName = str
else:
    MethodName = Literal[tuple(TRAIN_METHODS)]

METHOD_HELP = "; ".join(f"{name}: {method.trains}" for name, method in TRAIN_METHODS.items())


@dataclass(frozen=True)
class TaskSettings:
    """Which model is trained on which rows, and by which method."""

    model: str = "packaged:smollm2-135m"
    """Base model: a hub name, a local directory, or packaged:smollm2-135m."""
    task: tuple[str, ...] | str = ""
    """Task: a directory with train, validation and test (.jsonl, .json, .parquet), builtin:NAME or a hub data set."""
    method: MethodName = field(default="sparse", metadata={"help": f"What is trained: {METHOD_HELP}."})
    init_from: str | None = None
    """For a second stage: an adapter whose entries are trained further, or that full methods add to the base model first."""
    input_column: str = "input"
    """Column of the prompt or the conversation; by default the first of input, prompt and messages that the rows have."""
    target_column: str = "target"
    """Column of the text to produce."""


@dataclass(frozen=True)
class TrainSettings(SelectionSettings, TaskSettings):
    """Settings of `sparselet train`; defaults are the paper's unless a field says otherwise.

    Raises ConfigError for a value out of range or a setting that the method does not have, and what `SelectionSettings` raises.
    """

    freeze: tuple[str, ...] = ()
    """Adapters of the same base model whose entries stay as they are, bit for bit, such as the cores of earlier tasks."""
    target_modules: tuple[str, ...] = ()
    """Names that the layers to adapt end in, or one of qkv (the default), attention, mlp and all (linear layers)."""
    exclude_modules: tuple[str, ...] = ()
    """Names of layers to leave out."""
    layers: tuple[int, ...] = ()
    """Numbers of the layers to adapt; all by default."""
    entries: int | str | None = None
    """Entries to train over all targets, such as 1.5M, instead of `density`."""

    merge_noise: int = 0
    """Train against noise in the place of up to so many other experts' changes (MergOPT), for experts that will be merged."""
    lora_rank: int = 128
    """Rank of the baseline lora."""
    lora_alpha: float | None = None
    """Its alpha, by which ΔW = alpha / rank · BA is scaled; by default the rank."""

    learning_rate: float | Literal["auto"] | None = None
    """Peak learning rate of AdamW; by default one that depends on what is trained. auto tries several in short runs first."""
    epochs: float = 5.0
    """Passes over the training rows."""
    batch_size: int = 16
    """Rows an optimizer step, divided over the processes and the accumulation steps."""
    gradient_accumulation: int = 1
    """Micro-batches an optimizer step."""
    warmup: float = 0.06
    """Fraction of the steps in which the learning rate rises; it then falls linearly to 0."""
    weight_decay: float = 0.0
    """AdamW's decay towards 0: of the change (sparse, lora), or of the weights themselves (full methods)."""
    patience: int = 0
    """Stop after this many epochs without a better validation loss; 0 never stops early. The best epoch is kept."""
    train_rows: int | None = None
    """Use only the first rows of each task's training split."""
    validation_rows: int | None = None
    """Use only the first rows of each task's validation split."""
    max_input_length: int = 2048
    """Tokens of a prompt; longer ones are cut from the left."""
    chat_template: bool = True
    """Use the tokenizer's chat template, where it has one."""

    profile: bool = True
    """Profile the expert on some of its training rows, for merging by regmean and for routing (docs/profiles.md)."""

    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Dtype of the base model; the trained values are float32."""
    gradient_checkpointing: bool = False
    """Save memory by computing activations twice."""
    save_steps: int = 0
    """Save a checkpoint to resume from after this many steps; 0 saves after each epoch only."""
    report_to: tuple[str, ...] = ()
    """Experiment trackers of transformers, such as tensorboard or wandb."""

    def __post_init__(self) -> None:
        super().__post_init__()
        names = (self.task,) if isinstance(self.task, str) else tuple(self.task)
        object.__setattr__(self, "task", names[0] if len(names) == 1 else names)
        if not names or not all(names):
            raise ConfigError("task is missing; give a directory, builtin:NAME or a hub data set.")
        counts = ("batch_size", "gradient_accumulation", "max_input_length", "lora_rank", "train_rows", "validation_rows")
        check_at_least(self, 1, *counts)
        check_at_least(self, 0, "merge_noise", "patience", "save_steps", "weight_decay", "warmup")
        if not self.warmup < 1:
            raise ConfigError(f"warmup is a fraction of the steps, below 1; got {self.warmup}.")
        object.__setattr__(self, "entries", parse_count("entries", self.entries))
        for name in ("learning_rate", "epochs", "lora_alpha", "entries"):
            value = vars(self)[name]
            if value not in (None, "auto") and not value > 0:
                raise ConfigError(f"{name} must be above 0, got {value}.")
        if self.batch_size % self.gradient_accumulation:
            raise ConfigError(
                f"batch_size {self.batch_size} cannot be divided into {self.gradient_accumulation} accumulation steps."
            )
        self._check_method()

    @property
    def tasks(self) -> tuple[str, ...]:
        """The task or tasks."""
        return (self.task,) if isinstance(self.task, str) else self.task

    def _check_method(self) -> None:
        """Raise ConfigError for settings that the method does not take."""
        method = TRAIN_METHODS[self.method]
        changed = {field.name for field in fields(self) if vars(self)[field.name] != field.default}
        for name in sorted(changed - {*method.settings}):
            names = [other for other, record in TRAIN_METHODS.items() if name in record.settings]
            if names:
                raise ConfigError(
                    f"{name} does not apply to method {self.method}; it is a setting of {', '.join(names)}. Leave it out."
                )
        if self.merge_noise and self.when != "static":
            raise ConfigError(f"merge_noise does not go with when={self.when!r}, whose mask is not fixed; take when='static'.")
        if {"entries", "density"} <= changed:
            raise ConfigError("entries stands instead of density; set one of them.")
        if len(self.tasks) < method.min_tasks:
            raise ConfigError(f"method {self.method} needs several tasks; for one task set method full.")
        if self.dtype == "float16" and not method.float16:
            raise ConfigError(
                f"dtype float16 does not go with method {self.method}: it is too narrow for the gradients. Set bfloat16."
            )
        if self.init_from is not None and method.initial is None:
            raise ConfigError(
                f"init_from does not go with method {self.method}: its result would be of no use without that "
                "adapter. Export the adapter as a checkpoint (sparselet export --to checkpoint) and set `model` to that."
            )
        selection = sorted(changed & {*method.settings} - {"freeze"})
        if self.init_from is not None and method.initial == "entries" and selection:
            raise ConfigError(f"{selection[0]} does not go with init_from: targets and masks are those of {self.init_from}.")
