"""Where the rows of a batch may be filled up, so that each is computed as it is alone: tried on the model itself."""

import contextlib
import inspect
from collections.abc import Collection, Iterator, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from sparselet.errors import ModelError
from sparselet.models import attends_to_all, prefill, vocabulary_size

Side = Literal["left", "right"]

_SHORT, _LONG = 7, 12  # tokens of the rows that are tried
# How far logits may be off by rounding, of their spread: with 16 bits, with more, and where a difference ends in an error.
_CLOSE_16_BIT, _CLOSE, _FAR = 0.05, 1e-3, 0.2


@torch.no_grad()
def padding_side(model: PreTrainedModel) -> Side | None:
    """The side on which rows may be filled up: on it a row's logits in a batch are those of the row alone.

    Of a causal model the left, where it goes, since all targets then end in one column; of an encoder-decoder model the
    right. None where the model sees its padding on both. Raises ModelError for a causal model that sees the tokens which are
    to be predicted, or counts its positions in a way of its own (RoBERTa's kind), which `generate` does not keep to.
    """
    row, other, close = *_rows(model), _close(model)
    with _evaluating(model):
        if model.config.is_encoder_decoder:
            return "right" if _off(_seq2seq(model, [row, other]), _seq2seq(model, [row])) <= close else None
        try:
            alone = _causal(model, [row], "right")
        except Exception as error:  # whatever a model raises
            raise ModelError(f"the model ({model.config.model_type}) does not answer a row of tokens: {error}") from error
        if not alone.isfinite().all():
            return "left"  # weights that are lost already; whoever computes with them says so
        if _off(_causal(model, [row + other], "right")[:, :_SHORT], alone) > _FAR:
            raise ModelError(
                f"the model ({model.config.model_type}) sees the tokens that it is to predict, so it is no causal language "
                "model; it may be an encoder, or need is_decoder in its config.json."
            )
        counted = _attempt(model, [row], "left")
        if counted is not None and _off(counted, alone) > _FAR:
            raise ModelError(
                f"the model ({model.config.model_type}) counts positions otherwise than transformers' `generate` gives them, "
                "so its answers would not be those that it is trained to give."
            )
        sides: dict[Side, slice] = {"left": slice(-_SHORT, None), "right": slice(0, _SHORT)}
        for side, columns in sides.items():
            filled = _attempt(model, [row, other], side)
            if filled is not None and _off(filled[:, columns], alone) <= close:
                return side
    return None


@torch.no_grad()
def continues(model: PreTrainedModel) -> bool:
    """Whether rows can go on from keys and values that were computed before: a decoder of transformers' kind with full
    attention in every layer, to whose logits it makes no difference."""
    if not attends_to_all(model):
        return False
    row, other = _rows(model)
    with _evaluating(model):
        alone = _causal(model, [[*row, *other]], "right")
        cache = prefill(model, torch.tensor([row], device=model.device))
        ids = torch.tensor([other], device=model.device)
        mask = torch.ones(1, len(row) + len(other), dtype=torch.int64, device=model.device)
        forward: Any = model
        after = forward(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions(mask)[:, len(row) :],
            past_key_values=cache,
            use_cache=True,
            **without_router_loss(forward_parameters(model)),
        ).logits
    return not alone.isfinite().all() or _off(after, alone[:, len(row) :]) <= _close(model)


def positions(mask: Tensor) -> Tensor:
    """The position of each token in its own row, [batch, length], for rows with an attention mask of that shape."""
    return (mask.cumsum(1) - 1).clamp_min(0)


def forward_parameters(model: nn.Module) -> frozenset[str]:
    """The names of the parameters of a model's forward function."""
    return frozenset(inspect.signature(model.forward).parameters)


def without_router_loss(parameters: Collection[str]) -> dict[str, bool]:
    """What a forward function of these parameters is given, so that a mixture of experts computes no loss of its router.

    Over all tokens of a batch, it depends on what else is in it, and goes with no cache.
    """
    return {"output_router_logits": False} if "output_router_logits" in parameters else {}


def _rows(model: PreTrainedModel) -> tuple[list[int], list[int]]:
    """Two rows of tokens, to be tried."""
    size = vocabulary_size(model)
    short, long = ([(start + 5 * i) % size for i in range(length)] for start, length in ((3, _SHORT), (4, _LONG)))
    return short, long


def _close(model: PreTrainedModel) -> float:
    return _CLOSE_16_BIT if model.dtype in (torch.float16, torch.bfloat16) else _CLOSE


def _causal(model: Any, rows: Sequence[Sequence[int]], side: Side) -> Tensor:
    """The first row's logits [1, length, vocabulary] in a batch of the rows."""
    ids, mask = _filled(rows, side, model.device)
    taken = {"attention_mask": mask, **({"position_ids": positions(mask)} if side == "left" else {})}
    known = forward_parameters(model)
    taken = {key: value for key, value in taken.items() if key in known}
    return model(input_ids=ids, **taken, **without_router_loss(known)).logits[:1]


def _attempt(model: Any, rows: Sequence[Sequence[int]], side: Side) -> Tensor | None:
    """`_causal`, or None of a model that takes no such mask or positions."""
    try:
        return _causal(model, rows, side)
    except Exception:  # whatever a model raises
        return None


def _seq2seq(model: Any, rows: Sequence[Sequence[int]]) -> Tensor:
    ids, mask = _filled(rows, "right", model.device)
    router = without_router_loss(forward_parameters(model))
    return model(input_ids=ids, attention_mask=mask, decoder_input_ids=ids[:, :_SHORT], **router).logits[:1]


def _filled(rows: Sequence[Sequence[int]], side: Side, device: torch.device) -> tuple[Tensor, Tensor]:
    """Token ids and attention mask, both [rows, length]."""
    longest = max(len(row) for row in rows)
    ids, mask = torch.ones(len(rows), longest, dtype=torch.int64), torch.zeros(len(rows), longest, dtype=torch.int64)
    for i, row in enumerate(rows):
        columns = slice(longest - len(row), None) if side == "left" else slice(0, len(row))
        ids[i, columns], mask[i, columns] = torch.tensor(row), 1
    return ids.to(device), mask.to(device)


def _off(logits: Tensor, alone: Tensor) -> float:
    """How far logits are off at the middle one of their positions: where experts are chosen, rounding may choose others."""
    logits, alone = logits.double(), alone.double()
    return float((logits - alone).abs().amax(-1).median() / alone.std().clamp_min(1e-30))


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
