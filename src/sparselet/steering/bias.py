"""A steering vector as the change of a bias, for engines that know no steering."""

import torch
from transformers import PreTrainedModel

from sparselet.adapter import SparseAdapter
from sparselet.delta import SparseDelta
from sparselet.errors import ExportError
from sparselet.expert import Expert
from sparselet.models import vocabulary_size
from sparselet.names import Names
from sparselet.steering.switch import block_of, steered
from sparselet.steering.vector import SteeringVector

_PROBE = 8  # tokens of the row that a bias is tried on
_TOLERANCE = 1e-4  # of the largest logit


def with_steering(model: PreTrainedModel, expert: Expert, vector: SteeringVector) -> SparseAdapter:
    """The expert with strength · v added to a bias of the vector's block, which moves its output at all positions.

    So prompts are steered at each token too, not only where answers begin. Any bias of the model's width is tried, the last
    first, on a row of tokens: it must move the logits as the vector does.
    model: the base model, without the expert. Raises ExportError where the block has no such bias, and what `steered` raises.
    """
    block = block_of(model, vector)
    own = {id(parameter): parameter for parameter in block.parameters() if tuple(parameter.shape) == (vector.width,)}
    targets = {name: layer for name, layer in Names(model).layers.items() if id(layer.parameter) in own and not layer.is_weight}
    change = vector.strength * vector.values
    tokens = torch.arange(_PROBE, device=model.device)[None] % vocabulary_size(model)
    with torch.no_grad(), steered(model, vector) as steering:
        steering.start = 0
        expected = model(input_ids=tokens, use_cache=False).logits
    for name, layer in reversed(targets.items()):
        before = layer.parameter.data
        try:
            layer.parameter.data = before + change.to(before)
            with torch.no_grad():
                moved = model(input_ids=tokens, use_cache=False).logits
        finally:
            layer.parameter.data = before
        if (moved - expected).abs().max() <= _TOLERANCE * expected.abs().max():
            delta = SparseDelta.from_dense(change[None], torch.ones(1, vector.width, dtype=torch.bool))
            deltas = {target: expert[target] for target in expert}
            deltas[name] = deltas[name] + delta if name in deltas else delta
            return SparseAdapter(deltas, expert.metadata, expert.fingerprints)
    raise ExportError(
        f"block {vector.layer} of {type(model).__name__} has no bias that moves its output, so a checkpoint cannot hold the "
        "steering vector. Steer while answering instead: sparselet.steered(model, vector)."
    )
