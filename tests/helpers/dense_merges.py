"""What the trimming methods publish, on dense float64 tensors; and deltas to try it on."""

import torch
from helpers.strategies import random_delta, same_shape, spelt_out
from hypothesis import strategies as st
from torch import Tensor

from sparselet import SparseDelta

factors = st.lists(st.sampled_from([-2.0, -1.0, -0.5, 0.0, 0.5, 1.0, 3.0]), min_size=4, max_size=4)
densities = st.sampled_from([0.05, 0.2, 0.3, 0.5, 0.9, 1.0])


def normal(delta: SparseDelta, seed: int = 0) -> SparseDelta:
    """The same mask with normal values, whose magnitudes differ."""
    values = torch.randn(delta.values.shape, generator=torch.Generator().manual_seed(seed))
    return SparseDelta(delta.shape, delta.indices, values)


def distinct(smallest: int, largest: int) -> st.SearchStrategy[list[SparseDelta]]:
    """Several deltas of one shape without two equal magnitudes."""
    return same_shape(smallest, largest).map(lambda deltas: [normal(d, seed) for seed, d in enumerate(deltas)])


def full_deltas(count: int, shape: tuple[int, int] = (10, 20), density: float = 1.0) -> list[SparseDelta]:
    """Normal deltas of that many entries; `density` of them are not 0."""
    return [normal(random_delta(shape, 1, density, seed), seed) for seed in range(count)]


def stacked(deltas: list[SparseDelta]) -> Tensor:
    """ΔW of each, float64 [N, rows, columns]."""
    return torch.stack([spelt_out(delta)[0] for delta in deltas])


def entries(x: Tensor, density_of: str) -> int:
    return x.numel() if density_of == "size" else int((x != 0).sum())


def kept_count(density: float, count: int) -> int:
    return max(1, round(density * count))


def ranked(x: Tensor, k: int) -> float:
    """The k-th largest magnitude, 0 beyond the last."""
    magnitudes = x.abs().flatten().sort(descending=True).values
    return float(magnitudes[k - 1]) if k <= len(magnitudes) else 0.0


def largest(x: Tensor, density: float, density_of: str) -> Tensor:
    """x with all but its k largest magnitudes, and those equal to the k-th, set to 0."""
    return x * (x.abs() >= ranked(x, kept_count(density, entries(x, density_of))))


def band(x: Tensor, density: float, gamma: float, density_of: str) -> Tensor:
    """x without its outliers and its small entries."""
    count = entries(x, density_of)
    top = round(gamma * count)
    low, high = ranked(x, top + kept_count(density, count)), ranked(x, top + 1)
    return x * ((x.abs() >= low) & (x.abs() <= high))


def elected_mean(x: Tensor, weights: list[float], elect: str = "sum", mean: str = "count", scale: float = 1.0) -> Tensor:
    """Σ w·x over those of the elected sign, over their number or weight."""
    w = torch.tensor(weights, dtype=torch.float64).view(-1, 1, 1)
    ballots = w * x if elect == "weighted" else x
    votes = (ballots.sign() if elect == "count" else ballots).sum(0)
    agree = (ballots.sign() == votes.sign()) & (votes != 0)
    divisor = (agree * (w if mean == "weights" else torch.ones_like(w))).sum(0)
    return scale * torch.where(divisor != 0, (w * x * agree).sum(0) / divisor, 0.0)


def assert_close(delta: SparseDelta, dense: Tensor, mask: Tensor) -> None:
    """The delta has this mask, and these values to float32 rounding."""
    found, selected = spelt_out(delta)
    assert torch.equal(selected, mask)
    assert delta.values.dtype == torch.float32
    torch.testing.assert_close(found, dense.double(), rtol=1e-5, atol=1e-6)
