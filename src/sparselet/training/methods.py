"""The methods of `train`: the sparse expert and the paper's baselines.

A method is a context manager and a line in TRAIN_METHODS. Within the block the model can be trained; after it, the model is
as it was before.
"""

import contextlib
import copy
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, cast

import safetensors.torch
import torch
from peft import LoraConfig, PeftConfig, ShiraConfig, SupertuningConfig, TaskType, get_peft_model, get_peft_model_state_dict
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
from sparselet.selection_settings import SelectionSettings
from sparselet.training.freezing import freeze_layers, freeze_weights
from sparselet.training.merge_noise import MergeNoise
from sparselet.training.sampling import balanced_rows
from sparselet.training.schedule import MaskSchedule
from sparselet.tuner import SparseletConfig, sparselet_layers, to_adapter
from sparselet.tuner.model import versions
from sparselet.tuner.targets import describe_linear_layers, is_linear, with_named_targets

ADAPTER = "default"  # PEFT's name for the only adapter
FAST_SLOW = "fast-slow"  # the method of `workflows.fast_slow`


@dataclass(frozen=True)
class TrainContext:
    """What a method trains.

    form: the prompt format. config: the settings of masks and targets, seed and data fingerprint. initial: the adapter that a
    second stage starts from; it fits the model. sizes: training rows of each task. keep: the model must have its own weights
    again afterwards. frozen: by target, flat entries that stay as they are.
    """

    model: PreTrainedModel
    form: PromptFormat
    config: SparseletConfig
    initial: SparseAdapter | None
    sizes: Sequence[int]
    keep: bool
    frozen: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class TrainableModel:
    """A model that can be trained.

    module: what the Trainer trains. write: writes the result into a directory, given its metadata, and returns it if it is a
    sparse adapter. autocast: the dtype to compute in, if it differs from that of the weights.
    """

    module: nn.Module
    write: Callable[[Path, Mapping[str, Any]], SparseAdapter | None]
    callbacks: Sequence[TrainerCallback] = ()
    autocast: torch.dtype | None = None


@dataclass(frozen=True)
class TrainMethod:
    """One training method.

    prepare: a context manager that takes a TrainContext, and the settings `parameters` by keyword.
    trains, writes: descriptions, for help and documentation.
    settings: the settings of TrainSettings that this method takes and some other does not.
    initial: what a second stage trains: the entries of the initial adapter, weights of the model with the adapter added, or
        nothing, where the method cannot start from an adapter.
    min_tasks: the smallest number of tasks. float16: whether the base model may be in float16.
    """

    prepare: Callable[..., AbstractContextManager[TrainableModel]]
    trains: str
    writes: str
    settings: tuple[str, ...] = ()
    parameters: tuple[str, ...] = ()
    initial: Literal["entries", "weights"] | None = "weights"
    min_tasks: int = 1
    float16: bool = False


@contextlib.contextmanager
def sparse(context: TrainContext, merge_noise: int) -> Iterator[TrainableModel]:
    """A sparse expert. A second stage trains the entries of the initial adapter, without selection."""
    config, initial = copy.copy(context.config), context.initial
    if initial is not None:  # as of a saved adapter: these targets, no selection
        config.targets = {name: {"shape": list(delta.shape)} for name, delta in initial.items()}
        config.target_modules = sorted(initial)

    def epoch_rows(step: int) -> Sequence[int]:
        return balanced_rows(context.sizes, config.seed, step)

    schedule = MaskSchedule(rows=epoch_rows if len(context.sizes) > 1 else None)
    noise = MergeNoise(merge_noise, config.seed) if merge_noise else None
    wrapped = _wrap(context.model, config)
    try:
        if initial is not None:
            load_initial_adapter(wrapped, initial)
        callbacks: list[TrainerCallback] = [schedule, noise] if noise else [schedule]
        if context.frozen:
            callbacks.append(freeze_layers(sparselet_layers(wrapped), ADAPTER, context.frozen))

        def write(directory: Path, metadata: Mapping[str, Any]) -> SparseAdapter:
            adapter = to_adapter(wrapped, metadata=metadata)
            if initial is not None:  # the first stage selected the masks, so its selection settings are recorded
                recorded = {key: vars(adapter.metadata)[key] for key in ("task_type", "data_fingerprint", "versions")}
                first_stage = replace(initial.metadata, merge=None, prompt=None, nulls=initial.metadata.nulls - {"merge"})
                adapter = SparseAdapter(adapter, first_stage.with_fields({**recorded, **metadata}), adapter.fingerprints)
            adapter.save(directory)
            return adapter

        yield TrainableModel(wrapped, write, callbacks)
    finally:
        if noise:
            noise.restore()
        wrapped.unload()


