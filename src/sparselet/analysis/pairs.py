"""Whether two changes lie in the same places, point the same way, and span the same directions, beside chance."""

from dataclasses import dataclass

import torch
from torch import Tensor

from sparselet.analysis.spectrum import gram
from sparselet.delta import SparseDelta
from sparselet.errors import ShapeMismatch
from sparselet.masks import blocks_to_keep, top_k


@dataclass(frozen=True)
class Overlap:
    """Of two sets of entries of one target, or of targets together.

    shared: entries in both. first, second: entries in each. size: entries there are. signed: shared entries at which neither
    change is 0. agreeing: those at which both have one sign. product, first_energy, second_energy: Σ ab, Σ a², Σ b² of all
    entries.
    """

    shared: int
    first: int
    second: int
    size: int
    signed: int
    agreeing: int
    product: float
    first_energy: float
    second_energy: float

    def __add__(self, other: "Overlap") -> "Overlap":
        return Overlap(*(a + b for a, b in zip(vars(self).values(), vars(other).values(), strict=True)))

    @property
    def jaccard(self) -> float:
        """|A ∩ B| / |A ∪ B|."""
        return self.shared / max(1, self.first + self.second - self.shared)

    @property
    def chance(self) -> float:
        """The Jaccard index of two independent random sets of these sizes, pq/(p + q − pq); p/(2 − p) where they are equal."""
        p, q = self.first / max(1, self.size), self.second / max(1, self.size)
        return p * q / (p + q - p * q) if p + q else 0.0

    @property
    def sign_agreement(self) -> float:
        """The fraction of signed shared entries at which both changes have one sign; chance is 1/2."""
        return self.agreeing / max(1, self.signed)

    @property
    def cosine(self) -> float:
        """⟨A, B⟩ / (‖A‖‖B‖); chance is 0."""
        scale = (self.first_energy * self.second_energy) ** 0.5
        return self.product / scale if scale else 0.0


def overlap_of(first: SparseDelta, second: SparseDelta, density: float | None = None) -> Overlap:
    """Compare two changes of one target: their masks, or with `density` the largest entries of each by magnitude.

    Raises ShapeMismatch, DensityOutOfRange.
    """
    if first.shape != second.shape:
        raise ShapeMismatch(f"one change has shape {list(first.shape)}, the other {list(second.shape)}.")
    changes = [delta.expand() for delta in (first, second)]
    keep = None if density is None else blocks_to_keep(density, first.size)
    a, b = (delta if keep is None else _largest(delta, keep) for delta in changes)
    shared_a, shared_b = _shared(a, b)
    signs = shared_a.sign() * shared_b.sign()
    product = sum((x.double() * y.double()).sum().item() for x, y in [_shared(*changes)])
    energies = [delta.values.double().square().sum().item() for delta in changes]
    signed, agreeing = int((signs != 0).sum()), int((signs > 0).sum())
    return Overlap(len(shared_a), a.nnz, b.nnz, first.size, signed, agreeing, product, *energies)


def _shared(first: SparseDelta, second: SparseDelta) -> tuple[Tensor, Tensor]:
    """The values of both at the entries that both have."""
    if first.nnz == second.nnz and torch.equal(first.indices, second.indices):
        return first.values, second.values
    inside = torch.isin(first.indices, second.indices, assume_unique=True)
    return first.values[inside], second.values[torch.searchsorted(second.indices, first.indices[inside])]


def subspace_overlap(first: Tensor, second: Tensor, rank: int) -> tuple[float, float]:
    """Mean cos² of the principal angles between the `rank` leading output directions of two dense changes, and chance.

    cos² = ‖U₁ᵀU₂‖²_F / rank (Björck & Golub 1973); of two random subspaces of R^rows it is rank / rows.
    """
    bases = [_leading(matrix, rank) for matrix in (first, second)]
    return float((bases[0].T @ bases[1]).square().sum() / rank), rank / first.shape[0]


def _leading(change: Tensor, rank: int) -> Tensor:
    """The output directions [rows, rank] of the largest singular values."""
    vectors = torch.linalg.eigh(gram(change)).eigenvectors[:, -rank:]
    return vectors if change.shape[0] <= change.shape[1] else torch.linalg.qr(change.float() @ vectors).Q


def _largest(delta: SparseDelta, count: int) -> SparseDelta:
    if delta.nnz <= count:
        return delta
    kept = top_k(delta.values.abs(), count).long()
    return SparseDelta(delta.shape, delta.indices[kept], delta.values[kept])
