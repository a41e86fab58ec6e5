"""A base model as its configuration tells it, without its weights: what its layers are called, how they lie, what is tied."""

from collections.abc import Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparselet.errors import MissingFile, MissingTensor, ModelError, SparseletError, WrongBase
from sparselet.formats.checkpoint.model_files import ModelFiles
from sparselet.formats.checkpoint.model_weights import ModelWeights
from sparselet.hub.sources import is_hub_name, local_directory
from sparselet.io.printable import reason
from sparselet.model_config import read_config
from sparselet.names import Names, as_rows, refuse_shared, target_name


class BaseModel:
    """The base model that experts are read against. What is read of it is read when it is first needed.

    name: a directory, or a hub name `org/name[@revision]`, of which the weights are fetched only where they are needed.
    Raises MissingFile for what is neither; its members ModelError, MissingExtra (transformers), AbsurdShape, and what reading
    files raises.
    """

    def __init__(self, name: str | Path) -> None:
        self.name = str(name)
        if not Path(name).is_dir() and not is_hub_name(name, bare=True):
            raise MissingFile(f"{name} is not a directory or a hub name, so not a base model.")

    @cached_property
    def files(self) -> ModelFiles:
        """Its files, those of weights among them."""
        directory = local_directory(self.name, bare=True)
        if directory is None:
            raise MissingFile(f"{self.name} was removed since it was opened as a base model.")
        return ModelFiles(directory)

    @cached_property
    def config(self) -> Any:
        """Its configuration, resolved by transformers: defaults filled in, older spellings in the newest."""
        return read_config(self.name)

    @cached_property
    def names(self) -> Names:
        """Its targets, on the meta device, in the class that its weights are loaded into."""
        try:
            with torch.device("meta"):
                return Names(_model_class(self.config)._from_config(self.config))
        except SparseletError:
            raise
        except Exception as error:  # transformers has too many kinds for what its classes cannot be made of
            raise ModelError(f"cannot tell the layers of the base model {self.name}: {reason(error)}") from error

    def shape(self, target: str) -> tuple[int, int]:
        """(rows, columns) of a target."""
        rows, columns = as_rows(self.names.layers[target].parameter).shape
        return rows, columns

    @cached_property
    def _weights(self) -> ModelWeights:
        return ModelWeights(self.files, self.names)

    def read(self, target: str) -> Tensor:
        """The weight of a target [rows, columns], of those that share it the one that is stored. Raises MissingTensor."""
        state = {target_name(name): name for name in self.names.model.state_dict()}
        stored = next((state[name] for name in self.names.shared[target] if state[name] in self._weights), None)
        if stored is None:
            raise MissingTensor(f"{self.files.path}: the weight of {target} is missing.")
        return as_rows(self._weights.read(stored))

    def targets(self, names: Iterable[str], where: str) -> dict[str, str]:
        """The base model's target that each name of an adapter means, once none shares its weight with another layer.

        Raises UnknownTarget, UnsupportedExpert.
        """
        targets = self.names.find(names, where)
        refuse_shared(self.names, targets.values(), where)
        return targets

    def check_shapes(self, shapes: Mapping[str, tuple[int, int]], where: str) -> None:
        """Raise WrongBase if a target has another shape in the base model."""
        for target, shape in shapes.items():
            if self.shape(target) != shape:
                own = list(self.shape(target))
                raise WrongBase(
                    f"{where}: {target}: expected a weight of shape {list(shape)}, but {self.name} has shape {own}."
                )


def _model_class(config: Any) -> Any:
    """The class of transformers that `load_model` loads a configuration into; for heads that make no text, such as a
    classifier's, the class that it names. Raises ValueError."""
    import transformers
    from transformers.models.auto import modeling_auto as auto

    named = getattr(transformers, (config.architectures or [""])[0], None)
    bare = auto.MODEL_MAPPING.get(type(config), None)
    if named is not None and not named.can_generate() and named not in (bare if isinstance(bare, tuple) else (bare,)):
        return named
    mapping = auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING if config.is_encoder_decoder else auto.MODEL_FOR_CAUSAL_LM_MAPPING
    classes = mapping.get(type(config), None) or named or bare
    if classes is None:
        raise ValueError(f"transformers has no class for a model of type {config.model_type}")
    if isinstance(classes, tuple):
        return named if named in classes else classes[0]
    return classes
