"""Which entries of a change are enough, learned by gradient steps on their mask."""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from sparselet.activations.probe import ProbeRow
from sparselet.adapter import SparseAdapter
from sparselet.apply import apply_temporarily
from sparselet.delta import SparseDelta
from sparselet.expert import Expert
from sparselet.generation.padding import pad_batch
from sparselet.masks import blocks_to_keep, check_density, top_k
from sparselet.names import Names, as_rows

BATCH_ROWS = 8
RATE = 0.3  # of a step, where scores and gradients have a root mean square of 1
IGNORED_LABEL = -100  # torch's convention


def learn_graft(
    model: PreTrainedModel, expert: Expert, rows: Sequence[ProbeRow], fraction: float, *, steps: int = 20
) -> SparseAdapter:
    """The k = max(1, round(fraction · n)) of the n entries of each target whose graft has the lowest loss on `rows`, about.

    Each entry has a score, at first |Δ|, and a step keeps the k best, then lowers the scores by the gradient of the loss with
    respect to the mask, ∂L/∂γ = ∂L/∂W · Δ, straight through the choice (Panigrahi et al. 2023 §3 with a hard mask instead of a
    sigmoid's; scores and gradients are scaled to root mean square 1 in each target). Steps take rows in turn, eight at a time.

    model: causal; its weights are as before afterwards. Raises DensityOutOfRange, and what `apply_temporarily` raises.
    """
    check_density(fraction)
    deltas = {name: expert[name].expand() for name in expert}
    names = Names(model)
    parameters = {name: names.layers[target].parameter.requires_grad_() for name, target in names.find(expert).items()}
    scores = {name: _scaled(delta.values.abs().float()) for name, delta in deltas.items()}
    for step in range(steps):
        chosen = [rows[(step * BATCH_ROWS + i) % len(rows)] for i in range(min(BATCH_ROWS, len(rows)))]
        with apply_temporarily(model, _best(expert, deltas, scores, fraction)), torch.enable_grad():
            gradients = torch.autograd.grad(_loss(model, chosen), list(parameters.values()), allow_unused=True)
        for (name, delta), gradient in zip(deltas.items(), gradients, strict=True):
            if gradient is not None and delta.nnz:
                at_entries = as_rows(gradient).reshape(-1)[delta.indices.long().to(gradient.device)].cpu()
                scores[name] -= RATE * _scaled(at_entries.float() * delta.values.float())
    return _best(expert, deltas, scores, fraction)


def _best(expert: Expert, deltas: dict[str, SparseDelta], scores: dict[str, Tensor], fraction: float) -> SparseAdapter:
    kept = {}
    for name, delta in deltas.items():
        places = top_k(scores[name], blocks_to_keep(fraction, delta.nnz)).long() if delta.nnz else slice(0)
        kept[name] = SparseDelta(delta.shape, delta.indices[places], delta.values[places])
    return SparseAdapter(kept, expert.metadata, expert.fingerprints)


def _loss(model: PreTrainedModel, rows: Sequence[ProbeRow]) -> Tensor:
    """Mean over the scored tokens. Rows are padded on the right, where no earlier token sees it."""
    ids, mask = (tensor.to(model.device) for tensor in pad_batch([row.tokens for row in rows], 0, False))
    labels = torch.full_like(ids, IGNORED_LABEL)
    for i, row in enumerate(rows):
        scored = slice(len(row.tokens) - row.scored, len(row.tokens))
        labels[i, scored] = ids[i, scored]
    loss = model(input_ids=ids, attention_mask=mask, labels=labels, use_cache=False).loss
    assert loss is not None
    return loss


def _scaled(numbers: Tensor) -> Tensor:
    return numbers / numbers.square().mean().sqrt().clamp_min(torch.finfo(torch.float32).tiny)
