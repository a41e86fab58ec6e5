"""One target with its adapters, as a PEFT layer around the base layer. `effective` has the rules of residence.

The forward pass is the base layer's own at W + Ŵ·M of the active adapters. The backward pass yields ∂L/∂x as always and ∂L/∂Ŵ
at the masked entries only.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, cast

import torch
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from sparselet import kernels
from sparselet.delta import SparseDelta, check_block_size, index_dtype
from sparselet.errors import NonFiniteValue, SelectionError
from sparselet.fingerprint import fingerprint_weight
from sparselet.masks import blocks_to_keep
from sparselet.tuner.config import SparseletConfig
from sparselet.tuner.effective import (
    LEASE,
    WRITING,
    Change,
    Lease,
    Resident,
    differentiable_weight,
    displace,
    effective_weight,
    without,
)
from sparselet.tuner.linear import changed_linear, linear
from sparselet.tuner.mask_state import MaskState, random_blocks, seeded

Recorder = Callable[["SparseletLayer", Tensor], None]


class SparseletLayer(nn.Module, BaseTunerLayer):
    """A linear base layer with any number of sparse adapters.

    sparse_values: the trained Ŵ, one parameter an adapter: [n], or [n, B, B] for tiles, or the weight's shape while no
        mask is selected. float32 over a base of 16 or 32 bits, float64 over one of 64.
    sparse_indices: the masks as block ids, int32 [n]; empty while no mask is selected.

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
        self._resident: Resident | None = None
        self._own_writes = 0  # of the base weight's version counter

    @property
    def base_weight(self) -> nn.Parameter:
        """The base layer's weight as it stands in memory: the base model's, but for what is merged."""
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
        blocks = torch.empty(0, dtype=index_dtype(weight.numel()), device=weight.device)
        values = torch.zeros(
            self.shape if dense else (0,), dtype=torch.promote_types(weight.dtype, torch.float32), device=weight.device
        )
        self.sparse_mask[name] = state
        self.sparse_config[name] = config
        self.sparse_indices[name] = blocks
        self.sparse_values[name] = nn.Parameter(values)
        if not dense and not loaded:
            total = weight.numel() // config.block_size**2
            count = blocks_to_keep(config.density, total)
            if config.initial_mask == "random":
                generator = seeded(config.seed, config.data_fingerprint, self.target_name)
                self.set_mask(name, random_blocks(total, count, generator).to(weight.device))
                state.selections = 1
            else:
                self.set_mask(name, torch.arange(count, device=weight.device))

    def set_mask(self, name: str, blocks: Tensor, values: Tensor | None = None, block_size: int | None = None) -> None:
        """Give an adapter a new mask, ascending block ids [n], with `values` [n] or [n, B, B] (default: zeros).

        The parameter keeps its identity and changes its shape, so that optimizers and schedulers still hold it; its
        gradient is dropped.
        """
        state, parameter = self.sparse_mask[name], self._materialized(name)
        state.block_size = block_size or state.block_size
        tile = (state.block_size, state.block_size) if state.block_size > 1 else ()
        if values is None:
            values = torch.zeros((len(blocks), *tile), dtype=parameter.dtype)
        device = self.base_weight.device
        state.dense = False
        dtype = index_dtype(self.shape[0] * self.shape[1] // state.block_size**2)
        # New tensors, since a backward pass may still need the old ones.
        self.sparse_indices[name] = blocks.to(device=device, dtype=dtype, copy=True)
        _reshape_parameter(parameter, values.to(device=device, dtype=parameter.dtype, copy=True))
        self.refresh()

    def set_dense(self, name: str, values: Tensor) -> None:
        """Let an adapter train all entries, from `values` [rows, columns], as before its first selection."""
        parameter = self._materialized(name)
        self.sparse_mask[name].dense = True
        self.sparse_indices[name] = torch.empty(0, dtype=torch.int32, device=self.base_weight.device)
        _reshape_parameter(parameter, values.to(device=self.base_weight.device, dtype=parameter.dtype, copy=True))
        self.refresh()

    def _materialized(self, name: str) -> nn.Parameter:
        parameter = self.sparse_values[name]
        if parameter.is_meta:  # injected with low_cpu_mem_usage
            parameter = nn.Parameter(torch.empty(0, dtype=parameter.dtype), requires_grad=parameter.requires_grad)
            self.sparse_values[name] = parameter
        return parameter

    def delta(self, name: str) -> SparseDelta:
        """An adapter's present change of this target, on the CPU; all entries while no mask is selected."""
        state, values = self.sparse_mask[name], whole(self.sparse_values[name].detach()).cpu()
        if not state.dense:
            side = state.block_size if values.ndim == 3 else 1
            return SparseDelta(self.shape, self.sparse_indices[name].cpu(), values, side)
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
        """The fingerprint of the base weight, whatever is merged."""
        with WRITING:
            return fingerprint_weight(without(whole(self.base_weight.detach()), self._resident))

    # Residence

    def refresh(self, force: bool = False) -> None:
        """Write what is merged into the weight anew, if its values have changed by their version counters, or by `force`."""
        if self.merged_adapters and (force or not self._is_current(tuple(self.merged_adapters))):
            self._make_resident(tuple(self.merged_adapters), None)

    def effective_weight(self) -> Tensor:
        """The weight [rows, columns] that a pass would use now, as a new tensor of the base weight's dtype."""
        return self._build(self._changes(self.merged_adapters or self._active()))

    def restore(self) -> None:
        """Put displaced base entries back, bit for bit; the weight is the base model's then."""
        with WRITING, self._own_write() as weight:
            self._take_out(weight)

    def _take_out(self, weight: Tensor) -> None:
        resident = self._resident
        if resident is None:
            return
        if resident.blocks is not None and weight.is_contiguous():
            kernels.write(weight, resident.blocks, resident.displaced, resident.block_size)
        else:
            weight.copy_(without(weight, resident))
        self._resident = None  # not before: an interrupt may come while it writes

    def _make_resident(self, names: tuple[str, ...], lease: Lease | None) -> None:
        """Write these adapters into the weight, in the place of what is resident there."""
        with WRITING, self._own_write() as weight:
            self._take_out(weight)
            changes = self._changes(names)
            versions = tuple(_version(self.sparse_values[name]) for name in names)
            blocks, block_size, displaced = displace(weight, changes)
            self._resident = Resident(names, versions, blocks, block_size, displaced, lease)
            if len(changes) == 1 and blocks is not None and weight.is_contiguous():
                kernels.add_and_write(weight, blocks, displaced, changes[0].values, block_size)
            else:
                weight.copy_(effective_weight(weight, changes))

    @contextlib.contextmanager
    def _own_write(self) -> Iterator[Tensor]:
        """The weight, to be written to; what moves its version counter meanwhile counts as our own."""
        before = _version(self.base_weight)
        with torch.no_grad():
            yield self.base_weight.detach()
        self._own_writes += _version(self.base_weight) - before

    def _is_current(self, names: tuple[str, ...]) -> bool:
        """Whether the weight holds these adapters as they are now, as far as their version counters tell."""
        resident = self._resident
        if resident is None or resident.names != names:
            return False
        return resident.versions == tuple(_version(self.sparse_values[name]) for name in names)

    def _active(self) -> tuple[str, ...]:
        """The adapters of the next pass."""
        if self._disable_adapters:
            return ()
        return tuple(name for name in self.active_adapters if name in self.sparse_values)

    def _changes(self, names: Sequence[str], learns: bool = False) -> list[Change]:
        """What adapters change now. learns: those whose values require gradients are `trained`."""
        changes = []
        for name in names:
            state, values = self.sparse_mask[name], self.sparse_values[name]
            trained = learns and values.requires_grad
            if state.dense:
                changes.append(Change(None, 1, values, trained))
                continue
            # A target without entries, such as one that layer drop left out, keeps no activation for its gradient.
            trained = trained and (values.numel() > 0 or self.recorder is not None)
            off_mask = state.pending if self.recorder is not None else None
            changes.append(Change(self.sparse_indices[name], state.block_size, values, trained, off_mask))
        return changes

    def _base_version(self) -> int:
        """Moves when others write to the base weight."""
        return _version(self.base_weight) - self._own_writes

    def _mark(self, name: str) -> Tensor:
        """What must not change until a backward pass: an adapter's mask, or its dense values, by a checksum of each row."""
        if not self.sparse_mask[name].dense:
            return self.sparse_indices[name]
        values = self.sparse_values[name].detach()
        return values.view(torch.int64 if values.dtype == torch.float64 else torch.int32).sum(1)

    def _require_unchanged(self, version: int, marks: Mapping[str, Tensor]) -> None:
        """Raise SelectionError if the base weight, by its version, or something marked is not what a forward pass used."""
        what = "" if self._base_version() == version else "the base weight"
        for name, mark in marks.items():
            if name not in self.sparse_values or ((now := self._mark(name)) is not mark and not torch.equal(now, mark)):
                what = f"the mask, or what is trained before there is one, of adapter {name!r}"
        if what:
            raise SelectionError(
                f"{self.target_name}: {what} was changed between the forward pass and the backward pass, which needs what the "
                "forward pass used. Call backward first, or run the forward pass again."
            )

    def _build(self, changes: Sequence[Change]) -> Tensor:
        with WRITING, torch.no_grad():
            return effective_weight(without(self.base_weight.detach(), self._resident), changes)

    # What PEFT and torch call

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The base layer's forward pass at the effective weight; the trained adapters' gradients are taken on the way back."""
        if self._disable_adapters:
            self.unmerge()
        names, compiling = self._active(), torch.compiler.is_compiling()
        if self.merged_adapters or (not names and self._resident is None) or (not compiling and self._leased(names)):
            return self.base_layer(x, *args, **kwargs)
        weight, bias = self.base_weight, cast("Tensor | None", self.base_layer.bias)
        learns = torch.is_grad_enabled()
        self._require_usable(names if learns else ())
        if self.recorder is not None and names:
            self.calls += 1
        changes = self._changes(names, learns)
        if compiling:
            return linear(x, differentiable_weight(weight, changes), bias, self.transposed)
        if args or kwargs or self._is_watched():
            replaced = {"weight": differentiable_weight(without(weight, self._resident), changes)}
            return torch.func.functional_call(self.base_layer, replaced, (x, *args), kwargs)
        recorder = None if self.recorder is None or not names else functools.partial(self.recorder, self)
        kept = zip(names, changes, strict=True) if learns else ()
        marks = {name: self._mark(name) for name, change in kept if change.trained or change.blocks is None}
        check = functools.partial(self._require_unchanged, self._base_version(), marks)
        return changed_linear(x, weight, bias, changes, self._build, check, self.transposed, recorder)

    def _leased(self, names: tuple[str, ...]) -> bool:
        """Whether a call of `generate` has these adapters in the weight; they are written when it comes by again."""
        lease = None if torch.is_grad_enabled() else LEASE.get()
        if lease is None or not names or self.recorder is not None or self.base_weight.is_inference():
            return False
        resident = self._resident
        if resident is not None and resident.lease is not lease:
            return False  # another thread's
        if resident is None and id(self) not in lease.seen:
            lease.seen.add(id(self))
            return False
        if not self._is_current(names):
            self._require_usable(())
            self._make_resident(names, lease)
            lease.returns.append(functools.partial(self._give_back, lease))
        return True

    def _give_back(self, lease: Lease) -> None:
        if self._resident is not None and self._resident.lease is lease:
            self.restore()

    def _require_usable(self, trained: Sequence[str]) -> None:
        """Raise SelectionError for a base weight that is not here as a whole, or a trained adapter without a mask."""
        weight = self.base_weight
        if is_sharded(weight):
            raise SelectionError(
                f"{self.target_name}: the weight is a DTensor, of which each process holds a part. Train with "
                "DistributedDataParallel instead of FSDP2 or tensor parallelism."
            )
        if weight.is_meta:
            raise SelectionError(
                f"{self.target_name}: the weight is not in memory (offloaded, or on the meta device), so the adapter cannot be "
                "added to it. Load the model onto a device that holds it."
            )
        if any(self.sparse_values[name].is_meta for name in self._active()):
            raise SelectionError(
                f"{self.target_name}: the adapter was added with low_cpu_mem_usage=True and holds no values. Load them, or "
                "leave low_cpu_mem_usage out."
            )
        for name in trained:
            state = self.sparse_mask[name]
            untouched = state.selecting and not state.dense and not state.selections and self.recorder is None
            if untouched and self.sparse_values[name].requires_grad:
                raise SelectionError(
                    f"{self.target_name}: the mask has not been selected. With initial_mask='gradient' call "
                    "sparselet.reselect(model, batches) before the first step, or train with sparselet.MaskSchedule()."
                )

    def _is_watched(self) -> bool:
        """Whether the base layer does more than a linear layer: it has hooks, or a forward function of its own."""
        layer = self.base_layer
        hooks = (layer._forward_hooks, layer._forward_pre_hooks, layer._backward_hooks, layer._backward_pre_hooks)
        plain = (nn.Linear.forward, Conv1D.forward)
        return any(hooks) or "forward" in layer.__dict__ or type(layer).forward not in plain

    def enable_adapters(self, enabled: bool) -> None:
        """Switch the active adapters on, or off: off, the layer is the base layer, bit for bit."""
        if not enabled:
            self.unmerge()
        super().enable_adapters(enabled)

    def delete_adapter(self, adapter_name: str) -> None:
        """Forget an adapter; if it was merged, the base entries it displaced come back."""
        if adapter_name in self.merged_adapters:
            self.merged_adapters.remove(adapter_name)
        self.restore()
        super().delete_adapter(adapter_name)
        self.refresh()

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Write these adapters (default: the active ones) into the weight until `unmerge`, beside what is merged already.

        safe_merge: raise NonFiniteValue, and change nothing, if a merged weight would be NaN or infinite.
        """
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.sparse_values]
        if safe_merge:
            self.require_finite_merge(names)
        if names:
            self._require_usable(())
            self.merged_adapters.extend(names)
            self.refresh()

    def require_finite_merge(self, adapter_names: Sequence[str]) -> None:
        """Raise NonFiniteValue if the weight with these adapters beside what is merged would be NaN or infinite."""
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
        """The base layer, with the adapters in its weight or, when `merge` is false, as it was."""
        if merge:
            self.merge(safe_merge=safe_merge, adapter_names=adapter_names)
            self._resident = None
        else:
            self.restore()
        return self.get_base_layer()

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """Move an adapter to the base layer's device. Its dtype stays: casting values to bf16 would lose them."""
        device = device or self.base_weight.device
        self.sparse_values[adapter_name].data = self.sparse_values[adapter_name].data.to(device)
        self.sparse_indices[adapter_name] = self.sparse_indices[adapter_name].to(device)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "SparseletLayer":
        """Move or cast the module: the base weight as if no adapter were merged; values are never cast to 16 bits."""
        self.restore()
        before = {name: value.data for name, value in self.sparse_values.items()}
        super()._apply(fn, recurse)
        for name, value in self.sparse_values.items():
            if value.dtype in (torch.float16, torch.bfloat16):
                value.data = before[name].to(value.device)
        self.refresh()
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        # Before transformers loads an adapter it looks at the names here. It would load any tensor of the file unchecked.
        for name, state in self.sparse_mask.items():
            if state.unread:
                raise SelectionError(
                    f"{self.target_name}: adapter {name!r} was added by its configuration alone, its tensors were not read. "
                    "transformers' load_adapter, from_pretrained and pipeline load tensors without the checks of the format; "
                    "call peft.PeftModel.from_pretrained(model, path) on the base model instead, or "
                    f"peft.AutoPeftModelForCausalLM.from_pretrained(path). model.delete_adapter({name!r}) takes it out again."
                )
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, state_dict: dict[str, Any], prefix: str, *args: Any
    ) -> None:
        """Take over the masks of a state dict, of whatever size, with their values. Raises SelectionError, a FormatError."""
        if self.merged_adapters and any(key.startswith(f"{prefix}base_layer.") for key in state_dict):
            raise SelectionError(
                f"{self.target_name}: base weights cannot be loaded while an adapter is merged into them; call "
                "unmerge_adapter() first."
            )
        for name in self.sparse_values:
            values = state_dict.get(f"{prefix}sparse_values.{name}")
            blocks = state_dict.get(f"{prefix}sparse_indices.{name}")
            if isinstance(values, Tensor) and isinstance(blocks, Tensor):
                self._take_mask(name, values.detach(), blocks)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _take_mask(self, name: str, values: Tensor, blocks: Tensor) -> None:
        """Make room for loaded values, by a mask of their own; torch then copies them."""
        if values.ndim == 2 and tuple(values.shape) == self.shape and not len(blocks):
            self.set_dense(name, values)
            return
        delta = SparseDelta(self.shape, blocks, values, values.shape[1] if values.ndim == 3 else 1)
        self.set_mask(name, delta.indices, delta.values, delta.block_size)
        if delta.values.any() or self.sparse_mask[name].unread:
            self.sparse_mask[name].selections = max(1, self.sparse_mask[name].selections)


class SparseletLinear(SparseletLayer):
    """A layer in a model. By the word Linear in its class's name PEFT counts it among the targets of "all-linear"."""


def is_sharded(weight: Tensor) -> bool:
    """Whether a weight is a DTensor (asked without importing it)."""
    return getattr(weight, "device_mesh", None) is not None


def whole(tensor: Tensor) -> Tensor:
    """A tensor itself, or all of a DTensor, which every process then has to ask for."""
    return cast(Any, tensor).full_tensor() if is_sharded(tensor) else tensor


def _reshape_parameter(parameter: nn.Parameter, data: Tensor) -> None:
    # Autograd keeps a parameter's gradient accumulator, with the old shape, as long as any old loss is alive; a change
    # of dtype makes it forget it.
    if parameter.shape != data.shape:
        other = torch.float64 if parameter.dtype != torch.float64 else torch.float32
        parameter.data = torch.empty(0, dtype=other, device=data.device)
    parameter.data = data
    parameter.grad = None


def _version(tensor: Tensor) -> int:
    return -1 if tensor.is_inference() else tensor._version
