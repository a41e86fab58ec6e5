"""Padding of batches, and the side on which a model's rows may be padded: tried on the model itself, once per model."""

import inspect
from collections.abc import Collection, Sequence
from typing import Any, Literal
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from sparselet.errors import ModelError
from sparselet.evaluation_mode import evaluation_mode
from sparselet.models import attends_to_all, prefill, vocabulary_size

Side = Literal["left", "right"]

_SHORT, _LONG = 7, 12  # tokens of the rows that are tried
# Limits of the relative error of logits: by rounding with 16 bits, with more, and of a model that is refused.
_TOLERANCE_16_BIT, _TOLERANCE, _MISMATCH = 0.05, 1e-3, 0.2

# By model, while it exists. A property of the architecture: training does not change it.
_SIDES: WeakKeyDictionary[nn.Module, Side | None] = WeakKeyDictionary()
_PREFIX_CACHES: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


def padding_side(model: PreTrainedModel) -> Side | None:
    """The side on which rows may be padded: there a row's logits in a batch equal those of the row alone.

    Of a causal model the left where possible, since all targets then end in one column; of an encoder-decoder model the
    right. None if padding changes logits on both sides. Raises ModelError for a causal model that attends to the tokens it
    predicts, or counts positions unlike `generate` (as RoBERTa does).
    """
    if model not in _SIDES:
        row, longer = _probe_rows(model)
        with evaluation_mode(model), torch.no_grad():
            if model.config.is_encoder_decoder:
                alone, batched = _seq2seq_logits(model, [row]), _seq2seq_logits(model, [row, longer])
                _SIDES[model] = "right" if _relative_error(batched, alone) <= _tolerance(model) else None
            else:
                alone = _first_logits(model, row)
                if not alone.isfinite().all():
                    return "left"  # the weights hold NaN or infinity, which the caller's computation reports
                _require_causal(model, alone, row, longer)
                _SIDES[model] = _causal_side(model, alone, row, longer)
    return _SIDES[model]


def supports_prefix_cache(model: PreTrainedModel) -> bool:
    """Whether rows can continue from cached keys and values: a decoder of transformers with full attention in every layer,
    whose logits are then the same."""
    if not attends_to_all(model):
        return False
    if model not in _PREFIX_CACHES:
        row, continuation = _probe_rows(model)
        forward: Any = model
        with evaluation_mode(model), torch.no_grad():
            expected = _causal_logits(model, [[*row, *continuation]], "right")[:, len(row) :]
            if not expected.isfinite().all():
                return True
            mask = torch.ones(1, _SHORT + _LONG, dtype=torch.int64, device=model.device)
            logits = forward(
                input_ids=torch.tensor([continuation], device=model.device),
                attention_mask=mask,
                position_ids=position_ids(mask)[:, len(row) :],
                past_key_values=prefill(model, torch.tensor([row], device=model.device)),
                use_cache=True,
                **without_router_loss(forward_parameters(model)),
            ).logits
        _PREFIX_CACHES[model] = _relative_error(logits, expected) <= _tolerance(model)
    return _PREFIX_CACHES[model]


def pad(sequences: Sequence[Sequence[int]], value: int, left: bool) -> Tensor:
    """The sequences as [batch, length], with `value` added on one side up to the longest one's length."""
    length = max(len(sequence) for sequence in sequences)
    fill = [[value] * (length - len(sequence)) for sequence in sequences]
    return torch.tensor([[*f, *s] if left else [*s, *f] for f, s in zip(fill, sequences, strict=True)])


def pad_batch(sequences: Sequence[Sequence[int]], token: int, left: bool) -> tuple[Tensor, Tensor]:
    """Token ids and attention mask, both [batch, length], padded with `token`."""
    return pad(sequences, token, left), pad([[1] * len(sequence) for sequence in sequences], 0, left)


def position_ids(mask: Tensor) -> Tensor:
    """The position of each token in its own row, [batch, length], for rows with an attention mask of that shape."""
    return (mask.cumsum(1) - 1).clamp_min(0)


def forward_parameters(model: nn.Module) -> frozenset[str]:
    """The names of the parameters of a model's forward function."""
    return frozenset(inspect.signature(model.forward).parameters)


