"""Adapters as LoRA: ΔW ≈ B A with B [out, r] and A [r, in], and how much of ΔW is lost."""

from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from re import escape
from typing import Any

import torch
from torch import Tensor, nn

from sparselet.adapter import PREFIX, as_expert
from sparselet.delta import SparseDelta, check_dense_shape
from sparselet.errors import ArgumentError, ExportError
from sparselet.expert import ExpertOrDeltas
from sparselet.formats.linear_targets import linear_targets
from sparselet.formats.lora.read import A, B
from sparselet.formats.single_entries.write import write_peft
from sparselet.io.memory import require_memory
from sparselet.io.tensor_files import TensorStream
from sparselet.kernels import ENTRY

EXACT = 2e-6  # a relative error that float32's rounding makes
PROBE = 256  # the rank that is tried first
WHOLE = 1024  # a smaller side up to which all singular values are computed


def export_lora(
    adapter: ExpertOrDeltas,
    output: str | Path,
    rank: int | None = None,
    max_error: float = 0.01,
    base: nn.Module | None = None,
    progress: Callable[[str], None] | None = None,
) -> dict[str, float]:
    """Write a LoRA adapter that PEFT loads without sparselet; returns each target's relative error ‖ΔW − B A‖ / ‖ΔW‖.

    Where the rows or columns that are not zero are no more than the rank, B A is ΔW to the last bit: one factor holds them,
    the other says where they go. Otherwise it is the singular value decomposition cut at the rank, the best there is in the
    Frobenius norm (Eckart and Young 1936), for large targets up to what a randomised one loses.

    rank: of every target, filled with zeros where fewer suffice, so that engines that know no rank_pattern read it right;
        by default each target has the smallest at which it is exact, which for scattered entries is as large as the target, and
        for whole rows or columns their number.
    max_error: the largest relative error that is accepted; what float32's rounding makes always is.
    base: the base model, where it must tell which layers are linear and how they lie (see `linear_targets`).
    progress: called with each target's name when it is done.

    α = r for each target, so the scaling is 1; ranks that are not the usual one stand in rank_pattern and alpha_pattern.
    Raises ArgumentError, ExportError (a target loses more than max_error: the worst are named), UnknownTarget,
    NonFiniteValue, OutputExists, WriteFailed; nothing is left then.
    """
    if rank is not None and (isinstance(rank, bool) or not isinstance(rank, int) or rank < 1):
        raise ArgumentError(f"rank must be a positive integer, got {rank!r}.")
    if not max_error >= 0:
        raise ArgumentError(f"max_error must be a number of at least 0, got {max_error!r}.")
    adapter = as_expert(adapter)
    targets = linear_targets(adapter, base)
    transposed = all(target.transposed for target in targets.values())  # PEFT corrects it for layers that lie otherwise
    errors: dict[str, float] = {}
    ranks: dict[str, int] = {}

    def fill(stream: TensorStream) -> dict[str, Any]:
        for name, target in targets.items():
            check_dense_shape(target.shape, name)
            delta = adapter[name]
            core, rows, columns = _core(delta, target.transposed)
            lines = delta.block != ENTRY and 1 in delta.block  # a smaller rank would not be exact to the last bit
            b, a, errors[name] = factorise(core, min(core.shape) if lines and rank is None else rank)
            if b.shape[1]:  # a delta of zeros has none
                ranks[name] = rank or b.shape[1]
                out, inside = reversed(target.shape) if target.transposed else target.shape
                require_memory(8 * ranks[name] * (out + inside), f"a LoRA of rank {ranks[name]} of {name}")
                stream.add(PREFIX + name + A, _spread(a, columns, (ranks[name], inside)))
                stream.add(PREFIX + name + B, _spread(b.t(), rows, (ranks[name], out)).t())
            if progress is not None:
                progress(name)
        _refuse_errors(errors, max_error)
        if not ranks:
            raise ExportError("all of the adapter's values are 0, so there is nothing to write.")
        return _lora_config(ranks, transposed)

    names = [PREFIX + name + suffix for name in targets for suffix in (A, B)]
    write_peft(output, {"peft_type": "LORA"}, adapter, names, fill)
    return errors


