"""LoRA adapters of PEFT: ΔW = s · B A (Hu et al. 2021), s = α/r, or α/√r where rank-stabilised (Kalajdzievski 2023)."""

import math
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparselet.adapter import CONFIG_FILE, PREFIX, check_target_name, require_finite
from sparselet.delta import SparseDelta, check_dense_shape, check_shape, index_dtype
from sparselet.errors import BadConfig, BadDtype, BadShape, ConfigError, UnknownTensor, UnsupportedExpert
from sparselet.formats.base_model import BaseModel
from sparselet.formats.expert import ExpertFile, full_delta, leave_out
from sparselet.formats.reading import FLOATS, describe, open_weights, refuse_fields, target_of, tensors_of_targets
from sparselet.io.memory import require_memory
from sparselet.io.patterns import first_matches
from sparselet.io.tensor_files import TensorFile

A, B = ".lora_A.weight", ".lora_B.weight"

# What transformers' models with Conv1D call such layers; others have linear layers of these names.
CONV1D = ("c_attn", "q_attn", "c_proj", "c_fc", "c_mlp")

# Fields of LoraConfig that are read here, or that change nothing once A, B and α are known.
_READ_FIELDS = (
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
    weights [in, out] (GPT-2's Conv1D).

    A and B are multiplied as PEFT does, so that ΔW is its `get_delta_weight` to the last bit. How a weight lies the base
    model's layer tells. PEFT has one `fan_in_fan_out` for all, which it corrects layer by layer and then saves as the last one
    had it: without the base model it is believed only where it cannot be of two minds.

    base: the base model, whose names the targets then have. without: patterns of targets, by their names in the file, that
    are not read.

    Raises, at opening, ConfigError (the base model is needed), UnknownTarget, WrongBase (other shapes), UnsupportedExpert
    (DoRA, trained biases or modules, starts that changed the base model, and the like), BadConfig, MissingFile, BadContainer,
    UnknownTensor, MissingTensor, BadDtype, BadShape, UnsafePath.
    """

    def __init__(
        self, path: Path, config: Mapping[str, Any], base: BaseModel | None = None, without: Iterable[str] = ()
    ) -> None:
        file = path / CONFIG_FILE
        _check_config(file, config)
        self._tensors = open_weights(path)
        pairs = tensors_of_targets(self._tensors, (A, B), _names(self._tensors))
        left_out = leave_out(pairs, without)
        pairs = {name: pair for name, pair in pairs.items() if name not in left_out}
        modules = {name: a.removeprefix(PREFIX).removesuffix(A) for name, (a, _) in pairs.items()}
        ranks = pattern_values(file, config, "rank_pattern", modules.values(), config.get("r", 8))
        alphas = pattern_values(file, config, "alpha_pattern", modules.values(), config.get("lora_alpha", 8))
        root = bool(config.get("use_rslora"))
        factors = {
            name: _factors(self._tensors, file, name, pair, ranks[modules[name]], alphas[modules[name]], root)
            for name, pair in pairs.items()
        }
        targets = {name: name for name in pairs} if base is None else base.targets(pairs, str(path))
        self._factors = {targets[name]: factors[name] for name in pairs}
        if base is None:
            transposed = dict.fromkeys(pairs, _is_transposed(file, config, pairs))
        else:
            transposed = {target: base.names.layers[target].transposed for target in self._factors}
            _refuse_other_layers(base, self._factors, path)
        self._transposed = {name for name, value in transposed.items() if value}
        shapes = {name: self._shape(name) for name in self._factors}
        if base is not None:
            base.check_shapes(shapes, str(path))
        super().__init__(path, shapes, describe(config), left_out)

    def __getitem__(self, name: str) -> SparseDelta:
        factors = self._factors[name]
        entries = math.prod(self.shapes[name])
        require_memory(entries * (8 + index_dtype(entries).itemsize), f"{self._tensors.path}: {name}")
        product = self._tensors.read(factors.b).float() @ self._tensors.read(factors.a).float()
        dense = (product.t() if name in self._transposed else product) * factors.scaling
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

    def _shape(self, name: str) -> tuple[int, int]:
        factors = self._factors[name]
        rows, columns = self._tensors.shapes[factors.b][0], self._tensors.shapes[factors.a][1]
        shape = check_shape((columns, rows) if name in self._transposed else (rows, columns))
        check_dense_shape(shape, f"{self._tensors.path}: {name}")
        return shape


def _is_transposed(file: Path, config: Mapping[str, Any], names: Iterable[str]) -> bool:
    """Whether all targets are Conv1D, without the base model. Raises ConfigError where its layers must tell."""
    said = bool(config.get("fan_in_fan_out"))
    usual = {name.rpartition(".")[2] in CONV1D for name in names}
    if usual <= {True} or (usual == {False} and not said):
        return said
    base_name = config.get("base_model_name_or_path")
    raise ConfigError(
        f"{file}: fan_in_fan_out is {str(said).lower()}, but PEFT has one for all layers, and these may lie in two ways. "
        f"Set `base{f'={base_name}' if base_name else ''}` to the base model."
    )


def _refuse_other_layers(base: BaseModel, targets: Iterable[str], path: Path) -> None:
    """Raise UnsupportedExpert for a target that is not linear in the base model, such as an embedding."""
    for target in targets:
        if not base.names.layers[target].linear:
            kind = type(base.names.layers[target].module).__name__
            raise UnsupportedExpert(f"{path}: {target} is a {kind} in {base.name}; B A changes linear layers only.")


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
    refuse_fields(file, config, _READ_FIELDS.split(), REFUSED)
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


def _factors(
    tensors: TensorFile, file: Path, name: str, pair: tuple[str, str], said: float, alpha: float, root: bool
) -> _Factors:
    """A and B of a target. pair: their tensors. said, alpha: its rank and α by the configuration. root: α is divided by √r."""
    a, b = pair
    for tensor in pair:
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
