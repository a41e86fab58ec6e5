"""LoRA adapters of PEFT: ΔW = s · B A (Hu et al. 2021), s = α/r, or α/√r where rank-stabilised (Kalajdzievski 2023)."""

import math
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparselet.adapter import CONFIG_FILE, PREFIX, check_target_name, require_finite
from sparselet.container import TensorFile
from sparselet.delta import SparseDelta, check_shape
from sparselet.errors import BadConfig, BadDtype, BadShape, ConfigError, MissingTensor, UnknownTensor, UnsupportedExpert
from sparselet.experts.expert import ExpertFile, full_delta
from sparselet.experts.model_files import OUTPUT_LAYERS, ModelFiles
from sparselet.experts.reading import FLOATS, describe, open_weights, refuse_fields, target_of
from sparselet.patterns import first_matches

A, B = ".lora_A.weight", ".lora_B.weight"

# Fields of LoraConfig that are read here, or that change nothing once A, B and α are known.
_KNOWN = (
    "peft_type auto_mapping base_model_name_or_path revision task_type inference_mode peft_version r lora_alpha use_rslora "
    "rank_pattern alpha_pattern fan_in_fan_out init_lora_weights target_modules exclude_modules lora_dropout bias "
    "layers_to_transform layers_pattern megatron_core runtime_config loftq_config eva_config corda_config lora_ga_config "
    "qalora_group_size velora_config merge_weights"
)
REFUSED = {
    "use_dora": "DoRA also scales the weights by what the adapter learned, so its ΔW is not B A; merge it with PEFT and "
    "give the checkpoint",
    "lora_bias": "biases were trained, and only weights are read",
    "bias": "biases were trained, and only weights are read",
    "modules_to_save": "modules were trained in full, and only LoRA's own weights are read; merge with PEFT and give the "
    "checkpoint",
    "trainable_token_indices": "single tokens' embeddings were trained; merge with PEFT and give the checkpoint",
    "target_parameters": "parameters other than a module's weight were trained",
    "alora_invocation_tokens": "an activated LoRA changes the weights for some tokens only",
    "use_qalora": "QALoRA pools its inputs, so its ΔW is not B A",
    "use_bdlora": "the factors of a block-diagonal LoRA are stored as blocks",
    "arrow_config": "Arrow routes between several adapters, which is not one ΔW",
    "monteclora_config": "Monteclora's weights are drawn at random",
    "kasa_config": "KaSA cuts the base weights, so its ΔW is not relative to the base model",
    "layer_replication": "its layers are copies of the base model's, which has no such layers",
    "megatron_config": "Megatron's layers may hold a part of the factors only",
    "ensure_weight_tying": "its adapters are tied over several layers",
    "enable_lora": "the merged LoRA layers of PEFT before 0.3 are not read",
}
# How A and B started; only the named ones leave the base model's weights alone.
HARMLESS_STARTS = (True, False, None, "gaussian", "eva", "orthogonal", "mica")


@dataclass(frozen=True)
class _Factors:
    """Names of A [rank, in] and B [out, rank], and what to multiply their product by."""

    a: str
    b: str
    scaling: float


class LoraFile(ExpertFile):
    """A PEFT LoRA directory. ΔW = s · B A in float32, every entry selected; transposed where the base model stores its
    weights [in, out] (`fan_in_fan_out`, GPT-2's Conv1D).

    A and B are multiplied as PEFT does, so that ΔW is its `get_delta_weight` to the last bit.

    Raises, at opening, UnsupportedExpert (DoRA, trained biases or modules, starts that changed the base model, and the
    like), BadConfig, MissingFile, BadContainer, UnknownTensor, MissingTensor, BadDtype, BadShape, UnsafePath.
    """

    def __init__(self, path: Path, config: Mapping[str, Any]) -> None:
        file = path / CONFIG_FILE
        _check_config(file, config)
        self._transposed = bool(config.get("fan_in_fan_out"))
        self._tensors = open_weights(path)
        names = _names(self._tensors)
        ranks = pattern_values(file, config, "rank_pattern", names, config.get("r", 8))
        alphas = pattern_values(file, config, "alpha_pattern", names, config.get("lora_alpha", 8))
        root = bool(config.get("use_rslora"))
        self._factors = {name: _factors(self._tensors, file, name, ranks[name], alphas[name], root) for name in names}
        shapes = {name: self._shape(factors) for name, factors in self._factors.items()}
        super().__init__(path, shapes, describe(config))

    def __getitem__(self, name: str) -> SparseDelta:
        factors = self._factors[name]
        product = self._tensors.read(factors.b).float() @ self._tensors.read(factors.a).float()
        dense = (product.t() if self._transposed else product) * factors.scaling
        require_finite(dense, f"{self._tensors.path}: {name}")
        return full_delta(dense.contiguous())

    @property
    def nnz(self) -> int:
        """Selected entries: all of each target."""
        return sum(rows * columns for rows, columns in self.shapes.values())

    def check_values(self) -> None:
        """Read A and B of every target once. Raises NonFiniteValue, naming file and tensor."""
        for tensor in self._tensors.shapes:
            require_finite(self._tensors.read(tensor), f"{self._tensors.path}: {tensor}")

    @property
    def on_output_layer(self) -> str | None:
        """The target that makes logits, if it is one."""
        return next((name for name in self.shapes if name.rpartition(".")[2] in OUTPUT_LAYERS), None)

    def refuse_tied(self, base: ModelFiles) -> None:
        """Raise UnsupportedExpert if a target shares its weight with the embeddings in this base model."""
        if self.on_output_layer and base.tied:
            raise UnsupportedExpert(
                f"{self.path}: {self.on_output_layer} shares its weight with the embeddings in {base.path}; PEFT changes one "
                "of the two, which no ΔW of the shared weight does."
            )

    def _shape(self, factors: _Factors) -> tuple[int, int]:
        rows, columns = self._tensors.shapes[factors.b][0], self._tensors.shapes[factors.a][1]
        return check_shape((columns, rows) if self._transposed else (rows, columns))