def _core(delta: SparseDelta, transposed: bool) -> tuple[Tensor, Tensor, Tensor]:
    """The rows and columns of ΔW, as `nn.Linear` has it, in which it is not 0: float32 [n, m], and which they are, int64."""
    delta = delta.expand()
    kept = delta.values != 0
    indices, values = delta.indices[kept].long(), delta.values[kept].float()
    rows, columns = (torch.unique(axis, return_inverse=True) for axis in (indices // delta.shape[1], indices % delta.shape[1]))
    (rows, at_row), (columns, at_column) = (columns, rows) if transposed else (rows, columns)
    require_memory(4 * len(rows) * len(columns), f"a dense tensor of {len(rows)} rows and {len(columns)} columns")
    core = torch.zeros(len(rows), len(columns))
    core[at_row, at_column] = values
    return core, rows, columns


def _spread(factor: Tensor, places: Tensor, shape: tuple[int, int]) -> Tensor:
    """A factor [r, m] with its columns at their places in one of `shape`, and zeros elsewhere."""
    spread = torch.zeros(shape)
    spread[: factor.shape[0], places] = factor
    return spread


def factorise(dense: Tensor, rank: int | None) -> tuple[Tensor, Tensor, float]:
    """B [out, r], A [r, in] with r ≤ rank, and ‖dense − B A‖ / ‖dense‖ (Frobenius). dense: float32 [out, in].

    Without a rank the smallest is taken at which the error is within float32's. Zeros give r = 0 and no error.
    """
    rows, columns = (dense != 0).any(dim=1).nonzero().squeeze(1), (dense != 0).any(dim=0).nonzero().squeeze(1)
    exact = min(len(rows), len(columns))
    core = dense[rows][:, columns]
    factors = None
    if exact and (rank is None or rank < exact):
        factors = _smallest(core) if rank is None else _low_rank(core, rank)
    if factors is None:  # the rows that are not zero and where they go, or the columns
        identity = torch.eye(exact)
        left, right, error = (identity, core, 0.0) if len(rows) <= len(columns) else (core, identity, 0.0)
    else:
        left, right = factors
        error = float(torch.linalg.norm(core - left @ right) / torch.linalg.norm(core))
    b, a = torch.zeros(dense.shape[0], left.shape[1]), torch.zeros(right.shape[0], dense.shape[1])
    b[rows], a[:, columns] = left, right
    return b, a, error


def _smallest(core: Tensor) -> tuple[Tensor, Tensor] | None:
    """Exact factors of the smallest rank, if that is below both sides of `core`; None otherwise.

    Ranks are tried from PROBE on, each twice the last, by a random sample of the columns' space, up to a quarter of the smaller
    side; what has a higher rank is decomposed whole, by way of the smaller side's Gram matrix in float64.
    """
    exact = min(core.shape)
    probe = PROBE
    while exact > WHOLE and probe <= exact // 4:
        left, right = _cut(core, _sample(core, probe, rounds=1), probe)
        if left.shape[1] < probe and torch.linalg.norm(core - left @ right) <= EXACT * torch.linalg.norm(core):
            return left, right
        probe *= 2
    if exact <= WHOLE:
        left, right = _cut(core, None, exact)
    else:
        left, right = _by_gram(core)
    fits = left.shape[1] < exact and torch.linalg.norm(core - left @ right) <= EXACT * torch.linalg.norm(core)
    return (left, right) if fits else None


def _low_rank(core: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Factors of the best approximation of at most this rank, fewer where the rest is within float32's error.

    For large matrices by randomised subspace iteration (Halko, Martinsson and Tropp 2011, Algorithm 4.4), of a fixed seed.
    """
    small = min(core.shape) <= WHOLE or rank > min(core.shape) // 4
    return _cut(core, None if small else _sample(core, rank, rounds=6), rank)


def _sample(core: Tensor, rank: int, rounds: int) -> Tensor:
    """An orthonormal basis [rows, rank + 32] of about the space in which `core` is largest."""
    random = torch.randn(core.shape[1], rank + 32, generator=torch.Generator().manual_seed(0))
    basis = torch.linalg.qr(core @ random).Q
    for _ in range(rounds):
        basis = torch.linalg.qr(core @ torch.linalg.qr(core.t() @ basis).Q).Q
    return basis


def _cut(core: Tensor, basis: Tensor | None, rank: int) -> tuple[Tensor, Tensor]:
    """Singular vectors of `core`, or of what lies in `basis`, up to a rank or to where the rest is within float32's error."""
    # In float64, which tells what float32 rounded from what it holds.
    u, s, v = torch.linalg.svd((core if basis is None else basis.t() @ core).double(), full_matrices=False)
    r = min(rank, _rank_of(s))
    u = u[:, :r] if basis is None else basis.double() @ u[:, :r]
    return (u * s[:r].sqrt()).float(), (s[:r, None].sqrt() * v[:r]).float()


def _by_gram(core: Tensor) -> tuple[Tensor, Tensor]:
    """Factors of `core` by the eigenvectors of C Cᵀ, or Cᵀ C, whichever is smaller: memory goes with the smaller side."""
    wide = core.shape[0] <= core.shape[1]
    rows = (core if wide else core.t()).double()
    squares, vectors = torch.linalg.eigh(rows @ rows.t())
    s, vectors = squares.clamp(min=0).sqrt().flip(0), vectors.flip(1)
    r = _rank_of(s)
    left, right = vectors[:, :r].float(), (vectors[:, :r].t() @ rows).float()
    return (left, right) if wide else (right.t().contiguous(), left.t().contiguous())


def _rank_of(s: Tensor) -> int:
    """How many of descending singular values are needed for an error within float32's."""
    rest = s.square().flip(0).cumsum(0).flip(0).sqrt()  # what is lost by cutting before each
    return max(1, int((rest > EXACT / 2 * rest[0]).sum()))


def _refuse_errors(errors: Mapping[str, float], max_error: float) -> None:
    worst = sorted((name for name in errors if errors[name] > max(max_error, EXACT)), key=lambda name: -errors[name])
    if worst:
        named = ", ".join(f"{name} {errors[name]:.3g}" for name in worst[:5])
        raise ExportError(
            f"{len(worst)} of {len(errors)} targets lose more than the relative error {max_error:g} allowed: {named}"
            f"{', …' if len(worst) > 5 else ''}. Raise the rank, or max_error, or export to SHiRA or Super-Tuning, which are "
            "exact."
        )


def _lora_config(ranks: Mapping[str, int], transposed: bool) -> dict[str, Any]:
    """The fields of LoraConfig; the pattern of a target matches its whole name and nothing else."""
    counts = Counter(ranks.values())
    most = max(counts, key=lambda r: (counts[r], r))
    patterns = {f"^{escape(name)}": r for name, r in ranks.items() if r != most}
    return {
        "r": most,
        "lora_alpha": most,
        "rank_pattern": patterns,
        "alpha_pattern": patterns,
        "target_modules": list(ranks),
        "fan_in_fan_out": transposed,
        "bias": "none",
        "lora_dropout": 0.0,
        "use_rslora": False,
        "init_lora_weights": True,
    }
