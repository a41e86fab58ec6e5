"""`MixedProducts`: several experts in one forward pass of the base model, each in rows of its own."""

import contextlib
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

KEPT_EXPERTS = 32  # whose matrices are kept: four bytes an entry beside the expert itself
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
        self._matrices: WeakKeyDictionary[ServedExpert, dict[str, Tensor]] = WeakKeyDictionary()  # the least recent first

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
        rows: dict[str, list[int]] = {}
        for row, expert in enumerate(experts):
            rows.setdefault(expert.digest, []).append(row)
        parts: dict[str, list[tuple[Tensor, Tensor]]] = {}  # by target: the matrices, and the rows of each
        for expert in {expert.digest: expert for expert in experts}.values():
            for name, matrix in self.prepare(expert).items():
                index = torch.tensor(rows[expert.digest], device=matrix.device)
                parts.setdefault(name, []).append((matrix, index))
        with contextlib.ExitStack() as stack:
            for name, products in parts.items():
                handle = self._linear[name].register_forward_hook(_adder(len(experts), products))
                stack.callback(handle.remove)
            yield

    def prepare(self, expert: ServedExpert) -> Mapping[str, Tensor]:
        """The matrices of an expert by target."""
        matrices = self._matrices.pop(expert, None)
        if matrices is None:
            matrices = {
                name: compressed_rows(delta).to(self._linear[name].weight.device)
                for name, delta in (expert.adapter or {}).items()
                if delta.nnz
            }
        self._matrices[expert] = matrices
        while len(self._matrices) > KEPT_EXPERTS:
            del self._matrices[next(iter(self._matrices))]
        return matrices


def compressed_rows(delta: SparseDelta) -> Tensor:
    """A delta as a matrix of compressed rows, float32 [rows, columns], which shares values of that dtype with it."""
    entries = delta.expand()
    rows, columns = delta.shape
    firsts = (torch.arange(rows + 1) * columns).to(entries.indices.dtype)
    starts = torch.searchsorted(entries.indices, firsts, out_int32=True)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse CSR tensor support")
        return torch.sparse_csr_tensor(
            starts, (entries.indices % columns).int(), entries.values.float(), delta.shape, check_invariants=False
        )


def _adder(rows: int, products: Sequence[tuple[Tensor, Tensor]]) -> Callable[[nn.Module, tuple[Any, ...], Tensor], None]:
    """A hook that adds matrix·x to the output in the rows of each matrix."""

    def add(module: nn.Module, arguments: tuple[Any, ...], output: Tensor) -> None:
        x: Tensor = arguments[0]
        if x.ndim != 3 or len(x) != rows:
            raise ModelError(f"a layer takes inputs of shape {list(x.shape)}, in which the {rows} rows of a batch are lost.")
        for matrix, index in products:
            own = x.index_select(0, index).flatten(0, 1)
            output.index_add_(0, index, (matrix @ own.T).T.unflatten(0, (len(index), -1)))

    return add
