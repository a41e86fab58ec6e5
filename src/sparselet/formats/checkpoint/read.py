"""Full checkpoints: ΔW = W_tuned − W_base, both read parameter by parameter."""

import math
import threading
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparselet.adapter import check_target_name, require_finite
from sparselet.adapter_metadata import AdapterMetadata
from sparselet.delta import SparseDelta, check_shape
from sparselet.errors import MissingTensor, ShapeMismatch, UnknownTensor, UnsupportedExpert
from sparselet.fingerprint import fingerprint_weight
from sparselet.formats.base_model import BaseModel
from sparselet.formats.checkpoint.model_files import MODEL_CONFIG, ModelFiles
from sparselet.formats.checkpoint.model_weights import ModelWeights
from sparselet.formats.checkpoint.same_model import require_same_meaning
from sparselet.formats.expert import ExpertFile, full_delta
from sparselet.formats.reading import FLOATS, refuse_quantised
from sparselet.model_config import read_config
from sparselet.names import Names, target_name


class CheckpointFile(ExpertFile):
    """A full checkpoint as an expert: ΔW = W_tuned − W_base in float32, for every floating parameter of the base model.

    A target that equals the base's has an empty delta; one that differs has every entry selected. Weights, biases and norms
    alike are targets, those of one side as [1, n], those of more than two with all but the last joined. Parameters that are
    one in the base model are one target, the first of them. Buffers that the model keeps must be equal in both; those that it
    computes are passed over. Names are the model's, whatever the files call them.

    path: directory with config.json and safetensors. base: the base model.

    Raises, at opening, WrongBase (a configuration by which the same weights are another model), UnsupportedExpert (a tensor
    that is no target differs, shared weights that are not equal, quantised or pickled weights), MissingTensor, UnknownTensor,
    ShapeMismatch, MissingFile, BadConfig, BadContainer, UnsafePath, ModelError, MissingExtra.
    """

    def __init__(self, path: Path, base: BaseModel) -> None:
        files = ModelFiles(path)
        for model in (files, base.files):
            refuse_quantised(model.config, str(model.path))
        names = base.names
        pads_matter = any(hasattr(module, "create_position_ids_from_input_ids") for module in names.model.modules())
        require_same_meaning(read_config(str(path)), base.config, str(path / MODEL_CONFIG), pads_matter)
        self._tuned, self._base = ModelWeights(files, names), ModelWeights(base.files, names)
        self._parameters = _parameters(names, self._tuned, self._base)
        shapes = {}
        for target, (tuned, own) in self._parameters.items():
            shape = self._base.shape(own)
            if self._tuned.shape(tuned) != shape:
                raise ShapeMismatch(
                    f"{self._tuned.where(tuned)} has shape {list(self._tuned.shape(tuned))}, the base model's {list(shape)}."
                )
            check_target_name(target)
            shapes[target] = check_shape((math.prod(shape[:-1]) if len(shape) > 1 else 1, shape[-1] if shape else 1))
        super().__init__(path, shapes, AdapterMetadata(base.name, _task_type(files.config)))
        self._lock = threading.Lock()
        self._fingerprints: dict[str, dict[str, str] | None] = {}
        self._surveyed: dict[str, tuple[bool, bool]] = {}

    @property
    def fingerprints(self) -> dict[str, dict[str, str] | None]:
        """The base model's, by target."""
        with self._lock:
            for name in self.shapes if not self._fingerprints else ():
                self._fingerprints[name] = fingerprint_weight(self._base.read(self._parameters[name][1]))
        return dict(self._fingerprints)

    def __getitem__(self, name: str) -> SparseDelta:
        shape = self.shapes[name]
        change = self._change(name)
        if not change.any():
            return SparseDelta.empty(shape)
        require_finite(change, self._tuned.where(self._parameters[name][0]))
        return full_delta(change.reshape(shape))

    @property
    def nnz(self) -> int:
        """Selected entries: all of each target that differs. Both checkpoints are read for it, the first time."""
        return sum(math.prod(self.shapes[name]) for name, (changed, _) in self._survey().items() if changed)

    def check_values(self) -> None:
        """Read both checkpoints, the first time. Raises NonFiniteValue, naming file and tensor, for NaN or infinity."""
        for name, (_, suspect) in self._survey().items():
            if suspect:
                for weights, parameter in zip((self._tuned, self._base), self._parameters[name], strict=True):
                    require_finite(weights.read(parameter), weights.where(parameter))
                require_finite(self._change(name), self._tuned.where(self._parameters[name][0]))

    def _change(self, name: str) -> Tensor:
        tuned, base = self._parameters[name]
        first, second = self._tuned.read(tuned), self._base.read(base)
        wide = torch.promote_types(torch.promote_types(first.dtype, second.dtype), torch.float32)
        return first.to(wide).sub_(second).to(torch.float32)  # both were read for this alone

    def _survey(self) -> dict[str, tuple[bool, bool]]:
        """Of each target whether it changed, and whether its values are to be looked at closely."""
        with self._lock:
            for name in self.shapes if not self._surveyed else ():
                change = self._change(name)
                self._surveyed[name] = bool(change.any()), not math.isfinite(change.sum().item())
        return self._surveyed


