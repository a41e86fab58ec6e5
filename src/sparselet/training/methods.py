"""What each method of `train` makes trainable, and what it writes: the sparse expert, and the paper's baselines.

A method is a context manager. Within it the model is ready to be trained; after it, the model is as it was.
"""

import contextlib
import copy
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import safetensors.torch
import torch
from peft import LoraConfig, PeftConfig, TaskType, get_peft_model, get_peft_model_state_dict
from peft.tuners.tuners_utils import check_target_module_exists
from torch import Tensor, nn
from transformers import PreTrainedModel, TrainerCallback
from transformers.pytorch_utils import Conv1D

from sparselet import kernels
from sparselet.adapter import CONFIG_FILE, WEIGHTS_FILE, SparseAdapter
from sparselet.apply import add
from sparselet.delta import SparseDelta
from sparselet.errors import ArgumentError, ConfigError, NoTargets, TrainingDiverged
from sparselet.fingerprint import fingerprint_weight
from sparselet.generation.prompts import PromptFormat, end_tokens
from sparselet.io.atomic import atomic_write
from sparselet.io.json_files import write_json
from sparselet.names import Names, refuse_shared
from sparselet.selection_settings import selection_values
from sparselet.training.sampling import balanced_rows
from sparselet.training.schedule import MaskSchedule
from sparselet.training.settings import TrainSettings
from sparselet.tuner import SparseletConfig, sparselet_layers, to_adapter
from sparselet.tuner.model import versions
from sparselet.tuner.targets import default_targets, describe_linear_layers, is_linear

ADAPTER = "default"  # PEFT's name for the only adapter


@dataclass(frozen=True)
class TrainContext:
    """What a method works on.

    form: how the model is asked, and where its answers end. start: the adapter that a second stage starts from; it fits the
    model. sizes: training rows of each task.
    keep: whether the model must be given back with its own weights.
    """

    model: PreTrainedModel
    form: PromptFormat
    settings: TrainSettings
    start: SparseAdapter | None
    sizes: Sequence[int]
    data_fingerprint: str
    keep: bool


@dataclass(frozen=True)
class TrainableModel:
    """A model that can be trained.

    module: what the Trainer trains. write: writes what was trained into a directory, given its metadata, and returns it if
    it is a sparse adapter. autocast: the dtype to compute in, where it is not that of the weights.
    """

    module: nn.Module
    write: Callable[[Path, Mapping[str, Any]], SparseAdapter | None]
    callbacks: Sequence[TrainerCallback] = ()
    autocast: torch.dtype | None = None


@contextlib.contextmanager
def sparse(context: TrainContext) -> Iterator[TrainableModel]:
    """A sparse expert. In a second stage the entries of the first are trained on, with no selection."""
    schedule = MaskSchedule(rows=_balanced(context) if len(context.sizes) > 1 else None)
    wrapped = _wrapped(context.model, sparse_config(context))
    try:
        if context.start is not None:
            load_initial_adapter(wrapped, context.start)

        def write(directory: Path, metadata: Mapping[str, Any]) -> SparseAdapter:
            adapter = to_adapter(wrapped, metadata=metadata)
            if context.start is not None:  # the settings say nothing of how these masks were chosen, but the first stage does
                own = {
                    "task_type": adapter.metadata.task_type,
                    "data_fingerprint": adapter.metadata.data_fingerprint,
                    "versions": adapter.metadata.versions,
                }
                first_stage = replace(context.start.metadata, merge=None, nulls=context.start.metadata.nulls - {"merge"})
                adapter = SparseAdapter(adapter, first_stage.with_fields({**own, **metadata}), adapter.fingerprints)
            adapter.save(directory)
            return adapter

        yield TrainableModel(wrapped, write, [schedule])
    finally:
        wrapped.unload()