def pattern_values(file: Path, config: Mapping[str, Any], field: str, names: Iterable[str], otherwise: Any) -> dict[str, Any]:
    """For each module's name the value of the first pattern in a field that matches its end, as PEFT's rank_pattern and
    alpha_pattern do: a regular expression for the whole name, or for what follows some dot in it.

    Raises BadConfig (no regular expression, or it takes too long), MissingExtra.
    """
    patterns = config.get(field)
    if not patterns:
        return dict.fromkeys(names, otherwise)
    try:
        places = first_matches([rf"(.*\.)?({pattern})$" for pattern in patterns], names)
    except ConfigError as error:
        raise BadConfig(f"{file}: {field}: {error}") from error
    values = list(patterns.values())
    return {name: otherwise if place is None else values[place] for name, place in places.items()}


def _check_config(file: Path, config: Mapping[str, Any]) -> None:
    refuse_fields(file, config, _KNOWN.split(), REFUSED)
    start = config.get("init_lora_weights", True)
    if start not in HARMLESS_STARTS:
        raise UnsupportedExpert(
            f"{file}: init_lora_weights is {start!r:.60}: such a start changes the base model's weights, so A and B alone do "
            "not tell ΔW. Save the adapter with PEFT's path_initial_model_for_weight_conversion, or merge it and give the "
            "checkpoint."
        )
    for field in ("rank_pattern", "alpha_pattern"):
        patterns = config.get(field) or {}
        if not isinstance(patterns, dict) or not all(_is_number(value) for value in patterns.values()):
            raise BadConfig(f"{file}: {field} is {patterns!r:.60}; expected an object of numbers.")
    for field in ("r", "lora_alpha"):
        if not _is_number(config.get(field, 8)):
            raise BadConfig(f"{file}: {field} is {config[field]!r:.60}; expected a number.")


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def _names(tensors: TensorFile) -> list[str]:
    """The targets, once every tensor is known to be an A or a B of one."""
    names = set()
    for tensor in tensors.shapes:
        if "lora_magnitude_vector" in tensor:
            raise UnsupportedExpert(f"{tensors.path}: {tensor}: {REFUSED['use_dora']}.")
        if tensor.endswith((".lora_A.bias", ".lora_B.bias")):
            raise UnsupportedExpert(f"{tensors.path}: {tensor}: {REFUSED['lora_bias']}.")
        if ".lora_embedding_" in tensor:
            raise UnsupportedExpert(
                f"{tensors.path}: {tensor}: a LoRA on embeddings is not read, as their weight may be shared with the output "
                "layer, which PEFT then leaves as it is. Merge it with PEFT and give the checkpoint."
            )
        suffix = next((suffix for suffix in (A, B) if tensor.endswith(suffix)), None)
        if suffix is None or not tensor.startswith(PREFIX):
            raise UnknownTensor(
                f"{tensors.path}: {tensor} is not {PREFIX}<target>{A} or {B}; weights saved beside LoRA's own cannot be "
                "read. Embeddings that were not changed stay out with save_pretrained(..., save_embedding_layers=False)."
            )
        names.add(target_of(tensor, suffix))
    for name in names:
        check_target_name(name)
    return sorted(names)


def _factors(tensors: TensorFile, file: Path, name: str, said: float, alpha: float, root: bool) -> _Factors:
    """A and B of a target. said, alpha: its rank and α by the configuration. root: whether α is divided by √r."""
    a, b = PREFIX + name + A, PREFIX + name + B
    for tensor, other in ((a, b), (b, a)):
        if tensor not in tensors.shapes:
            raise MissingTensor(f"{tensors.path}: {tensor} is missing, but {other} is there.")
        shape = tensors.shapes[tensor]
        if len(shape) > 2:
            raise UnsupportedExpert(f"{tensors.path}: {tensor} has shape {list(shape)}; convolutions are not read.")
        if len(shape) < 2 or 0 in shape:
            raise BadShape(f"{tensors.path}: {tensor} has shape {list(shape)}; expected two positive sides.")
        if tensors.dtypes[tensor] not in FLOATS:
            raise BadDtype(f"{tensors.path}: {tensor} is {tensors.dtypes[tensor]}; expected one of {', '.join(FLOATS)}.")
    rank, other = tensors.shapes[a][0], tensors.shapes[b][1]
    if rank != other:
        raise BadShape(f"{tensors.path}: {name}: A has rank {rank}, B has rank {other}.")
    if said != rank:
        raise BadShape(f"{tensors.path}: {name} has rank {rank}, but {file.name} says {said}.")
    return _Factors(a, b, alpha / (math.sqrt(rank) if root else rank))
