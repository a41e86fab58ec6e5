"""Full checkpoints: ΔW = W_tuned − W_base, both read tensor by tensor."""

import math
import threading
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparselet.adapter import check_target_name, require_finite
from sparselet.delta import SparseDelta, check_shape
from sparselet.errors import MissingTensor, ShapeMismatch, UnknownTensor, UnsupportedExpert, WrongBase
from sparselet.experts.expert import ExpertFile, full_delta
from sparselet.experts.model_files import MODEL_CONFIG, WEIGHT, ModelFiles, copies_of_embeddings
from sparselet.experts.reading import FLOATS
from sparselet.fingerprint import fingerprint_weight

# Fields of config.json that change what a model computes from the same weights.
_MEANING = (
    "model_type hidden_act hidden_activation activation_function num_attention_heads num_key_value_heads n_head head_dim "
    "rms_norm_eps layer_norm_eps layer_norm_epsilon norm_epsilon rope_theta rope_scaling rope_parameters"
)


class CheckpointFile(ExpertFile):
    """A full checkpoint as an expert: ΔW = W_tuned − W_base in float32, for every `X.weight` that is 2-D, or 1-D as [1, n].

    A target that equals the base's has an empty delta; one that differs has every entry selected. Everything else (biases,
    buffers, weights of more sides) must be equal in both. The output layer is no target where the base model ties it to the
    embeddings; a checkpoint that unties it is refused. Names are those of the files, which transformers' own are.

    path: directory with config.json and safetensors. base_name: how the base model is called, for the metadata.

    Raises, at opening, WrongBase (another architecture), UnsupportedExpert (a tensor that is no target differs, pickled
    weights), MissingTensor, UnknownTensor, ShapeMismatch, MissingFile, BadConfig, BadContainer, UnsafePath.
    """

    def __init__(self, path: Path, base: ModelFiles, base_name: str) -> None:
        self._tuned, self._base = ModelFiles(path), base
        _check_configs(self._tuned, base)
        shapes = {}
        for name in _common_names(self._tuned, base):
            shape = base.shapes[name]
            if self._tuned.shapes[name] != shape:
                raise ShapeMismatch(
                    f"{self._tuned.where(name)} has shape {list(self._tuned.shapes[name])}, the base model's {list(shape)}."
                )
            if _is_target(self._tuned, name) and _is_target(base, name):
                check_target_name(name.removesuffix(WEIGHT))
                shapes[name.removesuffix(WEIGHT)] = check_shape((1, *shape)[-2:])
            elif not _equal(self._tuned.read(name), base.read(name)):
                raise UnsupportedExpert(
                    f"{self._tuned.where(name)} differs from the base model's, but only weights of one or two sides can be "
                    "read as an expert."
                )
        super().__init__(path, shapes, {"base_model_name_or_path": base_name, **_task_type(self._tuned.config)})
        self._lock = threading.Lock()
        self._fingerprints: dict[str, dict[str, str] | None] = {}
        self._surveyed: dict[str, tuple[bool, bool]] = {}

    @property
    def fingerprints(self) -> dict[str, dict[str, str] | None]:
        """The base model's, by target."""
        with self._lock:
            for name in self.shapes if not self._fingerprints else ():
                self._fingerprints[name] = fingerprint_weight(self._base.read(name + WEIGHT))
        return dict(self._fingerprints)

    def __getitem__(self, name: str) -> SparseDelta:
        shape = self.shapes[name]
        change = self._change(name)
        if not change.any():
            return SparseDelta.empty(shape)
        require_finite(change, self._tuned.where(name + WEIGHT))
        return full_delta(change.reshape(shape))

    @property
    def nnz(self) -> int:
        """Selected entries: all of each target that differs. Both checkpoints are read for it, the first time."""
        return sum(math.prod(self.shapes[name]) for name, (changed, _) in self._survey().items() if changed)

    def check_values(self) -> None:
        """Read both checkpoints, the first time. Raises NonFiniteValue, naming file and tensor, for NaN or infinity."""
        for name, (_, suspect) in self._survey().items():
            if suspect:
                for files in (self._tuned, self._base):
                    require_finite(files.read(name + WEIGHT), files.where(name + WEIGHT))

    def _change(self, name: str) -> Tensor:
        return self._tuned.read(name + WEIGHT).to(torch.float32) - self._base.read(name + WEIGHT).to(torch.float32)

    def _survey(self) -> dict[str, tuple[bool, bool]]:
        """Of each target whether it changed, and whether its values are to be looked at closely."""
        with self._lock:
            for name in self.shapes if not self._surveyed else ():
                change = self._change(name)
                self._surveyed[name] = bool(change.any()), not math.isfinite(change.sum().item())
        return self._surveyed


def _check_configs(tuned: ModelFiles, base: ModelFiles) -> None:
    for field in _MEANING.split():
        if field in tuned.config and field in base.config and tuned.config[field] != base.config[field]:
            raise WrongBase(
                f"{tuned.path / MODEL_CONFIG}: {field} is {tuned.config[field]!r:.60}, the base model's "
                f"{base.config[field]!r:.60}; the same weights would mean another model. Give the model it was tuned from."
            )


def _common_names(tuned: ModelFiles, base: ModelFiles) -> list[str]:
    """The tensors of both, without those that repeat the embeddings. Raises MissingTensor, UnknownTensor, UnsupportedExpert."""
    names = []
    for files in (tuned, base):
        copies = copies_of_embeddings(files, base.tied)
        for copy in sorted(copies):
            if not _equal(files.read(copy), files.read(files.embeddings or copy)):
                raise UnsupportedExpert(
                    f"{files.where(copy)} is not {files.embeddings}, but the base model has one weight for the two, so no ΔW "
                    "of it gives both."
                )
        names.append(files.shapes.keys() - copies)
    hint = "" if names[0] & names[1] else " No name is in both; save the base model again with transformers' save_pretrained."
    for name in sorted(names[1] - names[0]):
        raise MissingTensor(f"{tuned.path}: {name} is missing, which the base model {base.path} has.{hint}")
    for name in sorted(names[0] - names[1]):
        raise UnknownTensor(f"{tuned.where(name)} is not in the base model {base.path}.{hint}")
    return sorted(names[0])


def _is_target(files: ModelFiles, name: str) -> bool:
    shape = files.shapes[name]
    return name.endswith(WEIGHT) and files.dtypes[name] in FLOATS and len(shape) in (1, 2) and 0 not in shape


def _equal(first: Tensor, second: Tensor) -> bool:
    """Whether two tensors of one shape hold the same numbers; other dtypes than floats must be the same too."""
    if first.is_floating_point() and second.is_floating_point():
        return torch.equal(first.to(torch.float64), second.to(torch.float64))
    return first.dtype == second.dtype and torch.equal(first, second)


def _task_type(config: dict[str, Any]) -> dict[str, str]:
    """PEFT's name for what the model is made for, where its configuration tells."""
    names = config.get("architectures")
    architecture = names[0] if isinstance(names, list) and names and isinstance(names[0], str) else ""
    if architecture.endswith(("ForCausalLM", "LMHeadModel")):
        return {"task_type": "CAUSAL_LM"}
    return {"task_type": "SEQ_2_SEQ_LM"} if config.get("is_encoder_decoder") else {}
