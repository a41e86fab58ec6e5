"""`SparseletConfig`: the settings of an adapter's training, and the record of a saved adapter."""

import contextlib
import enum
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from peft import PeftConfig

from sparselet.adapter import AdapterFile, UnfinishedAdapterWarning
from sparselet.adapter_format import CONFIG_FILE, METHOD, WEIGHTS_FILE, check_config, unnamed_modules
from sparselet.delta import BlockSize
from sparselet.errors import ConfigError
from sparselet.io.json_files import read_object, write_json
from sparselet.selection_settings import Balance, InitialMask, Scope, SelectionSettings, When, selection_values
from sparselet.tuner.targets import PRESETS


class PeftMethod(enum.StrEnum):
    """The method's name as PEFT and transformers read it: a string with a `value`, like their own `PeftType`."""

    SPARSELET = METHOD


PEFT_TYPE = PeftMethod.SPARSELET
PICKLE = "adapter_model.bin"  # what PEFT writes with safe_serialization=False, and loads without running code


@dataclass
class SparseletConfig(PeftConfig):
    """Configuration of a sparse adapter for `peft.get_peft_model`.

    density to seed: the settings of mask selection; `SelectionSettings` explains them.
    target_modules: names the target layers end in, or one regular expression for their full names, or a preset: "qkv", the
        query, key and value projections of the language model, found by architecture (the default); "attention", these and
        the linear layers beside them; "mlp", all others that text reaches but the output layer; "all", all
        linear layers but the output layer (PEFT's "all-linear").
    exclude_modules: the same, for layers to leave out.
    layers_to_transform: indices of the layers to adapt; all by default. Not together with a regular expression.
    layers_pattern: the name of the module list that these indices count, where a model has several.
    modules_to_save: modules to train and save in full, such as a new classification head.

    The remaining fields record a saved adapter (docs/format.md) and are not set by hand; where they are set, `targets` alone
    decides which layers are changed. Raises DensityOutOfRange, BlockSizeError, UnknownScore, ConfigError; for the configuration
    of a saved adapter what `SparseAdapter.load` raises.
    """

    density: float = SelectionSettings.density
    block_size: BlockSize = SelectionSettings.block_size
    score: str = SelectionSettings.score
    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    modules_to_save: list[str] | None = None
    when: When | None = None  # the default, or "paper" for a saved adapter, since early ones do not name it
    balance: Balance = SelectionSettings.balance
    replaced: float = SelectionSettings.replaced
    scope: Scope = SelectionSettings.scope
    layer_drop: bool = SelectionSettings.layer_drop
    initial_mask: InitialMask = SelectionSettings.initial_mask
    reselect_every: int | None = SelectionSettings.reselect_every
    selection_epochs: float = SelectionSettings.selection_epochs
    score_batches: int = SelectionSettings.score_batches
    offload: bool = SelectionSettings.offload
    seed: int = SelectionSettings.seed

    format_version: int | None = None
    targets: dict[str, Any] | None = field(default=None, repr=False)
    task: str | None = None
    data_fingerprint: str | None = None
    chat_template: bool | None = None
    prompt: str | None = None
    metrics: dict[str, Any] | None = None
    versions: dict[str, str] | None = None
    merge: dict[str, Any] | None = None
    training: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        self.peft_type = PEFT_TYPE
        # Further fields of the next saved file; see `save_pretrained`.
        self._record: dict[str, Any] = {}
        saved = self.targets is not None or self.format_version is not None
        if saved:
            check_config(vars(self), CONFIG_FILE)
        self.when = self.when or ("paper" if saved else SelectionSettings.when)
        super().__post_init__()
        if isinstance(self.target_modules, (list, tuple, set)):
            self.target_modules = sorted(self.target_modules)
        if not saved:  # a saved adapter may be a merge, of any density
            self.validate()
        elif isinstance(self.target_modules, str):  # regular expressions from a file are not evaluated
            self.target_modules = sorted(self.targets or {})

    def validate(self) -> None:
        """Check the settings of training. Raises what `SelectionSettings` raises, and ConfigError."""
        _ = self.selection  # raises for a value out of range
        pattern = isinstance(self.target_modules, str) and self.target_modules.lower() not in PRESETS
        if pattern and (self.layers_to_transform is not None or self.layers_pattern):
            raise ConfigError(
                f"layers_to_transform and layers_pattern do not go with target_modules={self.target_modules!r}, which matches "
                "full names. Put the layers' numbers into the expression, or give a list of names."
            )
        if self.layers_pattern and self.layers_to_transform is None:
            raise ConfigError("layers_pattern names the list that layers_to_transform counts in; set layers_to_transform too.")

    @property
    def selection(self) -> SelectionSettings:
        """The settings of mask selection. Raises what `SelectionSettings` raises."""
        return SelectionSettings(**selection_values(self))

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str, subfolder: str | None = None, **kwargs: Any) -> PeftConfig:
        """Read a saved configuration and check the weights beside it. PEFT calls this before it loads an adapter.

        A directory or a repository on the hub. Raises what `SparseAdapter.load` raises, except for the checks of a tensor's
        entries; PEFT's ValueError where there is no configuration.
        """
        directory = Path(pretrained_model_name_or_path, subfolder or "")
        if (directory / CONFIG_FILE).is_file():
            _check_saved(directory)
            return super().from_pretrained(pretrained_model_name_or_path, subfolder=subfolder, **kwargs)
        config = super().from_pretrained(pretrained_model_name_or_path, subfolder=subfolder, **kwargs)
        if isinstance(config, SparseletConfig) and config.targets is not None:
            options, _, _ = cls._split_kwargs(kwargs)
            # PEFT reports these errors when it loads the weights.
            with contextlib.suppress(HfHubHTTPError, LocalEntryNotFoundError, OSError):
                file = hf_hub_download(pretrained_model_name_or_path, WEIGHTS_FILE, subfolder=subfolder, **options)
                _check_saved(Path(file).parent)
        return config

    def to_dict(self) -> dict[str, Any]:
        """All fields, as JSON values."""
        fields = super().to_dict()
        for name in ("training", "prompt"):  # the default of `train` needs no record
            if fields[name] is None:
                del fields[name]
        return {key: sorted(value) if isinstance(value, set) else value for key, value in fields.items()}

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Write adapter_config.json atomically, with the record of the adapter saved beside it."""
        content = {**self.to_dict(), **self._record}
        if kwargs.get("auto_mapping_dict") is not None:
            content["auto_mapping"] = kwargs["auto_mapping_dict"]
        if self._record and "auto_mapping_dict" in kwargs:  # called by PEFT, after it has written the weights
            added = unnamed_modules(Path(save_directory), content)  # resized embeddings
            content["modules_to_save"] = sorted({*(content["modules_to_save"] or []), *added}) or None
        write_json(f"{save_directory}/{CONFIG_FILE}", content)


def _check_saved(directory: Path) -> None:
    """Check an adapter's files, except for a configuration without weights and for weights that PEFT has pickled."""
    content = read_object(directory / CONFIG_FILE)
    weights = (directory / WEIGHTS_FILE).exists()
    if content.get("peft_type") != METHOD or not (weights or (content.get("targets") and not (directory / PICKLE).exists())):
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UnfinishedAdapterWarning)  # its training may be continued
        AdapterFile(directory)
