"""Merging target by target: `merge` in memory, `merge_to` from files to a file."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from sparselet.adapter import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    AdapterFile,
    SparseAdapter,
    adapter_config,
    add_delta,
    require_finite,
    tensor_names,
)
from sparselet.container import TensorStream
from sparselet.delta import SparseDelta
from sparselet.errors import ArgumentError, ShapeMismatch, SparseletError, UnknownMethod
from sparselet.files import atomic_directory, atomic_write, write_json
from sparselet.fingerprint import require_same_base
from sparselet.merging.average import overlap, uniform

Method = Callable[..., SparseDelta]
Adapter = Mapping[str, SparseDelta]

METHODS: dict[str, Method] = {
    "overlap": overlap,
    "uniform": uniform,
}


def merge(
    adapters: Sequence[Adapter | str | Path],
    method: str = "overlap",
    weights: Sequence[float] | None = None,
    parameters: Mapping[str, Any] | None = None,
) -> SparseAdapter:
    """Merge experts of one base model into one adapter.

    adapters: `SparseAdapter`s, or paths of them; their masks, densities, block sizes and targets may differ. Where an
        expert has no such target its change there is 0.
    method: a name in `sparselet.METHODS`. parameters: what that method takes beside deltas and weights.
    weights: one factor an expert, 1 each by default.

    Raises ArgumentError (no expert, weights of the wrong count), UnknownMethod, ShapeMismatch, WrongBase, NonFiniteValue.
    """
    plan = _Plan(adapters, method, weights, parameters)
    return SparseAdapter(dict(plan.deltas()), plan.metadata(), plan.fingerprints)


def merge_to(
    output: str | Path,
    adapters: Sequence[Adapter | str | Path],
    method: str = "overlap",
    weights: Sequence[float] | None = None,
    parameters: Mapping[str, Any] | None = None,
    progress: Callable[[str], None] | None = None,
) -> Path:
    """Merge as `merge` does, straight into the directory `output`: one target is in memory at a time.

    progress: called with each target's name when it is written.
    Raises what `merge` raises, OutputExists and WriteFailed; nothing half-written is left.
    """
    plan = _Plan(adapters, method, weights, parameters)
    sizes: dict[str, SparseDelta] = {}
    with atomic_directory(output) as directory:
        with atomic_write(directory / WEIGHTS_FILE) as file, TensorStream(file, tensor_names(plan.shapes)) as stream:
            for name, delta in plan.deltas():
                add_delta(stream, name, delta)
                sizes[name] = SparseDelta.empty(delta.shape)
                plan.count(delta)
                if progress is not None:
                    progress(name)
        described = SparseAdapter(sizes, {**plan.metadata(), **plan.measured()}, plan.fingerprints)
        write_json(directory / CONFIG_FILE, adapter_config(described))
    return Path(output)


class _Plan:
    """A checked merge: everything that can be refused is refused before the first target is merged."""

    def __init__(
        self,
        adapters: Sequence[Adapter | str | Path],
        method: str,
        weights: Sequence[float] | None,
        parameters: Mapping[str, Any] | None,
    ) -> None:
        if not adapters:
            raise ArgumentError("no adapter to merge; give at least one.")
        if method not in METHODS:
            raise UnknownMethod(f"no merge method is called {method!r}; there are {', '.join(METHODS)}.")
        self.adapters = [AdapterFile(a) if isinstance(a, (str, Path)) else a for a in adapters]
        self.method = method
        self.parameters = dict(parameters or {})
        _check_parameters(method, self.parameters)
        self.weights = [1.0] * len(self.adapters) if weights is None else [float(w) for w in weights]
        if len(self.weights) != len(self.adapters):
            raise ArgumentError(f"{len(self.adapters)} adapters need as many weights, got {len(self.weights)}.")
        if any(w != w or w in (float("inf"), float("-inf")) for w in self.weights):
            raise ArgumentError(f"weights must be finite numbers, got {self.weights}.")
        self.shapes = _common_shapes(self.adapters)
        self.fingerprints = _common_fingerprints(self.adapters)
        self._entries = 0
        self._blocks: set[int] = set()
        for i, adapter in enumerate(self.adapters):
            if getattr(adapter, "modules", None) or _metadata(adapter).get("modules_to_save"):
                raise ArgumentError(f"{_label(adapter, i)} trained modules in full (modules_to_save), which cannot be merged.")

    def deltas(self) -> Iterator[tuple[str, SparseDelta]]:
        """The merged targets in order, each made when asked for."""
        for name, shape in self.shapes.items():
            parts = [adapter[name] if name in adapter else SparseDelta.empty(shape) for adapter in self.adapters]
            try:
                merged = METHODS[self.method](parts, self.weights, **self.parameters)
            except SparseletError as error:
                raise type(error)(f"{name}: {error}") from error
            require_finite(merged.values, name)
            yield name, merged

    def count(self, delta: SparseDelta) -> None:
        """Note what a merged target adds to the adapter's size."""
        self._entries += delta.nnz
        if delta.nnz:
            self._blocks.add(delta.block_size)

    def measured(self) -> dict[str, Any]:
        """Density and block size of what was counted."""
        size = sum(rows * columns for rows, columns in self.shapes.values())
        return {
            "density": self._entries / size if size else 0.0,
            "block_size": next(iter(self._blocks)) if len(self._blocks) == 1 else 1,
        }

    def metadata(self) -> dict[str, Any]:
        """The merged adapter's metadata: the base model, and the recipe of the merge."""
        all_metadata = [_metadata(adapter) for adapter in self.adapters]
        names = {m["base_model_name_or_path"] for m in all_metadata if m.get("base_model_name_or_path")}
        return {
            "base_model_name_or_path": min(names) if names else None,
            "task_type": _agreed(m.get("task_type") for m in all_metadata),
            "chat_template": _agreed(m.get("chat_template") for m in all_metadata),
            "merge": {
                "method": self.method,
                "parameters": self.parameters,
                "weights": self.weights,
                "experts": [
                    {
                        "task": m.get("task"),
                        "data_fingerprint": m.get("data_fingerprint"),
                        "base": m.get("base_model_name_or_path"),
                    }
                    for m in all_metadata
                ],
            },
        }