@contextlib.contextmanager
def lora(context: TrainContext) -> Iterator[TrainableModel]:
    """PEFT's LoRA on the targets, `ΔW = alpha / rank · BA` (Hu et al. 2021); a directory that PEFT loads."""
    settings = context.settings
    targets = find_targets(context.model, settings)
    config = LoraConfig(
        task_type=_task_type(context.model),
        r=settings.lora_rank,
        lora_alpha=cast(int, settings.lora_rank if settings.lora_alpha is None else settings.lora_alpha),
        lora_dropout=0.0,
        fan_in_fan_out=isinstance(context.model.get_submodule(targets[0]), Conv1D),
        target_modules=_choice(context.model, settings).target_modules,
        exclude_modules=list(settings.exclude_modules) or None,
        layers_to_transform=list(settings.layers) or None,
    )
    wrapped = _wrapped(context.model, config)

    def write(directory: Path, metadata: Mapping[str, Any]) -> None:
        # Not PEFT's `save_pretrained`: it orders names by the process's hash seed, and may ask the hub.
        saved = {**config.to_dict(), "inference_mode": True}
        saved["base_model_name_or_path"] = metadata["base_model_name_or_path"]
        write_json(directory / CONFIG_FILE, {k: sorted(v) if isinstance(v, set) else v for k, v in saved.items()})
        state = get_peft_model_state_dict(wrapped, save_embedding_layers=False)
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
        _require_finite(tensors)
        with atomic_write(directory / WEIGHTS_FILE) as file:
            file.write(safetensors.torch.save(tensors, {"format": "pt"}))

    try:
        yield TrainableModel(wrapped, write)
    finally:
        wrapped.unload()


@contextlib.contextmanager
def full(context: TrainContext) -> Iterator[TrainableModel]:
    """All weights, of W + ΔW in a second stage; a checkpoint, in float32.

    Its generation settings know the token that answers were taught to end with.
    """
    weights = {name: p for name, p in context.model.named_parameters() if p.is_floating_point()}
    with _trained(context, weights, context.keep) as (_, autocast):
        dtype, generation = context.model.config.dtype, context.model.generation_config
        own = [] if generation is None else end_tokens(generation)

        def write(directory: Path, metadata: Mapping[str, Any]) -> None:
            _require_finite(weights)
            try:
                if generation is not None and context.form.end not in own:
                    context.model.generation_config = copy.deepcopy(generation)
                    context.model.generation_config.eos_token_id = sorted(context.form.ends)
                context.model.save_pretrained(directory)
                context.form.tokenizer.save_pretrained(directory)
            finally:
                context.model.generation_config = generation
                context.model.config.dtype = dtype  # saving sets it to that of the trained weights

        yield TrainableModel(context.model, write, autocast=autocast)


@contextlib.contextmanager
def full_qkv(context: TrainContext) -> Iterator[TrainableModel]:
    """All entries of the targets, of W + ΔW in a second stage; a sparse adapter of density 1, relative to the base model."""
    weights = {name: _weight(context.model, name) for name in find_targets(context.model, context.settings)}
    refuse_shared(Names(context.model), weights, f"method {context.settings.method}")
    with _trained(context, {f"{name}.weight": weight for name, weight in weights.items()}, keep=True) as (before, autocast):

        def write(directory: Path, metadata: Mapping[str, Any]) -> SparseAdapter:
            deltas, fingerprints = dict(context.start or {}), dict(context.start.fingerprints if context.start else {})
            for name, weight in weights.items():
                base = before[f"{name}.weight"]
                fingerprints[name] = fingerprint_weight(base)
                deltas[name] = _all_entries((weight.detach() - base.to(weight)).cpu())
            described = {
                "task_type": _task_type(context.model).value,
                "target_modules": sorted(deltas),
                "inference_mode": True,
                "seed": context.settings.seed,
                "data_fingerprint": context.data_fingerprint,
                "versions": versions(),
            }
            adapter = SparseAdapter(deltas, {**described, **metadata}, fingerprints)
            adapter.save(directory)
            return adapter

        yield TrainableModel(context.model, write, autocast=autocast)


TRAIN_METHODS: dict[str, Callable[[TrainContext], AbstractContextManager[TrainableModel]]] = {
    "sparse": sparse,
    "lora": lora,
    "full": full,
    "full-qkv": full_qkv,
    "multitask": full,
}


def sparse_config(context: TrainContext) -> SparseletConfig:
    """The tuner's configuration that a job asks for."""
    settings, start = context.settings, context.start
    config = SparseletConfig(
        task_type=_task_type(context.model),
        **selection_values(settings),
        target_modules=list(settings.target_modules) or None,
        exclude_modules=list(settings.exclude_modules) or None,
        layers_to_transform=list(settings.layers) or None,
        data_fingerprint=context.data_fingerprint,
    )
    if start is not None:  # as of a saved adapter: these targets, no selection
        config.targets = {name: {"shape": list(delta.shape)} for name, delta in start.items()}
        config.target_modules = sorted(start)
    return config


