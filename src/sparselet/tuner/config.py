"""`SparseletConfig`: what an adapter trains, and what is recorded of it."""

import contextlib
import enum
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from peft import PeftConfig
from peft.utils.constants import INCLUDE_LINEAR_LAYERS_SHORTHAND as ALL_LINEAR

from sparselet.adapter import AdapterFile, UnfinishedAdapterWarning
from sparselet.adapter_format import CONFIG_FILE, METHOD, WEIGHTS_FILE, check_config, unnamed_modules
from sparselet.errors import BlockSizeError, ConfigError
from sparselet.io.files import read_object, write_json
from sparselet.masks import check_density
from sparselet.scores import RANKS_UNTRAINED, get_score


class PeftMethod(enum.StrEnum):
    """The method's name as PEFT and transformers read it: a string that has a `value`, as their own `PeftType` is."""

    SPARSELET = METHOD


PEFT_TYPE = PeftMethod.SPARSELET
PICKLE = "adapter_model.bin"  # what PEFT writes with safe_serialization=False, and reads without running code


@dataclass
class SparseletConfig(PeftConfig):
    """Configuration of a sparse adapter for `peft.get_peft_model`.

    density: fraction of each target's entries that is trained, in (0, 1]; the paper's keep-ratio.
    block_size: 1 for single entries, B for tiles of B×B (paper: 16).
    score: how entries are ranked, a name in `sparselet.SCORES`.
    target_modules: names the target layers end in, or one regular expression for their full names, or "all-linear"; by
        default the query, key and value projections of the language model, found by architecture.
    exclude_modules: the same, for layers to leave out.
    layers_to_transform: indices of the layers to adapt; all by default. Not with a regular expression, which says it itself.
    layers_pattern: the name of the module list that these indices number, where a model has several.
    modules_to_save: modules to train and save in full, such as a new classification head.
    scope: "target" keeps the fraction in each target, "global" over all targets together.
    layer_drop: leave out layers in which no score reaches the global threshold (paper, Eq. 5 and 6).
    initial_mask: "dense" trains all entries until the first selection (the paper); "gradient" selects before the first
        step by accumulated |g|; "random" starts from random entries. The last two keep nothing dense.
    reselect_every: optimizer steps between selections (paper: 100); 0 selects once. None: 100, or 0 where the start is
        not dense and the score cannot rank an entry that was never trained.
    selection_epochs: length of the selection phase in epochs (paper: 1).
    score_batches: batches averaged for a selection. One needs a single dense gradient at a time, more need one a target.
    offload: keep the dense Ŵ of the selection phase, and gradients and scores that wait, in CPU memory (paper, Appendix C).
    seed: of random masks, random scores and the choice of scoring batches. Adapters with one seed get one random mask,
        unless their `data_fingerprint` tells them apart, as `sparselet train` sees to.

    The remaining fields record a saved adapter (docs/format.md) and are not set by hand; where they are set, they alone say
    which layers are changed. Raises DensityOutOfRange, BlockSizeError, UnknownScore, ConfigError; for the configuration of a
    saved adapter what `SparseAdapter.load` raises.
    """

    density: float = 0.1
    block_size: int = 1
    score: str = "mcs"
    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    modules_to_save: list[str] | None = None
    scope: Literal["target", "global"] = "target"
    layer_drop: bool = False
    initial_mask: Literal["dense", "gradient", "random"] = "dense"
    reselect_every: int | None = None
    selection_epochs: float = 1.0
    score_batches: int = 1
    offload: bool = False
    seed: int = 0

    format_version: int | None = None
    targets: dict[str, Any] | None = field(default=None, repr=False)
    task: str | None = None
    data_fingerprint: str | None = None
    chat_template: bool | None = None
    metrics: dict[str, Any] | None = None
    versions: dict[str, str] | None = None
    merge: dict[str, Any] | None = None
    training: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        self.peft_type = PEFT_TYPE
        # What belongs in the next saved file beside the fields above; see `save_pretrained`.
        self._record: dict[str, Any] = {}
        saved = self.targets is not None or self.format_version is not None
        if saved:
            check_config(vars(self), CONFIG_FILE)
        super().__post_init__()
        if isinstance(self.target_modules, (list, tuple, set)):
            self.target_modules = sorted(self.target_modules)
        if not saved:  # a saved adapter may have been merged, with any density at all
            self.validate()
        elif isinstance(self.target_modules, str):  # an expression from a file is never matched
            self.target_modules = sorted(self.targets or {})

    def validate(self) -> None:
        """Check the settings of training."""
        check_density(self.density)
        get_score(self.score)
        if not isinstance(self.block_size, int) or self.block_size < 1:
            raise BlockSizeError(f"block_size must be a positive integer, got {self.block_size!r}.")
        pattern = isinstance(self.target_modules, str) and self.target_modules.lower() != ALL_LINEAR
        if pattern and (self.layers_to_transform is not None or self.layers_pattern):
            raise ConfigError(
                f"layers_to_transform and layers_pattern do not go with target_modules={self.target_modules!r}, which matches "
                "full names. Put the layers' numbers into the expression, or give a list of names."
            )
        if self.layers_pattern and self.layers_to_transform is None:
            raise ConfigError("layers_pattern says where layers are numbered; set layers_to_transform too.")
        _one_of("scope", self.scope, ("target", "global"))
        _one_of("initial_mask", self.initial_mask, ("dense", "gradient", "random"))
        _at_least("score_batches", self.score_batches, 1)
        _at_least("selection_epochs", self.selection_epochs, 0)
        if self.reselect_every is not None:
            _at_least("reselect_every", self.reselect_every, 0)
        if self.initial_mask != "dense" and self.reselect_every and self.score not in RANKS_UNTRAINED:
            raise ConfigError(
                f"score {self.score!r} is 0 for every entry that was never trained, and initial_mask "
                f"{self.initial_mask!r} trains none outside the mask, so it cannot move the mask every "
                f"{self.reselect_every} steps. Set reselect_every=0, or a score of {', '.join(sorted(RANKS_UNTRAINED))}."
            )

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str, subfolder: str | None = None, **kwargs: Any) -> PeftConfig:
        """Read a saved configuration, and check the weights beside it, as PEFT does before it loads an adapter.

        A directory or repository on the hub. Raises what `SparseAdapter.load` raises, but for what only a tensor's entries
        tell; PEFT's ValueError where there is no configuration.
        """
        directory = Path(pretrained_model_name_or_path, subfolder or "")
        if (directory / CONFIG_FILE).is_file():
            _check_saved(directory)
            return super().from_pretrained(pretrained_model_name_or_path, subfolder=subfolder, **kwargs)
        config = super().from_pretrained(pretrained_model_name_or_path, subfolder=subfolder, **kwargs)
        if isinstance(config, SparseletConfig) and config.targets is not None:
            options, _, _ = cls._split_kwargs(kwargs)
            with contextlib.suppress(HfHubHTTPError, LocalEntryNotFoundError, OSError):  # of which PEFT tells next
                file = hf_hub_download(pretrained_model_name_or_path, WEIGHTS_FILE, subfolder=subfolder, **options)
                _check_saved(Path(file).parent)
        return config

    @property
    def interval(self) -> int:
        """Optimizer steps between selections, with the default of `reselect_every` filled in."""
        if self.reselect_every is not None:
            return self.reselect_every
        return 100 if self.initial_mask == "dense" or self.score in RANKS_UNTRAINED else 0

    def to_dict(self) -> dict[str, Any]:
        """All fields, as JSON can hold them."""
        fields = super().to_dict()
        if self.training is None:
            del fields["training"]  # of what `train` does by default there is nothing to tell
        return {key: sorted(value) if isinstance(value, set) else value for key, value in fields.items()}

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Write adapter_config.json atomically, with the record of the adapter saved beside it."""
        content = {**self.to_dict(), **self._record}
        if kwargs.get("auto_mapping_dict") is not None:
            content["auto_mapping"] = kwargs["auto_mapping_dict"]
        if self._record and "auto_mapping_dict" in kwargs:  # from PEFT, which has just written the weights
            added = unnamed_modules(Path(save_directory), content)  # embeddings, where they were resized
            content["modules_to_save"] = sorted({*(content["modules_to_save"] or []), *added}) or None
        write_json(f"{save_directory}/{CONFIG_FILE}", content)


def _check_saved(directory: Path) -> None:
    """Check an adapter's files; a configuration that was saved by itself passes, and weights that PEFT has pickled."""
    content = read_object(directory / CONFIG_FILE)
    weights = (directory / WEIGHTS_FILE).exists()
    if content.get("peft_type") != METHOD or not (weights or (content.get("targets") and not (directory / PICKLE).exists())):
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UnfinishedAdapterWarning)  # training may go on from it
        AdapterFile(directory)


def _one_of(name: str, value: object, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ConfigError(f"{name} must be one of {', '.join(allowed)}, got {value!r}.")


def _at_least(name: str, value: float, least: float) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or value < least:
        raise ConfigError(f"{name} must be a number of at least {least}, got {value!r}.")
