"""`MixedProducts`: several experts in one forward pass of the base model, each in rows of its own."""

import contextlib
import functools
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from sparselet.delta import SparseDelta
from sparselet.errors import ModelError
from sparselet.names import Names
from sparselet.serving.served_expert import ServedExpert

KEPT_EXPERTS = 32  # whose matrices are kept: eight bytes an entry beside the expert itself
VECTOR_ROWS = 2  # that are faster one by one, each by a product of the matrix with a vector
MOST_DENSE = 0.5  # of an expert: beyond, its matrices are no smaller than the weights, and their product no faster


class MixedProducts:
    """y = W·x + ΔWₑ·x of each row, e the row's expert: the base product of all rows at once, then each expert's sparse product
    of its own rows, by the matrix library's product of a compressed-row matrix.

    In float32 that is (W + ΔWₑ)·x up to the order of a sum. Weights of 16 bits hold W + ΔWₑ rounded, which this does not
    compute, so experts of such a model cannot be mixed; nor can those that change other parameters than weights of `nn.Linear`,
    or most entries of these.

    model: with the base weights, without adapters.
    """

    def __init__(self, model: nn.Module) -> None:
        names = Names(model)
        self._linear = {
            name: layer.module
            for name, layer in names.layers.items()
            if type(layer.module) is nn.Linear
            and layer.is_weight
            and len(names.shared[name]) == 1
            and layer.parameter.dtype == torch.float32
        }
        self._model, self._device = model, next(model.parameters()).device
        self._matrices: WeakKeyDictionary[ServedExpert, dict[int, Tensor]] = WeakKeyDictionary()  # the least recent first

    @functools.cached_property
    def _groups(self) -> list[tuple[str, ...]]:
        """Found when experts are first mixed: a server that never mixes need not know them."""
        return layers_by_input(self._model, self._linear)

    def can_mix(self, expert: ServedExpert) -> bool:
        """Whether rows of this expert can be in a mixed pass."""
        if not torch.backends.mkl.is_available() and not torch.cuda.is_available():
            return False  # torch has no product of compressed rows
        if expert.adapter is None:
            return True
        return expert.adapter.density <= MOST_DENSE and all(
            name in self._linear and self._linear[name].weight.shape == delta.shape for name, delta in expert.adapter.items()
        )

    @contextlib.contextmanager
    def adding(self, experts: Sequence[ServedExpert]) -> Iterator[None]:
        """Within the block a forward pass of as many rows adds the product of experts[i] to row i.

        The pass raises ModelError for a layer whose inputs are not [rows, length, width].
        """
        rows: dict[ServedExpert, list[int]] = {}
        for row, expert in enumerate(experts):
            rows.setdefault(expert, []).append(row)
        parts: dict[int, list[_Part]] = {}  # by group
        changed: set[str] = set()
        for expert, own in rows.items():
            index = torch.tensor(own, device=self._device)
            for group, matrix in self.prepare(expert).items():
                parts.setdefault(group, []).append((matrix, own, index))
            changed.update(expert.adapter or ())
        with contextlib.ExitStack() as stack:
            for group, products in parts.items():
                product = _Product(len(experts), products)
                end = 0
                for name in self._groups[group]:
                    start, end = end, end + self._linear[name].out_features
                    if name in changed:
                        stack.callback(self._linear[name].register_forward_hook(product.adder(start, end)).remove)
            yield

    def prepare(self, expert: ServedExpert) -> Mapping[int, Tensor]:
        """The matrices of an expert by group of layers."""
        matrices = self._matrices.pop(expert, None)
        if matrices is None:
            deltas, matrices = expert.adapter or {}, {}
            for group, names in enumerate(self._groups):
                if any(name in deltas and deltas[name].nnz for name in names):
                    own = [deltas[n] if n in deltas else unchanged(self._linear[n]) for n in names]
                    matrices[group] = compressed_rows(own).to(self._device)
        self._matrices[expert] = matrices
        while len(self._matrices) > KEPT_EXPERTS:
            del self._matrices[next(iter(self._matrices))]
        return matrices


