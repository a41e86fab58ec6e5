"""Batches for completion-only training, with logits only where there is a target."""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from sparselet.prompts import pad, prompt_tokens, shared_prefix, target_tokens
from sparselet.tasks import Row
from sparselet.training.prefix import SHARED, can_share

IGNORED = -100  # a label without a loss, by torch's and transformers' convention

LEAST_SAVED = 64  # tokens of a batch; a pass over the model for a few of them alone costs more

Encoded = dict[str, list[int]]


def encode(
    rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, chat_template: bool, max_input_length: int, encoder_decoder: bool
) -> list[Encoded]:
    """Each row as `prompt` and `target` token ids. The prompt is cut from the left, the target kept whole."""
    return [
        {
            "prompt": prompt_tokens(tokenizer, row.text, chat_template, max_input_length),
            "target": target_tokens(tokenizer, row.target, chat_template, encoder_decoder),
        }
        for row in rows
    ]


@dataclass(frozen=True)
class CompletionCollator:
    """Batches for a causal model: loss on the target's tokens only.

    Rows are padded on the left, so that all targets end in the last column. Where the model can (`logits_to_keep`), the
    product with the vocabulary is then made for the last columns alone; on a small model it is a fifth of a step.
    `logits_to_keep` and the shortened `labels` go through the model's own loss.

    accepts: the names of the model's forward parameters (`forward_parameters`).
    shares: leave out of the rows what all prompts of a batch begin with, for `prefix.begun` to compute once.
    """

    pad_token: int
    accepts: frozenset[str]
    shares: bool = False

    def __call__(self, rows: Sequence[Encoded]) -> dict[str, Tensor | int]:
        """`input_ids` and `attention_mask` [batch, length], `labels` [batch, kept], and what else the model accepts.

        With a shared beginning it is [1, shared], `attention_mask` [batch, shared + length], and the others without it.
        """
        prefix = shared_prefix([row["prompt"] for row in rows]) if self.shares else []
        if len(prefix) * (len(rows) - 1) < LEAST_SAVED:
            prefix = []
        if prefix:
            rows = [{**row, "prompt": row["prompt"][len(prefix) :]} for row in rows]
        sequences = [row["prompt"] + row["target"] for row in rows]
        ids = torch.tensor(pad(sequences, self.pad_token, left=True))
        mask = torch.tensor(pad([[1] * len(s) for s in sequences], 0, left=True))
        labels = torch.tensor(pad([[IGNORED] * len(row["prompt"]) + row["target"] for row in rows], IGNORED, left=True))
        batch: dict[str, Tensor | int] = {"input_ids": ids, "attention_mask": mask, "labels": labels}
        if "position_ids" in self.accepts:
            batch["position_ids"] = (mask.cumsum(1) - 1).clamp_min(0) + len(prefix)
        if "logits_to_keep" in self.accepts:
            kept = min(ids.shape[1], max(len(row["target"]) for row in rows) + 1)
            batch["labels"], batch["logits_to_keep"] = labels[:, -kept:], kept
        if prefix:
            batch["attention_mask"] = torch.cat([mask.new_ones(len(rows), len(prefix)), mask], dim=1)
            batch[SHARED] = torch.tensor([prefix])
        return batch


@dataclass(frozen=True)
class Seq2SeqCollator:
    """Batches for an encoder-decoder model: prompts to the encoder, targets as labels, padded on the right."""

    pad_token: int

    def __call__(self, rows: Sequence[Encoded]) -> dict[str, Tensor]:
        """`input_ids` and `attention_mask` [batch, length], `labels` [batch, target length]."""
        prompts, targets = [row["prompt"] for row in rows], [row["target"] for row in rows]
        return {
            "input_ids": torch.tensor(pad(prompts, self.pad_token, left=False)),
            "attention_mask": torch.tensor(pad([[1] * len(p) for p in prompts], 0, left=False)),
            "labels": torch.tensor(pad(targets, IGNORED, left=False)),
        }


def forward_parameters(model: nn.Module) -> frozenset[str]:
    """The names of the parameters of a model's forward function."""
    return frozenset(inspect.signature(model.forward).parameters)


def collator(model: Any, tokenizer: PreTrainedTokenizerBase, share: bool = False) -> CompletionCollator | Seq2SeqCollator:
    """The collator that fits a base model. share: share beginnings where the model can; its loss is then `prefix.loss_of`."""
    assert isinstance(tokenizer.pad_token_id, int)
    if model.config.is_encoder_decoder:
        return Seq2SeqCollator(tokenizer.pad_token_id)
    return CompletionCollator(tokenizer.pad_token_id, forward_parameters(model), share and can_share(model))
