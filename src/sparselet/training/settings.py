"""What a training run is told: plain data, with every default and explanation in one place."""

from dataclasses import dataclass
from typing import Literal

from sparselet.errors import ConfigError
from sparselet.masks import check_density
from sparselet.scores import get_score


@dataclass(frozen=True)
class TrainSettings:
    """Settings of `sparselet train`; defaults are the paper's unless said otherwise.

    Raises ConfigError and its kin for a value out of range.
    """

    model: str = "packaged:smollm2-135m"
    """Base model: a hub name, a local directory, or packaged:smollm2-135m."""
    task: str = ""
    """Task: a directory with train, validation and test as .jsonl or .parquet; builtin:NAME; or a hub data set."""
    input_column: str = "input"
    """What the task's rows call the prompt."""
    target_column: str = "target"
    """What the task's rows call the text to produce."""

    density: float = 0.1
    """Fraction of each target's entries to train, in (0, 1]."""
    block_size: int = 1
    """1 trains single entries, B trains tiles of B×B (the paper takes 16)."""
    score: str = "mcs"
    """How entries are ranked: mcs (the paper's, as printed), mcs_neg, cs, gm, wm, gd or random."""
    scope: Literal["target", "global"] = "target"
    """Keep the fraction in each target, or over all targets together."""
    layer_drop: bool = False
    """Leave out layers that no entry above the global threshold lies in."""
    initial_mask: Literal["dense", "gradient", "random"] = "dense"
    """Train all entries until the first selection, or start sparse from the gradient or at random."""
    reselect_every: int | None = None
    """Optimizer steps between selections; 0 selects once. By default 100, less on small data."""
    selection_epochs: float = 1.0
    """Length of the selection phase in epochs."""
    score_batches: int = 1
    """Batches averaged for one selection."""
    offload: bool = False
    """Keep the selection phase's dense values in CPU memory."""
    target_modules: tuple[str, ...] = ()
    """Names that the layers to adapt end in; by default the query, key and value projections."""
    exclude_modules: tuple[str, ...] = ()
    """Names of layers to leave out."""
    layers: tuple[int, ...] = ()
    """Numbers of the layers to adapt; all by default."""

    learning_rate: float = 1e-4
    """Peak learning rate of AdamW. Small models and little data want more, such as 1e-3."""
    epochs: float = 5.0
    """Passes over the training rows."""
    batch_size: int = 16
    """Rows an optimizer step, divided over the accumulation steps."""
    gradient_accumulation: int = 1
    """Micro-batches an optimizer step."""
    warmup: float = 0.06
    """Fraction of the steps in which the learning rate rises; it then falls linearly to 0."""
    weight_decay: float = 0.0
    """AdamW's decay of the trained values towards 0, that is towards the base model."""
    patience: int = 0
    """Stop after this many epochs without a better validation loss; 0 never stops early. The best epoch is kept."""
    train_rows: int | None = None
    """Use only the first rows of the training split."""
    validation_rows: int | None = None
    """Use only the first rows of the validation split."""
    max_input_length: int = 2048
    """Tokens of a prompt; longer ones are cut from the left."""
    chat_template: bool = True
    """Ask through the tokenizer's chat template, where it has one."""

    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Dtype of the base model; the trained values are float32."""
    gradient_checkpointing: bool = False
    """Save memory by computing activations twice."""
    save_steps: int = 0
    """Save a checkpoint for --resume after this many steps; 0 saves after each epoch only."""
    report_to: tuple[str, ...] = ()
    """Experiment trackers of transformers, such as tensorboard or wandb."""
    seed: int = 0
    """Of the order of the rows, random masks and scoring batches."""

    def __post_init__(self) -> None:
        check_density(self.density)
        get_score(self.score)
        if not self.task:
            raise ConfigError("task is missing; give --task DIRECTORY, builtin:NAME or a hub data set.")
        least = {
            "block_size": 1,
            "batch_size": 1,
            "gradient_accumulation": 1,
            "max_input_length": 1,
            "score_batches": 1,
            "patience": 0,
            "save_steps": 0,
            "weight_decay": 0,
            "selection_epochs": 0,
            "warmup": 0,
        }
        for name, bound in least.items():
            if getattr(self, name) < bound:
                raise ConfigError(f"{name} must be at least {bound}, got {getattr(self, name)}.")
        if not self.warmup < 1:
            raise ConfigError(f"warmup is a fraction of the steps, below 1; got {self.warmup}.")
        for name in ("learning_rate", "epochs"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name} must be above 0, got {getattr(self, name)}.")
        for name in ("train_rows", "validation_rows"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}.")
        if self.batch_size % self.gradient_accumulation:
            raise ConfigError(
                f"batch_size {self.batch_size} cannot be divided into {self.gradient_accumulation} accumulation steps."
            )
