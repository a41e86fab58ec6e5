"""Hidden states of a causal model at positions of each prompt, and the loss of what follows it."""

import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sparselet.errors import ArgumentError
from sparselet.evaluation_mode import evaluation_mode

PROBE_TOKENS = 2048  # of a batch, padded


@dataclass(frozen=True)
class ProbeRow:
    """Token ids of a text, of which the last `scored` are predicted for the loss. States are those of the prompt, the tokens
    before them, of which there is at least one."""

    tokens: tuple[int, ...]
    scored: int = 0


@dataclass(frozen=True, eq=False)
class Probe:
    """layers: numbers of `hidden_states`: 0 is the embedding, k the output of block k, the last also passed the final norm.
    states: float32 [layers, rows, positions, width]. losses: float64 [rows], mean over a row's scored tokens; NaN without."""

    layers: tuple[int, ...]
    states: Tensor
    losses: Tensor


@torch.inference_mode()
def probe(
    model: Any,
    rows: Sequence[ProbeRow],
    layers: Sequence[int],
    *,
    positions: Sequence[int] = (-1,),
    progress: Callable[[int], None] | None = None,
) -> Probe:
    """One forward pass over all rows, in batches of like length; the model is left in its mode.

    model: a causal language model of transformers. Rows are padded on the right, where no earlier token sees it.
    layers: negative ones count from the last. positions: of the prompt's tokens, negative ones count from its last; in a prompt
    that is too short for one, its nearest token. progress: called with the number of rows just read.
    Raises ArgumentError for a row that is too short, and for a layer that there is not.
    """
    for number, row in enumerate(rows, 1):
        if len(row.tokens) <= row.scored:
            raise ArgumentError(f"row {number} has {len(row.tokens)} tokens; expected more than the {row.scored} scored ones.")
    keeps_logits = "logits_to_keep" in inspect.signature(model.forward).parameters
    states: list[Tensor] = [torch.empty(0)] * len(rows)
    losses = torch.full((len(rows),), torch.nan, dtype=torch.float64)
    chosen: tuple[int, ...] = ()
    with evaluation_mode(model):
        for batch in _batches(rows):
            ids, mask = (tensor.to(model.device) for tensor in _padded([rows[i].tokens for i in batch]))
            first = min(len(rows[i].tokens) - max(1, rows[i].scored) - 1 for i in batch)
            kept = ids.shape[1] - max(0, first)
            extra = {"logits_to_keep": kept} if keeps_logits else {}
            output: Any = model(input_ids=ids, attention_mask=mask, output_hidden_states=True, use_cache=False, **extra)
            chosen = _chosen(layers, len(output.hidden_states))
            logits = output.logits[:, -kept:]
            for at, i in enumerate(batch):
                row, offset = rows[i], ids.shape[1] - kept
                last = len(row.tokens) - row.scored - 1
                places = [min(max(0, place if place >= 0 else last + 1 + place), last) for place in positions]
                states[i] = torch.stack([output.hidden_states[layer][at, places].float().cpu() for layer in chosen])
                if row.scored:
                    predicted = logits[at, last - offset : len(row.tokens) - 1 - offset].double().log_softmax(-1)
                    expected = torch.tensor(row.tokens[-row.scored :], device=predicted.device)
                    losses[i] = -predicted.gather(1, expected[:, None]).mean().cpu()
            if progress is not None:
                progress(len(batch))
    return Probe(chosen, torch.stack(states, dim=1) if rows else torch.empty(0, 0, 0, 0), losses)


def _batches(rows: Sequence[ProbeRow]) -> Iterator[list[int]]:
    order = sorted(range(len(rows)), key=lambda i: len(rows[i].tokens))
    batch: list[int] = []
    for i in order:
        if batch and (len(batch) + 1) * len(rows[i].tokens) > PROBE_TOKENS:
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


def _padded(rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    width = max(len(row) for row in rows)
    ids = torch.tensor([[*row, *[0] * (width - len(row))] for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    return ids, mask


def _chosen(layers: Sequence[int], count: int) -> tuple[int, ...]:
    for layer in layers:
        if not -count <= layer < count:
            raise ArgumentError(f"there is no layer {layer}; the model has hidden states 0 to {count - 1}.")
    return tuple(layer % count for layer in layers)
