"""An optimizer's moments follow the entries of a mask that moves."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sparselet import kernels
from sparselet.errors import SelectionError


@dataclass(frozen=True)
class Seeds:
    """Of a new mask's blocks: g and the mean of g² over the scoring batches, in the shape of the values."""

    gradient: Tensor
    squares: Tensor


def _moments(optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> dict[str, Tensor]:
    """The tensors an optimizer keeps of a parameter, but for scalars such as the step count."""
    state = optimizer.state.get(parameter, {})
    return {key: value for key, value in state.items() if isinstance(value, Tensor) and value.ndim}


def require_movable(optimizer: torch.optim.Optimizer, parameter: nn.Parameter, target: str) -> None:
    for key, tensor in _moments(optimizer, parameter).items():
        if tensor.shape != parameter.shape:
            raise SelectionError(
                f"{type(optimizer).__name__} keeps {key!r} of {target} with shape {list(tensor.shape)}, not "
                f"{list(parameter.shape)}, so it cannot follow the mask. Use an optimizer with one moment an entry, "
                "such as AdamW."
            )


def move_moments(
    optimizer: torch.optim.Optimizer,
    parameter: nn.Parameter,
    before: Tensor | None,
    after: Tensor,
    block: kernels.Block,
    seeds: Seeds | None = None,
) -> None:
    """Carry the optimizer's state of a parameter over from the mask `before` (None: all entries) to `after`.

    Blocks that stay keep theirs. Those that are new start from zero; with `seeds`, Adam's moments start as m = (1 − β₁ᵗ)·g and
    v = (1 − β₂ᵗ)·mean g², so that their first step is lr·g/√(mean g²) whatever the optimizer's step t (SpIEL, Ansell et al.
    2024, gives each entry a step count of its own instead).
    """
    group = next((group for group in optimizer.param_groups if any(p is parameter for p in group["params"])), {})
    for key, tensor in _moments(optimizer, parameter).items():
        if before is None:
            optimizer.state[parameter][key] = kernels.gather(tensor.contiguous(), after, block)
            continue
        moved = torch.zeros((len(after), *tensor.shape[1:]), dtype=tensor.dtype, device=tensor.device)
        if seeds is not None and key in ("exp_avg", "exp_avg_sq") and "betas" in group:
            first = key == "exp_avg"
            steps = float(optimizer.state[parameter]["step"])
            moved += (1 - group["betas"][0 if first else 1] ** steps) * (seeds.gradient if first else seeds.squares).to(moved)
        if len(before):
            position = torch.searchsorted(before, after).clamp_max(len(before) - 1)
            stays = before[position] == after
            moved[stays] = tensor[position[stays]]
        optimizer.state[parameter][key] = moved