def lora(context: TrainContext, lora_rank: int, lora_alpha: float | None) -> AbstractContextManager[TrainableModel]:
    """PEFT's LoRA on the targets, `ΔW = alpha / rank · BA` (Hu et al. 2021); a directory that PEFT loads."""
    targets, config = find_targets(context.model, context.config), context.config
    adapter = LoraConfig(
        task_type=config.task_type,
        r=lora_rank,
        lora_alpha=cast(int, lora_rank if lora_alpha is None else lora_alpha),
        lora_dropout=0.0,
        fan_in_fan_out=isinstance(context.model.get_submodule(targets[0]), Conv1D),
        target_modules=with_named_targets(context.model, config).target_modules,
        exclude_modules=config.exclude_modules,
        layers_to_transform=config.layers_to_transform,
    )
    return _peft_adapter(context, adapter)


def shira(context: TrainContext, lora_rank: int) -> AbstractContextManager[TrainableModel]:
    """PEFT's SHiRA (Bhardwaj et al. 2024): rank · (rows + columns) random entries of each target, as many as LoRA's numbers."""
    names, config = find_targets(context.model, context.config), context.config
    adapter = ShiraConfig(task_type=config.task_type, r=lora_rank, random_seed=config.seed, target_modules=names)
    return _peft_adapter(context, adapter)


def super_tuning(context: TrainContext, density: float) -> AbstractContextManager[TrainableModel]:
    """PEFT's Super-Tuning (arXiv 2607.09287): the entries of each target whose base weights are largest."""
    names, config = find_targets(context.model, context.config), context.config
    return _peft_adapter(context, SupertuningConfig(task_type=config.task_type, sparsity=1 - density, target_modules=names))