def _parameters(names: Names, tuned: ModelWeights, base: ModelWeights) -> dict[str, tuple[str, str]]:
    """The parameters of each target in both checkpoints, once everything else is known to be equal in both.

    Raises MissingTensor, UnknownTensor, UnsupportedExpert.
    """
    tied: dict[str, tuple[str, str]] = {}
    state = {target_name(name): name for name in names.model.state_dict()}
    if not any(name in tuned and name in base for name in state.values()):
        raise MissingTensor(
            f"{tuned.files.path}: {next(iter(state.values()))} is missing. No name is in both; save the base model "
            f"{base.files.path} again with transformers' save_pretrained."
        )
    _compare_unexpected(tuned, base)
    for target, group in names.shared.items():
        if target != group[0]:
            continue
        present = [[state[name] for name in group if state[name] in weights] for weights in (tuned, base)]
        for weights, copies in zip((tuned, base), present, strict=True):
            for other in copies[1:]:
                _require_equal_copies(weights, other, copies[0])
        if bool(present[0]) != bool(present[1]):
            _refuse_lack(state[target], tuned, base)
        if present[0]:  # what neither file holds, as the head of a model without one, is no change
            tied[target] = (present[0][0], present[1][0])
    for buffer in state.keys() - names.shared.keys():
        name = state[buffer]
        if (name in tuned) != (name in base):
            _refuse_lack(name, tuned, base)
        if name in base and not _equal(tuned.read(name), base.read(name)):
            raise UnsupportedExpert(f"{tuned.where(name)} differs from the base model's, but it is a buffer, not a weight.")
    for target, (own, other) in list(tied.items()):
        if tuned.dtypes(own) <= set(FLOATS) and base.dtypes(other) <= set(FLOATS) and 0 not in base.shape(other):
            continue
        if tuned.shape(own) != base.shape(other) or not _equal(tuned.read(own), base.read(other)):
            raise UnsupportedExpert(f"{tuned.where(own)} differs from the base model's, but is not a floating weight.")
        del tied[target]
    return tied


def _compare_unexpected(tuned: ModelWeights, base: ModelWeights) -> None:
    """Tensors that the model has no place for must be in both files and equal, since nothing can be made of a difference."""
    for name in base.unexpected:
        if name not in tuned.files.shapes:
            raise MissingTensor(f"{tuned.files.path}: {name} is missing, which the base model {base.files.path} has.")
    for name in tuned.unexpected:
        if name not in base.files.shapes:
            raise UnknownTensor(f"{tuned.files.where(name)} is not in the base model {base.files.path}.")
    for name in tuned.unexpected:
        if not _equal(tuned.files.read(name), base.files.read(name)):
            raise UnsupportedExpert(
                f"{tuned.files.where(name)} differs from the base model's, but its model has no such weight."
            )


def _refuse_lack(name: str, tuned: ModelWeights, base: ModelWeights) -> None:
    """Raise for a tensor that one of the two lacks."""
    if name in base:
        raise MissingTensor(f"{tuned.files.path}: {name} is missing, which the base model {base.files.path} has.")
    raise UnknownTensor(f"{tuned.where(name)} is not in the base model {base.files.path}.")


def _require_equal_copies(weights: ModelWeights, copy: str, first: str) -> None:
    if not _equal(weights.read(copy), weights.read(first)):
        raise UnsupportedExpert(
            f"{weights.where(copy)} is not {first}, but the base model has one weight for the two, so no ΔW of it gives both."
        )


def _equal(first: Tensor, second: Tensor) -> bool:
    """Whether two tensors hold the same numbers; other dtypes than floats must be the same too."""
    if first.is_floating_point() and second.is_floating_point():
        return first.shape == second.shape and torch.equal(first.to(torch.float64), second.to(torch.float64))
    return first.dtype == second.dtype and torch.equal(first, second)


def _task_type(config: dict[str, Any]) -> str | None:
    """PEFT's name for what the model is made for, where its configuration tells."""
    names = config.get("architectures")
    architecture = names[0] if isinstance(names, list) and names and isinstance(names[0], str) else ""
    if architecture.endswith(("ForCausalLM", "LMHeadModel")):
        return "CAUSAL_LM"
    return "SEQ_2_SEQ_LM" if config.get("is_encoder_decoder") else None