def without_router_loss(parameters: Collection[str]) -> dict[str, bool]:
    """The argument by which a forward function of these parameters computes no router's loss of a mixture of experts.

    That loss depends on all tokens of a batch, and cannot be computed with a cache.
    """
    return {"output_router_logits": False} if "output_router_logits" in parameters else {}


def _probe_rows(model: PreTrainedModel) -> tuple[list[int], list[int]]:
    """A short and a longer row of tokens."""
    size = vocabulary_size(model)
    short, longer = ([(start + 5 * i) % size for i in range(length)] for start, length in ((3, _SHORT), (4, _LONG)))
    return short, longer


def _tolerance(model: PreTrainedModel) -> float:
    return _TOLERANCE_16_BIT if model.dtype in (torch.float16, torch.bfloat16) else _TOLERANCE


def _first_logits(model: PreTrainedModel, row: Sequence[int]) -> Tensor:
    """The logits of a row alone. Raises ModelError for a model that cannot compute them."""
    try:
        return _causal_logits(model, [row], "right")
    except Exception as error:  # whatever a model raises
        raise ModelError(f"the model ({model.config.model_type}) cannot compute a row of tokens: {error}") from error


def _require_causal(model: PreTrainedModel, alone: Tensor, row: list[int], longer: list[int]) -> None:
    """Raise ModelError if the logits of a row, `alone`, depend on later tokens or on how positions are counted."""
    if _relative_error(_causal_logits(model, [row + longer], "right")[:, :_SHORT], alone) > _MISMATCH:
        raise ModelError(
            f"the model ({model.config.model_type}) sees the tokens that it is to predict, so it is no causal language "
            "model; it may be an encoder, or need is_decoder in its config.json."
        )
    positioned = _padded_logits(model, [row], "left")
    if positioned is not None and _relative_error(positioned, alone) > _MISMATCH:
        raise ModelError(
            f"the model ({model.config.model_type}) counts positions otherwise than transformers' `generate` gives them, "
            "so its answers would not be those that it is trained to give."
        )


def _causal_side(model: PreTrainedModel, alone: Tensor, row: list[int], longer: list[int]) -> Side | None:
    """The first side on which padding leaves the logits of a row as they are alone."""
    sides: dict[Side, slice] = {"left": slice(-_SHORT, None), "right": slice(0, _SHORT)}
    for side, columns in sides.items():
        padded = _padded_logits(model, [row, longer], side)
        if padded is not None and _relative_error(padded[:, columns], alone) <= _tolerance(model):
            return side
    return None


def _causal_logits(model: Any, rows: Sequence[Sequence[int]], side: Side) -> Tensor:
    """The first row's logits [1, length, vocabulary] in a batch of the rows."""
    ids, mask = (tensor.to(model.device) for tensor in pad_batch(rows, 1, side == "left"))
    parameters = forward_parameters(model)
    inputs = {"attention_mask": mask, **({"position_ids": position_ids(mask)} if side == "left" else {})}
    inputs = {name: value for name, value in inputs.items() if name in parameters}
    return model(input_ids=ids, **inputs, **without_router_loss(parameters)).logits[:1]


def _padded_logits(model: Any, rows: Sequence[Sequence[int]], side: Side) -> Tensor | None:
    """`_causal_logits`, or None of a model that takes no such mask or positions."""
    try:
        return _causal_logits(model, rows, side)
    except Exception:  # whatever a model raises
        return None


def _seq2seq_logits(model: Any, rows: Sequence[Sequence[int]]) -> Tensor:
    """The first row's logits [1, length, vocabulary] in a batch of the rows, as prompts; targets are their first tokens."""
    ids, mask = (tensor.to(model.device) for tensor in pad_batch(rows, 1, left=False))
    router = without_router_loss(forward_parameters(model))
    return model(input_ids=ids, attention_mask=mask, decoder_input_ids=ids[:, :_SHORT], **router).logits[:1]


def _relative_error(logits: Tensor, expected: Tensor) -> float:
    """The median over positions of the largest error, relative to the spread: rounding may choose other experts at a few."""
    logits, expected = logits.double(), expected.double()
    return float((logits - expected).abs().amax(-1).median() / expected.std().clamp_min(1e-30))