@torch.inference_mode()
def layers_by_input(model: nn.Module, linear: Mapping[str, nn.Linear]) -> list[tuple[str, ...]]:
    """The layers that read one input, as queries, keys and values of one attention do: found in a pass of one token. A layer
    that this does not call is by itself."""
    inputs: dict[str, Tensor] = {}  # kept, so that no two have one identity
    with contextlib.ExitStack() as stack:
        for name, module in linear.items():

            def remember(module: nn.Module, arguments: tuple[Any, ...], name: str = name) -> None:
                inputs[name] = arguments[0]

            stack.callback(module.register_forward_pre_hook(remember).remove)
        model(input_ids=torch.zeros(1, 1, dtype=torch.int64, device=next(model.parameters()).device), use_cache=False)
    groups: dict[Any, list[str]] = {}
    for name in linear:
        groups.setdefault(id(inputs[name]) if name in inputs else name, []).append(name)
    return [tuple(names) for names in groups.values()]


def unchanged(layer: nn.Linear) -> SparseDelta:
    """A change of no entry."""
    return SparseDelta.empty((layer.out_features, layer.in_features))


def compressed_rows(deltas: Sequence[SparseDelta]) -> Tensor:
    """Deltas of one width, one below the other, as a matrix of compressed rows, float32 [rows, columns]."""
    starts, columns, values = [torch.zeros(1, dtype=torch.int32)], [], []
    for delta in deltas:
        entries = delta.expand()
        lasts = (torch.arange(1, delta.shape[0] + 1) * delta.shape[1]).to(entries.indices.dtype)
        starts.append(torch.searchsorted(entries.indices, lasts, out_int32=True) + starts[-1][-1])
        columns.append((entries.indices % delta.shape[1]).int())
        values.append(entries.values.float())
    shape = (sum(delta.shape[0] for delta in deltas), deltas[0].shape[1])
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse CSR tensor support")
        return torch.sparse_csr_tensor(torch.cat(starts), torch.cat(columns), torch.cat(values), shape, check_invariants=False)


_Part = tuple[Tensor, list[int], Tensor]  # a matrix, and its rows of a batch, also as an index


class _Product:
    """matrix·x in the rows of each matrix, for layers that read one x: computed for the first, and kept for the others."""

    def __init__(self, rows: int, parts: Sequence[_Part]) -> None:
        self.rows, self.parts = rows, parts
        self.x: Tensor | None = None
        self.product = torch.empty(0)

    def adder(self, start: int, end: int) -> Callable[[nn.Module, tuple[Any, ...], Tensor], None]:
        """A hook that adds these columns of the product to a layer's output."""

        def add(module: nn.Module, arguments: tuple[Any, ...], output: Tensor) -> None:
            if arguments[0] is not self.x:
                self.x, self.product = arguments[0], self.of(arguments[0])
            output += self.product[..., start:end]

        return add

    def of(self, x: Tensor) -> Tensor:
        """The product, [rows, length, columns]; of rows without a matrix it is 0."""
        if x.ndim != 3 or len(x) != self.rows:
            shape = list(x.shape)
            raise ModelError(f"a layer takes inputs of shape {shape}, in which the {self.rows} rows of a batch are lost.")
        product = x.new_zeros(*x.shape[:2], self.parts[0][0].shape[0])
        for matrix, rows, index in self.parts:
            if x.shape[1] == 1 and len(rows) <= VECTOR_ROWS:
                for row in rows:
                    product[row, 0] = matrix @ x[row, 0]
            else:
                own = x.index_select(0, index).flatten(0, 1)
                product.index_copy_(0, index, (matrix @ own.T).T.unflatten(0, (len(rows), -1)))
        return product
