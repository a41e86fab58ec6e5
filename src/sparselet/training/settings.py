"""What a training run is told: plain data, with every default and explanation in one place."""

from dataclasses import dataclass, fields
from typing import Literal, get_args

from sparselet.errors import ConfigError
from sparselet.selection_settings import SelectionSettings
from sparselet.setting_checks import check_at_least

TrainMethod = Literal["sparse", "lora", "full", "full-qkv", "multitask"]

SELECTION = tuple(field.name for field in fields(SelectionSettings) if field.name != "seed")
TARGETS = ("target_modules", "exclude_modules", "layers")
# The settings that only some methods know, and those methods.
ONLY: dict[str, tuple[TrainMethod, ...]] = {
    **dict.fromkeys(SELECTION, ("sparse",)),
    **dict.fromkeys(TARGETS, ("sparse", "lora", "full-qkv")),
    **dict.fromkeys(("lora_rank", "lora_alpha"), ("lora",)),
}


@dataclass(frozen=True)
class TaskSettings:
    """Which model is trained on which rows, and by which method."""

    model: str = "packaged:smollm2-135m"
    """Base model: a hub name, a local directory, or packaged:smollm2-135m."""
    task: tuple[str, ...] | str = ""
    """Task: a directory with train, validation and test (.jsonl, .json, .parquet), builtin:NAME or a hub data set."""
    method: TrainMethod = "sparse"
    """A sparse expert, or a baseline: lora, full (all weights), full-qkv (all of the targets), multitask (full, many tasks)."""
    init_from: str | None = None
    """For a second stage: an adapter whose entries are trained on, or that full methods add to the base model first."""
    input_column: str = "input"
    """What the task's rows call the prompt, or the conversation; by default input, prompt or messages, whichever they have."""
    target_column: str = "target"
    """What the task's rows call the text to produce."""


@dataclass(frozen=True)
class TrainSettings(SelectionSettings, TaskSettings):
    """Settings of `sparselet train`; defaults are the paper's unless a field says otherwise.

    Raises ConfigError for a value out of range or a setting that the method does not have, and what `SelectionSettings` raises.
    """

    target_modules: tuple[str, ...] = ()
    """Names that the layers to adapt end in; by default the query, key and value projections."""
    exclude_modules: tuple[str, ...] = ()
    """Names of layers to leave out."""
    layers: tuple[int, ...] = ()
    """Numbers of the layers to adapt; all by default."""

    lora_rank: int = 128
    """Rank of the baseline lora."""
    lora_alpha: float | None = None
    """Its alpha, by which ΔW = alpha / rank · BA is scaled; by default the rank."""

    learning_rate: float = 1e-4
    """Peak learning rate of AdamW. Small models and little data want more, such as 1e-3."""
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
    """Ask through the tokenizer's chat template, where it has one."""

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
        check_at_least(self, 0, "patience", "save_steps", "weight_decay", "warmup")
        if not self.warmup < 1:
            raise ConfigError(f"warmup is a fraction of the steps, below 1; got {self.warmup}.")
        for name in ("learning_rate", "epochs", "lora_alpha"):
            if getattr(self, name) is not None and not getattr(self, name) > 0:
                raise ConfigError(f"{name} must be above 0, got {getattr(self, name)}.")
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
        """Refuse what this method has no use for, rather than pass over it."""
        method, changed = self.method, {f.name for f in fields(self) if getattr(self, f.name) != f.default}
        if method not in get_args(TrainMethod):
            raise ConfigError(f"method must be one of {', '.join(get_args(TrainMethod))}, got {method!r}.")
        for name, methods in ONLY.items():
            if name in changed and method not in methods:
                raise ConfigError(
                    f"{name} does not apply to method {method}; it is a setting of {', '.join(methods)}. Leave it out."
                )
        if method == "multitask" and len(self.tasks) < 2:
            raise ConfigError("method multitask needs several tasks; for one, take method full.")
        if method in ("full", "full-qkv", "multitask") and self.dtype == "float16":
            raise ConfigError(
                f"dtype float16 does not go with method {method}: it is too narrow for the gradients. Take bfloat16."
            )
        if self.init_from is None:
            return
        if method == "lora":
            raise ConfigError(
                "init_from does not go with method lora: its result would be of no use without the adapter under it. Merge "
                "the adapter into a checkpoint (sparselet export --to checkpoint) and set `model` to that."
            )
        chosen = sorted(changed & {*SELECTION, *TARGETS})
        if method == "sparse" and chosen:
            raise ConfigError(f"{chosen[0]} does not go with init_from: targets and masks are those of {self.init_from}.")
