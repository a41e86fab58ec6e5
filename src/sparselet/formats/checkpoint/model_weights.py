"""The tensors of a checkpoint as the parameters that transformers makes of them, read one by one.

Files hold what transformers' classes are called, or were called, or several tensors where the model has one: of a mixture of
experts one a projection and expert, which become one parameter of three sides. The rules are the library's own
(`sparselet.names.Names.place`), so a parameter is the one that `from_pretrained` gives.
"""

import copy
import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sparselet.errors import BadShape, MissingTensor
from sparselet.formats.checkpoint.model_files import ModelFiles
from sparselet.model_config import optional_field
from sparselet.names import Names

# Buffers that older versions wrote and newer ones compute: rotary frequencies, positions, causal masks.
_COMPUTED = re.compile(r"(^|\.)(rotary_emb\.inv_freq|position_ids|masked_bias|attn\.(attention\.)?bias|attention\.bias)$")


@dataclass(frozen=True)
class _Source:
    """Which tensors a parameter is made of: itself, or by a conversion all of `tensors`, each with its pattern."""

    first: str
    tensors: dict[str, str | None]


class ModelWeights:
    """The parameters and buffers of a checkpoint under the names of a model's state dict.

    files: the checkpoint. names: of the model (the base's; what means another model was refused before).
    unexpected: the tensors that the model has no place for, but for buffers that it computes itself.
    """

    def __init__(self, files: ModelFiles, names: Names) -> None:
        self.files, self._model = files, names.model
        state = names.model.state_dict()
        self._shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
        self._converters = {pattern: rule for rule in names.rules() for pattern in rule.source_patterns}
        self._sources: dict[str, _Source] = {}
        self.unexpected: list[str] = []
        ignored = [*(optional_field(names.model, "_keys_to_ignore_on_load_unexpected") or ())]
        for tensor, (placed, pattern) in names.place(files.shapes).items():
            if placed not in state:
                if not _COMPUTED.search(placed) and not any(re.search(pattern, placed) for pattern in ignored):
                    self.unexpected.append(tensor)
                continue
            source = self._sources.setdefault(placed, _Source(placed, {}))
            source.tensors[tensor] = pattern
            if pattern is not None:
                targets = self._converters[pattern].target_patterns
                for other in targets[1:]:
                    self._sources.setdefault(placed.replace(targets[0], other), source)

    def __contains__(self, name: str) -> bool:
        return name in self._sources

    def where(self, name: str) -> str:
        """A parameter's file and tensor, the first of several, for messages."""
        return self.files.where(next(iter(self._sources[name].tensors)))

    def dtypes(self, name: str) -> set[str]:
        """The dtypes of the tensors that a parameter is made of, as safetensors calls them."""
        return {self.files.dtypes[tensor] for tensor in self._sources[name].tensors}

    def shape(self, name: str) -> tuple[int, ...]:
        """A parameter's shape: that in the file, or of one that is converted the model's."""
        tensors = self._sources[name].tensors
        tensor, pattern = next(iter(tensors.items()))
        return self._shapes[name] if pattern is not None else self.files.shapes[tensor]

    def read(self, name: str) -> Tensor:
        """One parameter. Raises MissingTensor, BadShape where the tensors do not make it."""
        source = self._sources[name]
        tensor, pattern = next(iter(source.tensors.items()))
        if pattern is None:
            return self.files.read(tensor)
        converted = self._converted(source).get(name)
        converted = converted[0] if isinstance(converted, list) else converted
        if converted is None:
            raise MissingTensor(f"{self.files.where(tensor)} and its like do not make {name}.")
        if tuple(converted.shape) != self._shapes[name]:
            raise BadShape(f"{self.files.where(tensor)} and its like make {name} of shape {list(converted.shape)}; expected "
                           f"{list(self._shapes[name])}.")  # fmt: skip
        return converted

    def _converted(self, source: _Source) -> dict[str, Any]:
        patterns = [pattern for pattern in source.tensors.values() if pattern is not None]
        converter: Any = copy.deepcopy(self._converters[patterns[0]])
        for tensor, pattern in source.tensors.items():
            converter.add_tensor(source.first, tensor, pattern, self.files.read(tensor))
        try:
            with torch.no_grad():
                return converter.convert(source.first, model=self._model, config=optional_field(self._model, "config"))
        except (RuntimeError, ValueError, LookupError, TypeError) as error:
            first = next(iter(source.tensors))
            raise BadShape(f"{self.files.where(first)} and its like do not make {source.first}: {error}") from error
