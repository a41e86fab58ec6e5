"""Profiles from a model and rows: one forward pass a row, so that nothing is padded."""

import contextlib
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sparselet.errors import ArgumentError, TaskError
from sparselet.evaluation_mode import evaluation_mode
from sparselet.io.memory import require_memory
from sparselet.names import Names
from sparselet.profiles.profile import RANK, PromptStates, SecondMoment, low_rank_plus_diagonal

logger = logging.getLogger("sparselet")

PROMPTS = 64  # of a profile

Inputs = Mapping[str, Any]  # the arguments of one forward pass


def profiled_targets(model: nn.Module, names: Iterable[str]) -> list[str]:
    """Those of the targets that are weights of linear layers of their own, which have inputs to profile.

    model: the base model, without adapters. An output layer that shares the embedding's weight is left out.
    """
    layers = Names(model)
    return [name for name in names if name in layers.layers and layers.layers[name].linear and len(layers.shared[name]) == 1]


def sample_rows(count: int, limit: int | None = None) -> list[int]:
    """Positions of rows in a random order, the same for every call with this count; at most `limit` of them."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(0)).tolist()[:limit]


@torch.inference_mode()
def collect_moments(
    model: nn.Module, targets: Sequence[str], rows: Iterable[Inputs], rank: int | None = RANK
) -> tuple[dict[str, SecondMoment], dict[str, str]]:
    """XᵀX/n of each distinct input of the targets over all n tokens of the rows, and the input of each target, as in `Profile`.

    A target that no row uses, in a mixture of experts, is left out.

    model: with the expert applied; left in its mode. targets: names of linear layers.
    rows: the arguments of a forward pass each, of one row without padding. rank: of each moment; None keeps it in full. Sums
    are float32. Raises ArgumentError (no target), TaskError (no rows), NotEnoughMemory.
    """
    if not targets:
        raise ArgumentError("the expert changes no linear layer, so it has no inputs to profile.")
    device = next(model.parameters()).device
    sums: dict[str, Tensor] = {}  # by the first target of an input
    counts: dict[str, int] = {}
    first_of: dict[str, str] = {}
    with evaluation_mode(model), _hooks(model, targets, sums, counts, first_of):
        for row in rows:
            forward: Any = model
            forward(**{name: value.to(device) if isinstance(value, Tensor) else value for name, value in row.items()})
    if not sums:
        raise TaskError("a profile needs rows that use the targets; there are none.")
    name, width = max(((name, len(matrix)) for name, matrix in sums.items()), key=lambda entry: entry[1])
    if counts[name] < width:
        logger.warning("The profile has %d tokens for inputs of width %d; more rows make it more exact.", counts[name], width)
    moments = {}
    for first in list(sums):
        moments[first] = low_rank_plus_diagonal(sums.pop(first) / counts[first], rank)
    return moments, first_of


@torch.inference_mode()
def prompt_states(model: Any, prompts: Iterable[Sequence[int]]) -> Tensor:
    """The last hidden state at the last token of each prompt, float32 [prompts, width]; of an encoder where there is one.

    model: of transformers, left in its mode. prompts: token ids. Raises TaskError without prompts.
    """
    body = model.get_encoder() if model.config.is_encoder_decoder else model.base_model
    states = []
    with evaluation_mode(model):
        for prompt in prompts:
            ids = torch.tensor([list(prompt)], device=model.device)
            output = body(input_ids=ids, attention_mask=torch.ones_like(ids))
            states.append(output.last_hidden_state[0, -1].float().cpu())
    if not states:
        raise TaskError("a profile needs at least one prompt.")
    return torch.stack(states)


def describe_prompts(states: Tensor, rank: int | None = RANK) -> PromptStates:
    """Mean and covariance of prompt states [prompts, width]; the covariance is divided by the number of prompts."""
    mean = states.double().mean(dim=0)
    centred = states.double() - mean
    rank = min(len(states), states.shape[1] if rank is None else rank)
    return PromptStates(mean.float(), low_rank_plus_diagonal(centred.T @ centred / len(states), rank), len(states))


@contextlib.contextmanager
def _hooks(
    model: nn.Module, targets: Sequence[str], sums: dict[str, Tensor], counts: dict[str, int], first_of: dict[str, str]
) -> Iterator[None]:
    """Within the block each forward pass adds the inputs of the targets to the sums.

    Query, key and value layers are called one after the other with one tensor, which is added once, for the first of them.
    """
    last: list[Any] = [None, ""]  # the input that was added last, and its target

    def add(name: str, arguments: tuple[Any, ...], keywords: Mapping[str, Any]) -> None:
        tensor = arguments[0] if arguments else next(iter(keywords.values()))
        if tensor is last[0] and first_of.get(name, last[1]) == last[1]:
            first_of[name] = last[1]
            return
        last[:] = [tensor, name]
        first_of[name] = name
        rows = tensor.detach().reshape(-1, tensor.shape[-1]).float()
        if name not in sums:
            width = rows.shape[1]
            require_memory(4 * width**2 * max(1, len(targets) // 3), "the second moments of the targets' inputs")
            sums[name], counts[name] = torch.zeros(width, width, device=rows.device), 0
        sums[name].addmm_(rows.T, rows)
        counts[name] += len(rows)

    def hook_of(name: str) -> Any:
        return lambda module, arguments, keywords: add(name, arguments, keywords)

    with contextlib.ExitStack() as stack:
        for name in targets:
            handle = model.get_submodule(name).register_forward_pre_hook(hook_of(name), with_kwargs=True)
            stack.callback(handle.remove)
        try:
            yield
        finally:
            last[:] = [None, ""]
