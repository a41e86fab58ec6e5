"""`steered`: within a block a model's residual stream is moved; after it the model is as it was."""

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from sparselet.errors import ArgumentError, ModelError, ShapeMismatch
from sparselet.fingerprint import fingerprint_weight, require_same_base
from sparselet.generation.decode import can_decode
from sparselet.generation.generate import WITHOUT_PREFIX
from sparselet.generation.padding import padding_side
from sparselet.steering.vector import SteeringVector


class Steering:
    """What is added in a block, at the last position of every pass, or from position `start` on.

    change: [width], or [rows, 1, width].
    """

    def __init__(self, change: Tensor) -> None:
        self.change = change
        self.start: int | None = None

    def __call__(self, module: nn.Module, inputs: Any, output: Any) -> Any:
        """A forward hook of a block, whose output is, or begins with, its hidden states [rows, tokens, width]."""
        states = output[0] if isinstance(output, tuple) else output
        moved = states.clone()
        moved[:, -1 if self.start is None else self.start :] += self.change.to(states)
        return (moved, *output[1:]) if isinstance(output, tuple) else moved


@contextlib.contextmanager
def steered(model: PreTrainedModel, vector: SteeringVector | str | Path, strength: float | None = None) -> Iterator[Steering]:
    """Within the block strength · v is added to the output of the vector's block, at the last position of every pass.

        with sl.steered(model, "concise"):
            model.generate(**prompt)

    So a prompt is steered at its last token and an answer at each of its tokens, as in ASC (Azizi et al. 2025); prompts of a
    batch must be padded on the left. Adapters of any kind work as without it; blocks may be nested, and their vectors add up.

    strength: by default the vector's own; negative steers the other way. What is yielded can steer from a position on.
    Raises ModelError (no decoder with a list of blocks), ArgumentError (the model has no such block), ShapeMismatch (another
    width), WrongBase, and what reading a vector raises.
    """
    vector = vector if isinstance(vector, SteeringVector) else SteeringVector.load(vector)
    block = block_of(model, vector)
    can_decode(model)  # both are measured once, by passes over the model, and are those of the model as it is
    padding_side(model)
    steering = Steering((vector.strength if strength is None else strength) * vector.values)
    outer = model in WITHOUT_PREFIX
    handle = block.register_forward_hook(steering)
    WITHOUT_PREFIX.add(model)
    try:
        yield steering
    finally:
        handle.remove()
        if not outer:
            WITHOUT_PREFIX.discard(model)


@contextlib.contextmanager
def steered_rows(model: PreTrainedModel, changes: Sequence[tuple[int, Tensor] | None]) -> Iterator[None]:
    """Within the block a pass of as many rows adds changes[i], a block's number and [width], at the last position of row i."""
    blocks = blocks_of(model) if any(changes) else []
    with contextlib.ExitStack() as stack:
        for layer in sorted({change[0] for change in changes if change}):
            width = next(change[1] for change in changes if change)
            rows = [change[1] if change and change[0] == layer else torch.zeros_like(width) for change in changes]
            stack.callback(blocks[layer].register_forward_hook(Steering(torch.stack(rows)[:, None])).remove)
        yield


def blocks_of(model: PreTrainedModel) -> nn.ModuleList:
    """The blocks of a decoder, in order. Raises ModelError."""
    count = model.config.get_text_config().num_hidden_layers if not model.config.is_encoder_decoder else None
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList) and len(module) == count]
    if not lists:
        raise ModelError(f"steering needs a decoder with one list of blocks; {type(model).__name__} is none.")
    return lists[0]


def block_of(model: PreTrainedModel, vector: SteeringVector) -> nn.Module:
    """The block that a vector belongs to, if it fits the model. Raises what `steered` raises."""
    blocks, embedding = blocks_of(model), embedding_of(model)
    if not 0 <= vector.layer < len(blocks):
        raise ArgumentError(f"layer must be a block of the model, 0 to {len(blocks) - 1}, got {vector.layer}.")
    width = model.config.get_text_config().hidden_size
    if vector.width != width:
        raise ShapeMismatch(f"the steering vector has width {vector.width}, the model {width}.")
    own = {"the input embedding": fingerprint_weight(embedding)}
    require_same_base({"the input embedding": vector.fingerprint}, own, "steering vector and model")
    return blocks[vector.layer]


def embedding_of(model: PreTrainedModel) -> Tensor:
    """The weight of the input embedding, by which a vector knows its base model: adapters of other layers leave it."""
    weight = model.get_input_embeddings().weight
    assert isinstance(weight, Tensor)
    return weight


@torch.no_grad()
def block_outputs(model: PreTrainedModel, tokens: list[int]) -> Tensor:
    """What each block writes at the last token, float32 [blocks, width]."""
    written: list[Tensor] = []

    def keep(module: nn.Module, inputs: Any, output: Any) -> None:
        states = output[0] if isinstance(output, tuple) else output
        written.append(states[0, -1].float().cpu())

    with contextlib.ExitStack() as stack:
        for block in blocks_of(model):
            stack.callback(block.register_forward_hook(keep).remove)
        model(input_ids=torch.tensor([tokens], device=model.device), use_cache=False)
    return torch.stack(written)
