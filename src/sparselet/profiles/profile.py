"""`Profile`: what an expert's own rows look like to the model, for merging (RegMean) and routing."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sparselet.errors import ArgumentError
from sparselet.fingerprint import Fingerprint

RANK = 32  # of stored moments
_EXACT = 512  # the widest matrix that is decomposed in full
_ITERATIONS = 12
_OVERSAMPLING = 16


@dataclass(frozen=True, eq=False)
class SecondMoment:
    """C = Fᵀ·F + diag(r): a symmetric matrix [d, d] without negative eigenvalues, as a part of low rank and a diagonal.

    factor: F, float32 [rank, d]. diagonal: r, float32 [d], not negative.
    transposed: the target of these inputs is stored [in, out], as GPT-2's `Conv1D` does.
    """

    factor: Tensor
    diagonal: Tensor
    transposed: bool = False

    @property
    def width(self) -> int:
        """d."""
        return len(self.diagonal)

    @property
    def trace(self) -> float:
        """Σ Cᵢᵢ."""
        return float(self.full_diagonal().sum())

    def __repr__(self) -> str:
        return f"SecondMoment({self.width}×{self.width}, rank {len(self.factor)} + diagonal)"

    def full_diagonal(self) -> Tensor:
        """Cᵢᵢ, float64 [d]."""
        return self.diagonal.double() + self.factor.double().square().sum(dim=0)

    def to_dense(self) -> Tensor:
        """C, float64 [d, d]."""
        factor = self.factor.double()
        return factor.T @ factor + self.diagonal.double().diag()


@dataclass(frozen=True, eq=False)
class PromptStates:
    """The base model's last hidden states at the last token of each prompt; of an encoder-decoder model its encoder's.

    mean: float32 [width]. covariance: around the mean. count: prompts.
    """

    mean: Tensor
    covariance: SecondMoment
    count: int


@dataclass(frozen=True, eq=False)
class Profile:
    """An expert's own rows, as the model sees them.

    moments: XᵀX/n of each input X [n, d], in the base model with the expert applied, by the first target that has this input;
        may be read from a file when it is looked up.
    inputs: of each target, the first that has the same input: query, key and value layers share theirs. transposed: the targets
        that are stored [in, out].
    prompts: where the prompts lie. fingerprints: the base model's, by target; None where unknown.
    tokens: n. rows: how many rows these tokens are of. task: the name of the rows' task.
    """

    moments: Mapping[str, SecondMoment]
    inputs: Mapping[str, str]
    transposed: frozenset[str]
    prompts: PromptStates
    fingerprints: Mapping[str, Fingerprint | None]
    tokens: int
    rows: int
    task: str | None = None

    def moment(self, target: str) -> SecondMoment | None:
        """The second moment of a target's input, None where the target was not profiled."""
        if target not in self.inputs:
            return None
        return replace(self.moments[self.inputs[target]], transposed=target in self.transposed)

    def __repr__(self) -> str:
        task = f"{self.task}, " if self.task else ""
        return f"Profile({task}{len(self.inputs)} targets, {self.tokens} tokens of {self.rows} rows)"


def low_rank_plus_diagonal(matrix: Tensor, rank: int | None) -> SecondMoment:
    """C as its `rank` largest eigenpairs and the diagonal of the rest, so that the diagonal of C is kept exactly.

    matrix: C, symmetric, without negative eigenvalues, float32 or float64 [d, d]. rank: all eigenpairs where it is None. Above
    d = 512 a smaller rank is computed by subspace iteration (Halko et al. 2011, algorithm 4.4) from a fixed start.
    Raises ArgumentError for a rank below 1.
    """
    if rank is not None and rank < 1:
        raise ArgumentError(f"rank must be at least 1, got {rank}.")
    matrix, width = matrix.double(), len(matrix)
    rank = width if rank is None else min(rank, width)
    if width > _EXACT and rank + _OVERSAMPLING < width:
        start = torch.randn(width, rank + _OVERSAMPLING, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        basis = start.to(matrix.device)
        for _ in range(_ITERATIONS):
            basis = torch.linalg.qr(matrix @ basis).Q
        values, vectors = torch.linalg.eigh(basis.T @ matrix @ basis)
        vectors = basis @ vectors
    else:
        values, vectors = torch.linalg.eigh(matrix)
    factor = (vectors[:, -rank:] * values[-rank:].clamp_min(0).sqrt()).T.flip(0).float().cpu().contiguous()
    rest = matrix.diagonal().cpu() - factor.double().square().sum(dim=0)
    return SecondMoment(factor, rest.clamp_min(0).float())
