"""Sparsity of hidden states, vector by vector, beside Gaussian vectors of the same width."""

from dataclasses import dataclass, fields

import torch
from torch import Tensor

NULL_DRAWS = 4096


@dataclass(frozen=True, eq=False)
class Sparsity:
    """One number a vector, float64 [n]; h is a vector of d channels, p = h²/Σh². All but `kurtosis` lie in [0, 1].

    hoyer: (√d − ‖h‖₁/‖h‖₂)/(√d − 1) (Hoyer 2004). gini: of |h|. top5, top10: fraction of the energy in the largest 5 and
    10 % of the channels. effective_rank: exp(−Σ p ln p)/d, small where few channels hold the energy. kurtosis: E(h − h̄)⁴/Var²,
    3 of a Gaussian. above: fraction of channels with |h| above mean + standard deviation of |h|. channel: the largest p.
    """

    hoyer: Tensor
    gini: Tensor
    top5: Tensor
    top10: Tensor
    effective_rank: Tensor
    kurtosis: Tensor
    above: Tensor
    channel: Tensor

    def means(self) -> dict[str, float]:
        """The mean of each over the vectors."""
        return {field.name: float(vars(self)[field.name].mean()) for field in fields(self)}


def sparsity(states: Tensor) -> Sparsity:
    """Statistics of each row of `states` [n, d], d ≥ 2; none is all 0. They do not change with a row's scale."""
    h = states.double()
    d = h.shape[1]
    magnitude = h.abs()
    ascending = magnitude.sort(dim=1).values
    energy = h.square().sum(1)
    p = h.square() / energy[:, None]
    ranks = torch.arange(1, d + 1, dtype=torch.float64)
    centred = h - h.mean(1, keepdim=True)
    largest = ascending.flip(1).square().cumsum(1) / energy[:, None]
    return Sparsity(
        hoyer=(d**0.5 - magnitude.sum(1) / energy.sqrt()) / (d**0.5 - 1),
        gini=2 * (ranks * ascending).sum(1) / (d * magnitude.sum(1)) - (d + 1) / d,
        top5=largest[:, max(1, round(0.05 * d)) - 1],
        top10=largest[:, max(1, round(0.1 * d)) - 1],
        effective_rank=torch.special.entr(p).sum(1).exp() / d,
        kurtosis=centred.pow(4).mean(1) / centred.square().mean(1).square(),
        above=(magnitude > (magnitude.mean(1) + magnitude.std(1, correction=0))[:, None]).double().mean(1),
        channel=p.max(1).values,
    )


def outlier_channels(states: Tensor, fraction: float = 0.01) -> Tensor:
    """The channels with the largest mean energy over all rows of `states` [n, d], ascending: this fraction, at least one.

    A few channels of a trained language model are large in every state (Dettmers et al. 2022), and lead every statistic of
    sparsity whatever the text; without them the rest can be seen.
    """
    count = max(1, round(fraction * states.shape[1]))
    return states.double().square().mean(0).topk(count).indices.sort().values


def without_channels(states: Tensor, channels: Tensor) -> Tensor:
    """`states` [n, d] without these channels."""
    kept = torch.ones(states.shape[1], dtype=torch.bool)
    kept[channels] = False
    return states[:, kept]


def gaussian_sparsity(width: int, seed: int = 0) -> dict[str, float]:
    """The mean statistics of independent Gaussian vectors of `width` channels, over 4096 draws."""
    generator = torch.Generator().manual_seed(seed)
    return sparsity(torch.randn(NULL_DRAWS, width, generator=generator)).means()
