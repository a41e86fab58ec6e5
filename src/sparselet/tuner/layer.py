"""One target with its adapters: their values live in the base layer's own weight.

The base layer's weight holds W + Ŵ·M of the active adapters, and the entries they displaced are kept, so that switching
restores the base model bit for bit. The forward pass is the base layer's own. The backward pass yields ∂L/∂x as always
and ∂L/∂Ŵ at the masked entries only.
"""

import functools
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from sparselet import kernels
from sparselet.delta import SparseDelta, check_block_size, index_dtype
from sparselet.errors import NonFiniteValue, SelectionError, ShapeMismatch
from sparselet.fingerprint import fingerprint_weight
from sparselet.masks import units_to_keep
from sparselet.tuner.config import SparseletConfig
from sparselet.tuner.gradient import with_masked_gradient

Recorder = Callable[["SparseletLayer", Tensor], None]


@dataclass
class MaskState:
    """What is known of one adapter's mask on one target, beside its indices.

    dense: no mask yet, all entries are trained; the parameter then has the weight's shape.
    selecting: the selection phase has not ended.
    pending: Ŵ of all entries, float32 [rows, columns], while off-mask values may still return; else None.
    selections: how often the mask was selected.
    """

    block_size: int
    dense: bool
    selecting: bool
    pending: Tensor | None = None
    selections: int = 0


@dataclass
class Resident:
    """The adapters whose values stand in the weight now, and what is needed to take them out.

    values: their parameters, with the version that was written. units: the written units, None for all.
    places: where each adapter's values lie in `units`, None where there is one adapter. displaced: the base's entries.
    """

    names: tuple[str, ...]
    values: tuple[nn.Parameter, ...]
    versions: tuple[int, ...]
    units: Tensor | None
    block_size: int
    places: tuple[Tensor, ...] | None
    displaced: Tensor