def _choice(model: nn.Module, settings: TrainSettings) -> SparseletConfig:
    """A configuration with the settings' choice of layers, the defaults filled in."""
    choice = SparseletConfig(
        target_modules=list(settings.target_modules) or None,
        exclude_modules=list(settings.exclude_modules) or None,
        layers_to_transform=list(settings.layers) or None,
    )
    choice.target_modules = choice.target_modules or default_targets(model, choice)
    return choice


def find_targets(model: nn.Module, settings: TrainSettings) -> list[str]:
    """The names of the layers that the settings choose, by the rules of PEFT's configurations.

    Raises NoTargets, and ArgumentError for a layer that is not linear.
    """
    chosen = _choice(model, settings)
    found = {name: module for name, module in model.named_modules() if check_target_module_exists(chosen, name)}
    for name, module in found.items():
        if not is_linear(module):
            raise ArgumentError(f"{name} is a {type(module).__name__}; only nn.Linear and Conv1D can be targets.")
    if not found:
        raise NoTargets(
            f"no layer is chosen by target_modules {chosen.target_modules}, exclude_modules {chosen.exclude_modules} and "
            f"layers {chosen.layers_to_transform}. The model's linear layers are: {describe_linear_layers(model)}."
        )
    return list(found)


@contextlib.contextmanager
def _trained(
    context: TrainContext, parameters: Mapping[str, nn.Parameter], keep: bool
) -> Iterator[tuple[dict[str, Tensor], torch.dtype | None]]:
    """Within the block these parameters require gradients, in float32 at least, and no other; a start is added to them.

    Yields the tensors they held before (if they are kept: the model gets them back then), and the dtype to compute in:
    that of a 16-bit base, of which a small step of training would be lost in the weights themselves.
    Raises ConfigError for a float16 base.
    """
    model, changed = context.model, dict(parameters)
    for name in context.start or {}:
        changed.setdefault(f"{name}.weight", _weight(model, name))
    narrow = {p.dtype for p in parameters.values() if p.dtype in (torch.float16, torch.bfloat16)}
    if torch.float16 in narrow:
        raise ConfigError(
            f"the base model is in float16, which loses gradients of method {context.settings.method}; load bfloat16."
        )
    before = {name: p.data for name, p in changed.items()} if keep else {}
    try:
        for name, p in changed.items():
            wide = torch.promote_types(p.dtype, torch.float32) if name in parameters else p.dtype
            p.data = p.data.to(wide, copy=keep)
        for name, delta in (context.start or {}).items():
            weight = _weight(model, name).data
            delta = delta.to(weight.device)
            entries = kernels.gather(weight, delta.indices, delta.block_size)
            kernels.write(weight, delta.indices, add(entries, delta.values), delta.block_size)
        trained = {id(p) for p in parameters.values()}
        for p in model.parameters():
            p.requires_grad_(id(p) in trained)
        yield before, torch.bfloat16 if narrow else None
    finally:
        for name, tensor in before.items():
            changed[name].grad = None
            changed[name].data = tensor.to(changed[name].device)


def _wrapped(model: PreTrainedModel, config: PeftConfig) -> Any:
    """`get_peft_model`, without the warning that PEFT draws from transformers by asking for checkpointing's former name."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
        return get_peft_model(model, config)


def load_initial_adapter(wrapped: nn.Module, start: SparseAdapter) -> None:
    """Give every layer its mask and values of `start`, to be trained as they are."""
    for name, layer in sparselet_layers(wrapped).items():
        layer.set_mask(ADAPTER, start[name].indices, start[name].values, start[name].block_size)
        layer.sparse_mask[ADAPTER].selections = 1


def _balanced(context: TrainContext) -> Callable[[int], Sequence[int]]:
    return lambda step: balanced_rows(context.sizes, context.settings.seed, step)


def _all_entries(dense: Tensor) -> SparseDelta:
    return SparseDelta.from_dense(dense, torch.ones(dense.shape, dtype=torch.bool))


def _require_finite(tensors: Mapping[str, Tensor]) -> None:
    """Raise TrainingDiverged if a trained tensor holds NaN or infinity."""
    for name, tensor in tensors.items():
        if not kernels.all_finite(tensor.detach()):
            raise TrainingDiverged(
                f"{name} holds NaN or infinity after training; nothing was written. Lower the learning rate."
            )


def _weight(model: nn.Module, name: str) -> nn.Parameter:
    return cast(nn.Parameter, model.get_submodule(name).weight)


def _task_type(model: Any) -> TaskType:
    return TaskType.SEQ_2_SEQ_LM if model.config.is_encoder_decoder else TaskType.CAUSAL_LM