def _agreed(values: Iterable[Any]) -> Any:
    """The one value that all have, or None."""
    different = list(dict.fromkeys(values))
    return different[0] if len(different) == 1 else None


def _check_parameters(method: str, parameters: Mapping[str, Any]) -> None:
    code = METHODS[method].__code__
    known = code.co_varnames[code.co_argcount : code.co_argcount + code.co_kwonlyargcount]
    unknown = sorted(set(parameters) - set(known))
    if unknown:
        takes = f"it takes {', '.join(known)}" if known else "it takes none"
        raise UnknownMethod(f"{method} has no parameter {unknown[0]!r}; {takes}.")


def _common_shapes(adapters: Sequence[Adapter]) -> dict[str, tuple[int, int]]:
    shapes: dict[str, tuple[int, int]] = {}
    for i, adapter in enumerate(adapters):
        known = getattr(adapter, "shapes", None)
        for name in adapter:
            shape = known[name] if known is not None else adapter[name].shape
            if shapes.setdefault(name, shape) != shape:
                raise ShapeMismatch(
                    f"{name}: {_label(adapter, i)} has shape {list(shape)}, an earlier one {list(shapes[name])}."
                )
    return dict(sorted(shapes.items()))


def _common_fingerprints(adapters: Sequence[Adapter]) -> dict[str, Mapping[str, str] | None]:
    """Each target's base fingerprint, from the first adapter that has one. Raises WrongBase if two disagree."""
    found: dict[str, Mapping[str, str] | None] = {}
    for i, adapter in enumerate(adapters):
        own = {name: fp for name, fp in getattr(adapter, "fingerprints", {}).items() if fp}
        require_same_base(own, found, f"{_label(adapter, i)} and the adapters before it")
        found = {**own, **found}
    return found


def _metadata(adapter: Adapter) -> dict[str, Any]:
    return dict(getattr(adapter, "metadata", {}))


def _label(adapter: Adapter, position: int) -> str:
    path = getattr(adapter, "path", None)
    return str(path) if path is not None else f"adapter {position + 1}"
