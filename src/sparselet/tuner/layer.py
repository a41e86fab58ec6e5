"""One target with its adapters, as a PEFT layer around the base layer. `effective` has the rules of residence.

The forward pass is the base layer's at W + Ŵ·M of the active adapters. The backward pass yields ∂L/∂x as in the base layer, and
∂L/∂Ŵ at the masked entries only.
"""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, cast

import torch
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from sparselet import kernels
from sparselet.delta import SparseDelta, block_for, index_dtype
from sparselet.errors import NonFiniteValue, SelectionError
from sparselet.fingerprint import fingerprint_weight
from sparselet.kernels import ENTRY
from sparselet.masks import blocks_to_keep
from sparselet.tuner.config import SparseletConfig
from sparselet.tuner.effective import Change, differentiable_weight
from sparselet.tuner.linear import changed_linear, is_plain_linear, linear
from sparselet.tuner.mask_state import MaskState, random_blocks, seeded
from sparselet.tuner.resident import LEASE, WRITING, Lease, Residence
from sparselet.tuner.weights import full_tensor, replace_data, require_usable


class Recorder(Protocol):
    """Receives what a selection scores, while it lasts: each target's dense gradient, and its input."""

    def __call__(self, layer: "SparseletLayer", gradient: Tensor) -> None: ...
    def read_input(self, layer: "SparseletLayer", x: Tensor) -> None: ...