class SparseletLayer(nn.Module, BaseTunerLayer):
    """A linear base layer with any number of sparse adapters.

    sparse_values: the trained Ŵ, one parameter an adapter: [n], or [n, B, B] for tiles, or the weight's shape while no
        mask is selected. float32 over a base of 16 or 32 bits, float64 over one of 64.
    sparse_indices: the masks as unit ids, int32 [n]; empty while no mask is selected.

    Input [..., in], output [..., out]. The weight is changed in place; the base layer is not copied.
    """

    adapter_layer_names = ("sparse_values",)
    other_param_names = ("sparse_indices", "sparse_mask", "sparse_config")

    def __init__(self, base_layer: nn.Module, target_name: str) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.target_name = target_name
        self.transposed = isinstance(base_layer, Conv1D)
        weight = self.base_weight
        if not weight.is_contiguous():
            raise ShapeMismatch(f"{target_name}: the weight is not contiguous in memory, so it cannot be changed in place.")
        self.shape: tuple[int, int] = (weight.shape[0], weight.shape[1])
        self.in_features, self.out_features = self.shape if self.transposed else self.shape[::-1]
        self.sparse_values = nn.ParameterDict({})
        self.sparse_indices = cast("dict[str, Tensor]", BufferDict({}, persistent=True))
        self.sparse_mask: dict[str, MaskState] = {}
        self.sparse_config: dict[str, SparseletConfig] = {}
        self.recorder: Recorder | None = None
        self.calls = 0
        self.merged_adapters: list[str] = []
        self._disable_adapters = False
        self._active_adapter: str | list[str] = []
        self._resident: Resident | None = None
        self._fingerprint: dict[str, str] | None = None

    @property
    def base_weight(self) -> nn.Parameter:
        """The base layer's weight as it stands in memory, with whatever is written into it."""
        return cast(nn.Parameter, self.get_base_layer().weight)

    # Adapters

    def add_adapter(self, name: str, config: SparseletConfig) -> None:
        """Make room for an adapter; its mask is chosen by `config.initial_mask`. Raises BlockSizeError."""
        weight = self.base_weight
        loaded = config.targets is not None
        if not loaded:
            check_block_size(config.block_size, self.shape, self.target_name)
        dense = config.initial_mask == "dense" and not loaded
        state = MaskState(1 if loaded else config.block_size, dense, selecting=not loaded)  # the file tells, once read
        units = torch.empty(0, dtype=index_dtype(weight.numel()), device=weight.device)
        values = torch.zeros(self.shape if dense else (0,), dtype=self._values_dtype(), device=weight.device)
        self.sparse_mask[name] = state
        self.sparse_config[name] = config
        self.sparse_indices[name] = units
        self.sparse_values[name] = nn.Parameter(values)
        if not dense and not loaded:
            total = weight.numel() // config.block_size**2
            count = units_to_keep(config.density, total)
            if config.initial_mask == "random":
                # Drawn on the CPU, so that the mask is the same on every device.
                chosen = (
                    torch.rand(total, generator=seeded(config.seed, config.data_fingerprint, self.target_name))
                    .topk(count)
                    .indices.sort()
                    .values
                )
                self.set_mask(name, chosen.to(weight.device))
                state.selections = 1
            else:
                self.set_mask(name, torch.arange(count, device=weight.device))

    def set_mask(self, name: str, units: Tensor, values: Tensor | None = None, block_size: int | None = None) -> None:
        """Give an adapter a new mask, ascending unit ids [n], with `values` [n] or [n, B, B] (default: zeros).

        The parameter keeps its identity and changes its shape, so that optimizers and schedulers still hold it; its
        gradient is dropped.
        """
        state, parameter = self.sparse_mask[name], self.sparse_values[name]
        state.block_size = block_size or state.block_size
        tile = (state.block_size, state.block_size) if state.block_size > 1 else ()
        if values is None:
            values = torch.zeros((len(units), *tile), dtype=parameter.dtype)
        device = self.base_weight.device
        self.restore()
        if parameter.is_meta:  # injected with low_cpu_mem_usage
            parameter = nn.Parameter(torch.empty(0, dtype=parameter.dtype), requires_grad=parameter.requires_grad)
            self.sparse_values[name] = parameter
        state.dense = False
        self.sparse_indices[name] = units.to(
            device=device, dtype=index_dtype(self.shape[0] * self.shape[1] // state.block_size**2)
        )
        _reshape_parameter(parameter, values.to(device=device, dtype=parameter.dtype))
        self.refresh()

    def set_dense(self, name: str, values: Tensor) -> None:
        """Let an adapter train all entries, from `values` [rows, columns], as before its first selection."""
        parameter = self.sparse_values[name]
        self.restore()
        self.sparse_mask[name].dense = True
        self.sparse_indices[name] = torch.empty(0, dtype=torch.int32, device=parameter.device)
        _reshape_parameter(parameter, values.to(device=self.base_weight.device, dtype=parameter.dtype))
        self.refresh()

    def delta(self, name: str) -> SparseDelta:
        """An adapter's present change of this target, on the CPU; all entries while no mask is selected."""
        state, values = self.sparse_mask[name], self.sparse_values[name].detach().cpu()
        if not state.dense:
            block = state.block_size if values.ndim == 3 else 1
            return SparseDelta(self.shape, self.sparse_indices[name].cpu(), values, block)
        return SparseDelta.from_dense(values, torch.ones(self.shape, dtype=torch.bool), state.block_size)

    def dense_values(self, name: str) -> Tensor:
        """Ŵ of all entries as a new tensor [rows, columns], off-mask values included while they are kept."""
        state, values = self.sparse_mask[name], self.sparse_values[name].detach()
        if state.dense:
            return values.clone()
        if state.pending is None:
            full = torch.zeros(self.shape, dtype=values.dtype, device=values.device)
        else:
            full = state.pending.to(values.device, copy=True)
        kernels.write(full, self.sparse_indices[name], values, state.block_size)
        return full

    def base_fingerprint(self) -> dict[str, str]:
        """The fingerprint of the base weight, whatever is resident."""
        if self._fingerprint is None:
            self.restore()
            self._fingerprint = fingerprint_weight(self.base_weight)
            self.refresh()
        return self._fingerprint

    # Residence

    def refresh(self, force: bool = False) -> None:
        """Bring the weight up to date: base plus the values of the active adapters, or of the merged ones.

        Does nothing when the parameters' version counters say that it is; `force` writes all the same, for optimizers
        that change parameters behind autograd's back.
        """
        weight = self.base_weight
        if weight.is_meta or any(self.sparse_values[name].is_meta for name in self._wanted()):
            return
        names = self._wanted()
        values = tuple(self.sparse_values[name] for name in names)
        resident = self._resident
        current = resident is not None and resident.names == names and _same_objects(resident.values, values)
        if not names and resident is None:
            return
        if not current:
            if is_sharded(weight):
                raise SelectionError(
                    f"{self.target_name}: the weight is a DTensor, of which each process holds a part, so it cannot be changed "
                    "in place. Train with DistributedDataParallel instead of FSDP2 or tensor parallelism."
                )
            self.restore()
            if not names:
                return
            resident = self._resident = self._displace(names, values)
        assert resident is not None
        versions = tuple(_version(value) for value in values)
        if versions == resident.versions and current and not force:
            return
        self._write(resident)
        resident.versions = versions

    def restore(self) -> None:
        """Put the displaced base entries back, bit for bit; no adapter is resident then."""
        resident, self._resident = self._resident, None
        if resident is None:
            return
        with torch.no_grad():
            weight = self.base_weight
            if resident.units is None:
                weight.copy_(resident.displaced)
            else:
                kernels.write(weight, resident.units, resident.displaced, resident.block_size)

    def show_dense(self, name: str) -> None:
        """Write W + Ŵ with no mask into the weight, for scoring. `restore` takes it out again."""
        self.restore()
        weight = self.base_weight
        with torch.no_grad():
            values = nn.Parameter(self.dense_values(name), requires_grad=False)
            self._resident = Resident((name,), (values,), (), None, 1, None, weight.detach().clone())
            self._write(self._resident)
            # The parameter itself, so that a forward pass finds its adapter resident and leaves the weight alone.
            self._resident.values = (self.sparse_values[name],)
            self._resident.versions = (_version(self.sparse_values[name]),)

    def _wanted(self) -> tuple[str, ...]:
        if self.merged_adapters:
            return tuple(self.merged_adapters)
        if self._disable_adapters:
            return ()
        return tuple(name for name in self.active_adapters if name in self.sparse_values)

    def _displace(self, names: tuple[str, ...], values: tuple[nn.Parameter, ...]) -> Resident:
        weight = self.base_weight.detach()
        if self._fingerprint is None:
            self._fingerprint = fingerprint_weight(weight)
        states = [self.sparse_mask[name] for name in names]
        if any(state.dense for state in states):
            return Resident(names, values, (), None, 1, None, weight.clone())
        if len(names) == 1:
            units, block = self.sparse_indices[names[0]], states[0].block_size
            return Resident(names, values, (), units, block, None, kernels.gather(weight, units, block))
        entries = [self._entries(name) for name in names]
        union = torch.unique(torch.cat([e.reshape(-1) for e in entries]))
        places = tuple(torch.searchsorted(union, e.reshape(-1)) for e in entries)
        union = union.to(index_dtype(weight.numel()))
        return Resident(names, values, (), union, 1, places, kernels.gather(weight, union))

    @torch.no_grad()
    def _write(self, resident: Resident) -> None:
        weight = self.base_weight
        first = resident.values[0]
        if resident.units is not None and resident.places is None:
            kernels.add_and_write(weight, resident.units, resident.displaced, first, resident.block_size)
            return
        total = resident.displaced.to(torch.promote_types(weight.dtype, first.dtype), copy=True)
        if resident.units is None:
            for name, value in zip(resident.names, resident.values, strict=True):
                if value.shape == total.shape:
                    total += value
                else:
                    total.view(-1).index_add_(0, self._entries(name).reshape(-1), value.reshape(-1).to(total.dtype))
            weight.copy_(total)
            return
        assert resident.places is not None
        for value, place in zip(resident.values, resident.places, strict=True):
            total.index_add_(0, place, value.reshape(-1).to(total.dtype))
        kernels.write(weight, resident.units, total, resident.block_size)

    def _entries(self, name: str) -> Tensor:
        block = self.sparse_mask[name].block_size
        units = self.sparse_indices[name].long()
        return units if block == 1 else kernels.tile_entries(units, self.shape, block)

    def _values_dtype(self) -> torch.dtype:
        return torch.promote_types(self.base_weight.dtype, torch.float32)

    # What PEFT and torch call

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The base layer's own forward pass; the trained adapters' gradients are taken on the way back."""
        if not torch.compiler.is_compiling():  # compiled code relies on the refresh after every optimizer step
            self.refresh()
        y = self.base_layer(x, *args, **kwargs)
        if self.recorder is not None:
            self.calls += 1
        if not torch.is_grad_enabled() or self._disable_adapters or self.merged_adapters:
            return y
        # A target without entries, such as one that layer drop left out, keeps no activation for its gradient.
        trained = tuple(
            name
            for name in self._wanted()
            if self.sparse_values[name].requires_grad and (self.sparse_values[name].numel() or self.recorder is not None)
        )
        if not trained:
            return y
        for name in trained:
            state = self.sparse_mask[name]
            if state.selecting and not state.dense and state.selections == 0 and self.recorder is None:
                raise SelectionError(
                    f"{self.target_name}: the mask has not been selected. With initial_mask='gradient' call "
                    "sparselet.reselect(model, batches) before the first step, or train with sparselet.MaskSchedule()."
                )
        states = ((name, self.sparse_mask[name]) for name in trained)
        masks = [(None if state.dense else self.sparse_indices[name], state.block_size) for name, state in states]
        recorder = None if self.recorder is None else functools.partial(self.recorder, self)
        return with_masked_gradient(y, x, masks, [self.sparse_values[name] for name in trained], self.transposed, recorder)

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """Make these adapters the active ones: the weight then holds the base plus the sum of their values."""
        super().set_adapter(adapter_names, inference_mode=inference_mode)
        self.refresh()

    def enable_adapters(self, enabled: bool) -> None:
        """Switch the active adapters on, or off: off, the weight is the base's, bit for bit."""
        if not enabled:
            self.merged_adapters.clear()
        super().enable_adapters(enabled)
        self.refresh()

    def delete_adapter(self, adapter_name: str) -> None:
        """Forget an adapter; if it was active, the base entries it displaced come back."""
        self.restore()
        super().delete_adapter(adapter_name)
        self.refresh()

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Keep these adapters (default: the active ones) in the weight until `unmerge`, whichever are active.

        safe_merge: raise NonFiniteValue, and change nothing, if a value is NaN or infinite.
        """
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.sparse_values]
        if safe_merge and not all(torch.isfinite(self.sparse_values[name]).all() for name in names):
            raise NonFiniteValue(f"{self.target_name}: an adapter's values are NaN or infinite; nothing was merged.")
        self.merged_adapters.extend(names)
        self.refresh()

    def unmerge(self) -> None:
        """Undo `merge`, bit for bit."""
        self.merged_adapters.clear()
        self.refresh()

    def get_delta_weight(self, adapter: str) -> Tensor:
        """ΔW of one adapter as a dense tensor of the weight's shape, in the dtype of its values."""
        return self.delta(adapter).to_dense().to(self.base_weight.device)

    def unload_and_optionally_merge_module(self, merge: bool, safe_merge: bool, adapter_names: list[str] | None) -> nn.Module:
        """The base layer, with the adapters in its weight or, when `merge` is false, as it was."""
        if merge:
            self.merge(safe_merge=safe_merge, adapter_names=adapter_names)
            self.refresh(force=True)
            self._resident = None
        else:
            self.restore()
        return self.get_base_layer()

    @property
    def weight(self) -> Tensor:
        """The base layer's weight, up to date."""
        self.refresh()
        return self.base_weight

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """Move an adapter to the base layer's device. Its dtype stays: casting values to bf16 would lose them."""
        device = device or self.base_weight.device
        self.sparse_values[adapter_name].data = self.sparse_values[adapter_name].data.to(device)
        self.sparse_indices[adapter_name] = self.sparse_indices[adapter_name].to(device)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "SparseletLayer":
        """Move or cast the module: the base weight as if no adapter were there; values are never cast to 16 bits."""
        self.restore()
        self._fingerprint = None
        before = {name: value.data for name, value in self.sparse_values.items()}
        super()._apply(fn, recurse)
        for name, value in self.sparse_values.items():
            if value.dtype in (torch.float16, torch.bfloat16):
                value.data = before[name].to(value.device)
        self.refresh()
        return self

    def _load_from_state_dict(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, state_dict: dict[str, Any], prefix: str, *args: Any
    ) -> None:
        if self._resident is not None and any(key.startswith(f"{prefix}base_layer.") for key in state_dict):
            raise SelectionError(
                f"{self.target_name}: base weights cannot be loaded while an adapter is written into them. "
                "Load them before the adapter, or inside `with model.disable_adapter():`."
            )
        super()._load_from_state_dict(state_dict, prefix, *args)


def is_sharded(weight: Tensor) -> bool:
    """Whether a weight is a DTensor (asked without importing it)."""
    return getattr(weight, "device_mesh", None) is not None


def seeded(seed: int, *salt: object) -> torch.Generator:
    """A CPU generator that depends on the seed and the salt only, not on process, order or hash seed."""
    digest = hashlib.sha256(repr((seed, *salt)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def _reshape_parameter(parameter: nn.Parameter, data: Tensor) -> None:
    # Autograd keeps a parameter's gradient accumulator, with the old shape, as long as any old loss is alive; a change
    # of dtype makes it forget it.
    if parameter.shape != data.shape:
        other = torch.float64 if parameter.dtype != torch.float64 else torch.float32
        parameter.data = torch.empty(0, dtype=other, device=data.device)
    parameter.data = data
    parameter.grad = None


def _same_objects(first: Sequence[object], second: Sequence[object]) -> bool:
    return len(first) == len(second) and all(a is b for a, b in zip(first, second, strict=True))


def _version(tensor: Tensor) -> int:
    return -1 if tensor.is_inference() else tensor._version