@contextlib.contextmanager
def _peft_adapter(context: TrainContext, adapter: PeftConfig) -> Iterator[TrainableModel]:
    """An adapter of PEFT by its configuration; a directory that PEFT loads."""
    wrapped = _wrap(context.model, adapter)

    def write(directory: Path, metadata: Mapping[str, Any]) -> None:
        # PEFT's `save_pretrained` orders names by the process's hash seed, and may send requests to the hub.
        content = {**adapter.to_dict(), "inference_mode": True}
        content["base_model_name_or_path"] = metadata["base_model_name_or_path"]
        write_json(directory / CONFIG_FILE, {k: sorted(v) if isinstance(v, set) else v for k, v in content.items()})
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

    Its generation settings include the end token of training.
    """
    model, form = context.model, context.form
    weights = {name: p for name, p in model.named_parameters() if p.is_floating_point()}
    with (
        _trainable_weights(context, weights, context.keep) as (_, autocast),
        freeze_weights(context.frozen, weights) as frozen,
    ):
        dtype, generation = model.config.dtype, model.generation_config

        def write(directory: Path, metadata: Mapping[str, Any]) -> None:
            _require_finite(weights)
            try:
                if generation is not None and form.end not in end_tokens(generation):
                    model.generation_config = copy.deepcopy(generation)
                    model.generation_config.eos_token_id = sorted(form.ends)
                model.save_pretrained(directory)
                form.tokenizer.save_pretrained(directory)
            finally:
                model.generation_config = generation
                model.config.dtype = dtype  # saving sets it to that of the trained weights

        yield TrainableModel(model, write, [frozen], autocast)


@contextlib.contextmanager
def full_qkv(context: TrainContext) -> Iterator[TrainableModel]:
    """All entries of the targets, of W + ΔW in a second stage; a sparse adapter of density 1, relative to the base model."""
    model, config, initial = context.model, context.config, context.initial
    weights = {name: _weight(model, name) for name in find_targets(model, config)}
    refuse_shared(Names(model), weights, "method full-qkv")
    parameters = {f"{name}.weight": weight for name, weight in weights.items()}
    with (
        _trainable_weights(context, parameters, keep=True) as (before, autocast),
        freeze_weights(context.frozen, parameters) as frozen,
    ):

        def write(directory: Path, metadata: Mapping[str, Any]) -> SparseAdapter:
            deltas, fingerprints = dict(initial or {}), dict(initial.fingerprints if initial else {})
            for name, weight in weights.items():
                base = before[f"{name}.weight"]
                fingerprints[name] = fingerprint_weight(base)
                difference = (weight.detach() - base.to(weight)).cpu()
                if name in context.frozen:  # not rounded by adding and subtracting W
                    start = initial[name].to_dense() if initial and name in initial else torch.zeros_like(difference)
                    entries = context.frozen[name]
                    difference.view(-1)[entries] = start.view(-1)[entries].to(difference.dtype)
                deltas[name] = SparseDelta.from_dense(difference, torch.ones(difference.shape, dtype=torch.bool))
            fields = {
                "task_type": cast(TaskType, config.task_type).value,
                "target_modules": sorted(deltas),
                "inference_mode": True,
                "seed": config.seed,
                "data_fingerprint": config.data_fingerprint,
                "versions": versions(),
            }
            adapter = SparseAdapter(deltas, {**fields, **metadata}, fingerprints)
            adapter.save(directory)
            return adapter

        yield TrainableModel(model, write, [frozen], autocast)


def fast_slow(context: TrainContext) -> AbstractContextManager[TrainableModel]:
    """Raises ConfigError: prompts are not improved by a Trainer alone."""
    raise ConfigError(f"method {FAST_SLOW} is run by `sparselet.train`, and not as a step of other work.")


SELECTION = tuple(field.name for field in fields(SelectionSettings) if field.name != "seed")
TARGETS = ("target_modules", "exclude_modules", "layers")
LORA = ("lora_rank", "lora_alpha")

TRAIN_METHODS: dict[str, TrainMethod] = {
    "sparse": TrainMethod(
        sparse,
        "the masked entries of the targets",
        "a sparse adapter",
        settings=(*SELECTION, *TARGETS, "entries", "merge_noise", "freeze"),
        parameters=("merge_noise",),
        initial="entries",
        float16=True,
    ),
    "lora": TrainMethod(
        lora,
        "PEFT's LoRA on the targets",
        "a directory that PEFT loads",
        settings=(*TARGETS, *LORA),
        parameters=LORA,
        initial=None,
        float16=True,
    ),
    "shira": TrainMethod(
        shira,
        "PEFT's SHiRA, as many random entries as a LoRA has numbers",
        "a directory that PEFT loads",
        settings=(*TARGETS, "lora_rank"),
        parameters=("lora_rank",),
        initial=None,
    ),
    "super-tuning": TrainMethod(
        super_tuning,
        "PEFT's Super-Tuning, the entries of the largest base weights",
        "a directory that PEFT loads",
        settings=(*TARGETS, "density"),
        parameters=("density",),
        initial=None,
    ),
    "full": TrainMethod(full, "all weights", "a checkpoint in float32", settings=("freeze",)),
    "full-qkv": TrainMethod(
        full_qkv, "all entries of the targets", "a sparse adapter of density 1", settings=(*TARGETS, "freeze")
    ),
    FAST_SLOW: TrainMethod(
        fast_slow,
        "the masked entries by reward, and a prompt for them",
        "a sparse adapter with its prompt",
        settings=(*SELECTION, *TARGETS, "entries"),
        initial=None,
    ),
    "multitask": TrainMethod(
        full, "all weights, on several tasks", "a checkpoint in float32", settings=("freeze",), min_tasks=2
    ),
}


def find_targets(model: nn.Module, config: SparseletConfig) -> list[str]:
    """The names of the layers that a configuration chooses, by the rules of PEFT.

    Raises NoTargets, and ArgumentError for a layer that is not linear.
    """
    config = with_named_targets(model, config)
    targets = {name: module for name, module in model.named_modules() if check_target_module_exists(config, name)}
    for name, module in targets.items():
        if not is_linear(module):
            raise ArgumentError(f"{name} is a {type(module).__name__}; only nn.Linear and Conv1D can be targets.")
    if not targets:
        raise NoTargets(
            f"no layer is chosen by target_modules {config.target_modules}, exclude_modules {config.exclude_modules} and "
            f"layers {config.layers_to_transform}. The model's linear layers are: {describe_linear_layers(model)}."
        )
    return list(targets)


@contextlib.contextmanager
def _trainable_weights(
    context: TrainContext, parameters: Mapping[str, nn.Parameter], keep: bool
) -> Iterator[tuple[dict[str, Tensor], torch.dtype | None]]:
    """Within the block these parameters alone require gradients, in float32 at least; the initial adapter is added to them.

    Yields the tensors they held before, if `keep`: the model has them again after the block; and the dtype to compute in,
    bfloat16 for a base in it, whose own precision loses small steps. Raises ConfigError for a float16 base.
    """
    model, initial = context.model, context.initial or {}
    changed = {**{f"{name}.weight": _weight(model, name) for name in initial}, **parameters}
    narrow = {p.dtype for p in parameters.values() if p.dtype in (torch.float16, torch.bfloat16)}
    if torch.float16 in narrow:
        raise ConfigError("the base model is in float16, in which full weights lose gradients; load it in bfloat16.")
    before = {name: p.data for name, p in changed.items()} if keep else {}
    try:
        for name, p in changed.items():
            dtype = torch.promote_types(p.dtype, torch.float32) if name in parameters else p.dtype
            p.data = p.data.to(dtype, copy=keep)
        for name, delta in initial.items():
            weight = _weight(model, name).data
            delta = delta.to(weight.device)
            entries = kernels.gather(weight, delta.indices, delta.block)
            kernels.write(weight, delta.indices, add(entries, delta.values))
        trained = {id(p) for p in parameters.values()}
        for p in model.parameters():
            p.requires_grad_(id(p) in trained)
        yield before, torch.bfloat16 if narrow else None
    finally:
        for name, tensor in before.items():
            changed[name].grad = None
            changed[name].data = tensor.to(changed[name].device)


def _wrap(model: PreTrainedModel, config: PeftConfig) -> Any:
    """`get_peft_model`, without the warning of transformers about a former name that PEFT reads."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
        return get_peft_model(model, config)


def load_initial_adapter(wrapped: nn.Module, initial: SparseAdapter) -> None:
    """Set the mask and values of each layer to those of `initial`, without a selection phase."""
    for name, layer in sparselet_layers(wrapped).items():
        layer.set_mask(ADAPTER, initial[name].indices, initial[name].values)
        layer.sparse_mask[ADAPTER].selections = 1


def _require_finite(tensors: Mapping[str, Tensor]) -> None:
    """Raise TrainingDiverged if a trained tensor holds NaN or infinity."""
    for name, tensor in tensors.items():
        if not kernels.all_finite(tensor.detach()):
            raise TrainingDiverged(
                f"{name} holds NaN or infinity after training; nothing was written. Lower the learning rate."
            )


def _weight(model: nn.Module, name: str) -> nn.Parameter:
    return cast(nn.Parameter, model.get_submodule(name).weight)