class SparseletLayer(nn.Module, BaseTunerLayer):
    """A linear base layer with any number of sparse adapters.

    sparse_values: the trained Ŵ, one parameter for each adapter: [n], or [n, h, w] for larger blocks, or the weight's shape
        while no mask is selected. float32 over a base of 16 or 32 bits, float64 over one of 64.
    sparse_indices: the masks as block ids, int32 [n]; empty while no mask is selected.
    recorder: receives the dense ∂L/∂W of a backward pass while masks are selected. calls: forward passes since it was set.

    Input [..., in], output [..., out].
    """

    adapter_layer_names = ("sparse_values",)
    other_param_names = ("sparse_indices", "sparse_mask", "sparse_config")

    def __init__(self, base_layer: nn.Module, target_name: str) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.target_name = target_name
        self.transposed = isinstance(base_layer, Conv1D)
        weight = self.base_weight
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
        self._residence = Residence()

    @property
    def base_weight(self) -> nn.Parameter:
        """The base layer's weight in memory: the base model's, plus merged adapters."""
        return cast(nn.Parameter, self.get_base_layer().weight)

    # Adapters

    def add_adapter(self, name: str, config: SparseletConfig) -> None:
        """Add an adapter with the mask of `config.initial_mask`, or an empty one for a saved adapter. Raises BlockSizeError."""
        weight = self.base_weight
        loaded = config.targets is not None
        block = ENTRY if loaded else block_for(config.block_size, self.shape, self.transposed, self.target_name)
        dense = config.when == "paper" and config.initial_mask == "dense" and not loaded
        state = MaskState(block, dense, selecting=not loaded)  # a file sets these when it is read
        blocks = torch.empty(0, dtype=index_dtype(weight.numel()), device=weight.device)
        values = torch.zeros(
            self.shape if dense else (0,), dtype=torch.promote_types(weight.dtype, torch.float32), device=weight.device
        )
        self.sparse_mask[name] = state
        self.sparse_config[name] = config
        self.sparse_indices[name] = blocks
        self.sparse_values[name] = nn.Parameter(values)
        if not dense and not loaded:
            total = weight.numel() // math.prod(block)
            count = blocks_to_keep(config.density, total)
            if config.when == "paper" and config.initial_mask == "random":
                generator = seeded(config.seed, config.data_fingerprint, self.target_name)
                self.set_mask(name, random_blocks(total, count, generator).to(weight.device))
                state.selections = 1
            else:
                self.set_mask(name, torch.arange(count, device=weight.device))

    def set_mask(self, name: str, blocks: Tensor, values: Tensor | None = None) -> None:
        """Set an adapter's mask, ascending block ids [n], with `values` [n] or [n, h, w] (default: zeros of its blocks).

        The parameter keeps its identity and changes its shape, so that optimizers and schedulers still refer to it; its
        gradient is dropped.
        """
        state, parameter = self.sparse_mask[name], self._real_parameter(name)
        if values is None:
            values = torch.zeros(kernels.values_shape(len(blocks), state.block), dtype=parameter.dtype)
        state.block = kernels.block_of(values)
        device = self.base_weight.device
        state.dense = False
        dtype = index_dtype(math.prod(self.shape) // math.prod(state.block))
        # New tensors, since a backward pass may still need the old ones.
        self.sparse_indices[name] = blocks.to(device=device, dtype=dtype, copy=True)
        replace_data(parameter, values.to(device=device, dtype=parameter.dtype, copy=True))
        self.refresh()

    def set_dense(self, name: str, values: Tensor) -> None:
        """Let an adapter train all entries, from `values` [rows, columns], as before its first selection."""
        parameter = self._real_parameter(name)
        self.sparse_mask[name].dense = True
        self.sparse_indices[name] = torch.empty(0, dtype=torch.int32, device=self.base_weight.device)
        replace_data(parameter, values.to(device=self.base_weight.device, dtype=parameter.dtype, copy=True))
        self.refresh()

    def _real_parameter(self, name: str) -> nn.Parameter:
        """An adapter's parameter, after replacing one on the meta device (from low_cpu_mem_usage) by an empty one."""
        parameter = self.sparse_values[name]
        if parameter.is_meta:
            parameter = nn.Parameter(torch.empty(0, dtype=parameter.dtype), requires_grad=parameter.requires_grad)
            self.sparse_values[name] = parameter
        return parameter

    def delta(self, name: str) -> SparseDelta:
        """An adapter's current change of this target, on the CPU; all entries while no mask is selected."""
        state, values = self.sparse_mask[name], full_tensor(self.sparse_values[name].detach()).cpu()
        if not state.dense:
            return SparseDelta(self.shape, self.sparse_indices[name].cpu(), values)
        blocks = torch.arange(values.numel() // math.prod(state.block))
        return SparseDelta(self.shape, blocks, kernels.gather(values, blocks, state.block))

    def dense_values(self, name: str) -> Tensor:
        """Ŵ of all entries as a new tensor [rows, columns], including off-mask values while these are kept."""
        state, values = self.sparse_mask[name], self.sparse_values[name].detach()
        if state.dense:
            return values.clone()
        if state.pending is None:
            full = torch.zeros(self.shape, dtype=values.dtype, device=values.device)
        else:
            full = state.pending.to(values.device, copy=True)
        kernels.write(full, self.sparse_indices[name], values)
        return full

    def base_fingerprint(self) -> dict[str, str]:
        """The fingerprint of the base model's weight, whether or not adapters are merged."""
        with WRITING:
            return fingerprint_weight(self._residence.base(full_tensor(self.base_weight.detach())))

    # Residence

    def refresh(self) -> None:
        """Write merged adapters into the weight again if their values have changed, by their version counters."""
        names = tuple(self.merged_adapters)
        if names and not self._holds(names):
            self._residence.write(self.base_weight, names, self._changes(names))

    def effective_weight(self) -> Tensor:
        """The weight [rows, columns] of a pass with the current values, as a new tensor of the base weight's dtype."""
        return self._build(self._changes(self.merged_adapters or self._active()))

    def restore(self) -> None:
        """Restore the base model's weight, bit for bit."""
        self._residence.restore(self.base_weight)

    def _holds(self, names: tuple[str, ...]) -> bool:
        return self._residence.holds(names, [self.sparse_values[name] for name in names])

    def _build(self, changes: Sequence[Change]) -> Tensor:
        return self._residence.build(self.base_weight, changes)

    def _active(self) -> tuple[str, ...]:
        """The adapters of the next pass."""
        if self._disable_adapters:
            return ()
        return tuple(name for name in self.active_adapters if name in self.sparse_values)

    def _changes(self, names: Sequence[str], learns: bool = False) -> list[Change]:
        """The adapters' current changes. learns: those whose values require gradients are `trained`."""
        changes = []
        for name in names:
            state, values = self.sparse_mask[name], self.sparse_values[name]
            trained = learns and values.requires_grad
            if state.dense:
                changes.append(Change(None, values, trained))
                continue
            # A target without entries, such as one of a dropped layer, keeps no activation for a gradient.
            trained = trained and (values.numel() > 0 or self.recorder is not None)
            off_mask = state.pending if self.recorder is not None else None
            changes.append(Change(self.sparse_indices[name], values, trained, off_mask))
        return changes

    def _mark(self, name: str) -> Tensor:
        """An adapter's mask, or a checksum of each row of its dense values: neither may change until the backward pass."""
        if not self.sparse_mask[name].dense:
            return self.sparse_indices[name]
        values = self.sparse_values[name].detach()
        return values.view(torch.int64 if values.dtype == torch.float64 else torch.int32).sum(1)

    def _require_unchanged(self, version: int, marks: Mapping[str, Tensor]) -> None:
        """Raise SelectionError if the base weight's version or an adapter's mark differs from the forward pass."""
        changed = "" if self._residence.base_version(self.base_weight) == version else "the base weight"
        for name, mark in marks.items():
            if name not in self.sparse_values or ((now := self._mark(name)) is not mark and not torch.equal(now, mark)):
                changed = f"the mask, or the dense values before the first selection, of adapter {name!r}"
        if changed:
            raise SelectionError(
                f"{self.target_name}: {changed} was changed between the forward pass and the backward pass, which needs the "
                "forward pass's own. Call backward first, or run the forward pass again."
            )

    # What PEFT and torch call

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The base layer's forward pass at the effective weight; its backward pass gives the trained adapters' gradients."""
        if self._disable_adapters:
            self.unmerge()
        names, compiling = self._active(), torch.compiler.is_compiling()
        is_base = not names and self._residence.resident is None
        if self.merged_adapters or is_base or (not compiling and self._is_leased(names)):
            return self.base_layer(x, *args, **kwargs)
        weight, bias = self.base_weight, cast("Tensor | None", self.base_layer.bias)
        learns = torch.is_grad_enabled()
        self._require_usable()
        if learns:
            self._require_selected(names)
        if self.recorder is not None and names:
            self.calls += 1
            self.recorder.read_input(self, x)
        changes = self._changes(names, learns)
        if compiling:
            return linear(x, differentiable_weight(weight, changes), bias, self.transposed)
        if args or kwargs or not is_plain_linear(self.base_layer):
            replaced = {"weight": differentiable_weight(self._residence.base(weight), changes)}
            return torch.func.functional_call(self.base_layer, replaced, (x, *args), kwargs)
        recorder = None if self.recorder is None or not names else functools.partial(self.recorder, self)
        differentiated = zip(names, changes, strict=True) if learns else ()
        marks = {name: self._mark(name) for name, change in differentiated if change.trained or change.blocks is None}
        check = functools.partial(self._require_unchanged, self._residence.base_version(weight), marks)
        return changed_linear(x, weight, bias, changes, self._build, check, self.transposed, recorder)

    def _is_leased(self, names: tuple[str, ...]) -> bool:
        """Whether the weight holds these adapters for a call of `generate`; its second pass writes them."""
        lease = None if torch.is_grad_enabled() else LEASE.get()
        if lease is None or not names or self.recorder is not None or self.base_weight.is_inference():
            return False
        if not self._residence.may_write(lease):
            return False
        if not self._holds(names):
            self._require_usable()
            self._residence.write(self.base_weight, names, self._changes(names), lease)
            lease.restores.append(functools.partial(self._end_lease, lease))
        return True

    def _end_lease(self, lease: Lease) -> None:
        self._residence.end_lease(self.base_weight, lease)

    def _require_usable(self) -> None:
        """Raise SelectionError if the base weight or the values of an active adapter are not in memory."""
        require_usable(self.base_weight, self.target_name)
        if any(self.sparse_values[name].is_meta for name in self._active()):
            raise SelectionError(
                f"{self.target_name}: the adapter was added with low_cpu_mem_usage=True and has no values. Load them, or "
                "leave low_cpu_mem_usage out."
            )

    def _require_selected(self, names: Sequence[str]) -> None:
        """Raise SelectionError for a trainable adapter whose mask was never selected, unless this pass selects it."""
        for name in names if self.recorder is None else ():
            state = self.sparse_mask[name]
            unselected = state.selecting and not state.dense and not state.selections
            if unselected and self.sparse_values[name].requires_grad:
                raise SelectionError(
                    f"{self.target_name}: the mask has not been selected. With initial_mask='gradient' call "
                    "sparselet.reselect(model, batches) before the first step, or train with sparselet.MaskSchedule()."
                )

    def enable_adapters(self, enabled: bool) -> None:
        """Enable or disable the active adapters. Disabled, the layer equals the base layer, bit for bit."""
        if not enabled:
            self.unmerge()
        super().enable_adapters(enabled)

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter; if it was merged, the base values it displaced are restored."""
        if adapter_name in self.merged_adapters:
            self.merged_adapters.remove(adapter_name)
        self.restore()
        super().delete_adapter(adapter_name)
        self.refresh()

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Write these adapters (default: the active ones) into the weight until `unmerge`, besides those already merged.

        safe_merge: raise NonFiniteValue, and change nothing, if a merged weight would be NaN or infinite.
        """
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.sparse_values]
        if safe_merge:
            self.require_finite_merge(names)
        if names:
            self._require_usable()
            self.merged_adapters.extend(names)
            self.refresh()

    def require_finite_merge(self, adapter_names: Sequence[str]) -> None:
        """Raise NonFiniteValue if the weight with these and the merged adapters would be NaN or infinite."""
        names = list(self.merged_adapters)
        for name in adapter_names:
            if name in self.sparse_values and name not in names:
                names.append(name)
                if not torch.isfinite(self._build(self._changes(names))).all():
                    raise NonFiniteValue(
                        f"NaNs detected in the merged weights. The adapter {name} seems to be broken: with it the weight of "
                        f"{self.target_name} is NaN or infinite. Nothing was merged."
                    )

    def unmerge(self) -> None:
        """Undo `merge`, bit for bit."""
        if self.merged_adapters:
            self.merged_adapters.clear()
            self.restore()

    def get_delta_weight(self, adapter: str) -> Tensor:
        """ΔW of one adapter as a dense tensor of the weight's shape, in the dtype of its values."""
        return self.delta(adapter).to_dense().to(self.base_weight.device)

    def unload_and_optionally_merge_module(self, merge: bool, safe_merge: bool, adapter_names: list[str] | None) -> nn.Module:
        """The base layer, with the adapters written into its weight or, when `merge` is false, the base model's weight."""
        if merge:
            self.merge(safe_merge=safe_merge, adapter_names=adapter_names)
            self._residence.resident = None
        else:
            self.restore()
        return self.get_base_layer()

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """Move an adapter to the base layer's device. Its dtype stays: values cast to bf16 would lose small steps."""
        device = device or self.base_weight.device
        self.sparse_values[adapter_name].data = self.sparse_values[adapter_name].data.to(device)
        self.sparse_indices[adapter_name] = self.sparse_indices[adapter_name].to(device)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "SparseletLayer":
        """Move or cast the module: the base model's weight, without merged adapters; values are never cast to 16 bits."""
        self.restore()
        before = {name: value.data for name, value in self.sparse_values.items()}
        super()._apply(fn, recurse)
        for name, value in self.sparse_values.items():
            if value.dtype in (torch.float16, torch.bfloat16):
                value.data = before[name].to(value.device)
        self.refresh()
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        # transformers reads the names here before it loads an adapter, whose tensors it would load without any check.
        for name, state in self.sparse_mask.items():
            state.require_read(name, self.target_name)
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, state_dict: dict[str, Any], prefix: str, *args: Any
    ) -> None:
        """Load masks of any size from a state dict, with their values. Raises SelectionError, a FormatError."""
        if self.merged_adapters and any(key.startswith(f"{prefix}base_layer.") for key in state_dict):
            raise SelectionError(
                f"{self.target_name}: base weights cannot be loaded while an adapter is merged into them; call "
                "unmerge_adapter() first."
            )
        for name in self.sparse_values:
            values = state_dict.get(f"{prefix}sparse_values.{name}")
            blocks = state_dict.get(f"{prefix}sparse_indices.{name}")
            if isinstance(values, Tensor) and isinstance(blocks, Tensor):
                self._set_loaded_mask(name, values.detach(), blocks)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _set_loaded_mask(self, name: str, values: Tensor, blocks: Tensor) -> None:
        """Set the mask of loaded values, so that the parameter has their shape; torch then copies them."""
        if values.ndim == 2 and tuple(values.shape) == self.shape and not len(blocks):
            self.set_dense(name, values)
            return
        delta = SparseDelta(self.shape, blocks, values)
        self.set_mask(name, delta.indices, delta.values)
        if delta.values.any() or self.sparse_mask[name].unread:
            self.sparse_mask[name].selections = max(1, self.sparse_mask[name].selections)


class SparseletLinear(SparseletLayer):
    """The layer in a model. PEFT counts it among the targets of "all-linear" because its class name contains Linear."""
