"""Batches for completion-only training, with logits only where there is a target."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sparselet.errors import ModelError, TaskError
from sparselet.generation.padding import forward_parameters, padding_side, positions, without_router_loss
from sparselet.generation.prefix import SHARED, can_share
from sparselet.generation.prompts import (
    PromptFormat,
    longest_prompt,
    pad,
    padding_token,
    prompt_tokens,
    shared_prefix,
    target_tokens,
)
from sparselet.models import decoder_start
from sparselet.tasks.rows import ASSISTANT, Message, Row

logger = logging.getLogger("sparselet")

IGNORED = -100  # a label without a loss, by torch's and transformers' convention

LEAST_SAVED = 64  # tokens of a batch; a pass over the model for a few of them alone costs more

Encoded = dict[str, list[int]]


def encode(rows: Sequence[Row], form: PromptFormat, max_input_length: int, where: str) -> list[Encoded]:
    """Each row as `prompt` and `target` token ids. The prompt is cut from the left, the target kept whole.

    A prompt is cut to `max_input_length`, and further where the model has no positions for it and the target. Of a
    conversation the target begins with the first answer that is learned, and `labels` [target] tells what is learned of it;
    what is cut is all before the last answer. where: what the rows are, for messages. Raises TaskError, naming the row, for a
    target without room, and what `prompts` raises.
    """
    encoded, cut = [], 0
    for number, row in enumerate(rows, 1):
        try:
            sequences = _sequences(row, form)
        except TaskError as error:
            raise TaskError(f"{where}, row {number}: {error}") from error
        for before, labels, answer in sequences:
            longest = longest_prompt(form, max_input_length, len(answer))
            if longest < 1:
                raise TaskError(
                    f"{where}, row {number}: the target has {len(answer)} tokens, but the model has {form.positions} positions"
                    f"{'' if form.encoder_decoder else ' for prompt and target together'}. Shorten it, or leave the row out."
                )
            cut += longest < min(len(before), max_input_length)
            encoded.append(_divided(before[-longest:], labels[-longest:], answer))
    if cut:
        logger.warning("%s: %d prompts are cut from the left to fit the model's positions.", where, cut)
    return encoded


def _sequences(row: Row, form: PromptFormat) -> list[tuple[list[int], list[int], list[int]]]:
    """The sequences that a row is learned in: what goes before its last answer, the labels of that, and that answer.

    Each answer of a conversation follows just what the model is asked with there. Where the prompt of one begins with the
    sequence that ends in the one before it, as most chat templates have it, both are learned in one pass.
    """
    if isinstance(row.input, str):
        prompt = prompt_tokens(form, row.input)
        return [(prompt, [IGNORED] * len(prompt), target_tokens(form, row.target))]
    messages = (*row.input, Message(ASSISTANT, row.target))
    sequences: list[tuple[list[int], list[int], list[int]]] = []
    for i in range(row.first_learned, len(messages)):
        if messages[i].role != ASSISTANT:
            continue
        prompt, answer = prompt_tokens(form, messages[:i]), target_tokens(form, messages[i].content)
        before, labels, last = sequences[-1] if sequences else ([], [], [])
        if prompt[: len(before) + len(last)] == before + last and sequences and not form.encoder_decoder:
            sequences.pop()
            labels = labels + last
        else:
            labels = []
        sequences.append((prompt, labels + [IGNORED] * (len(prompt) - len(labels)), answer))
    return sequences


def _divided(before: list[int], labels: list[int], answer: list[int]) -> Encoded:
    """A sequence as `prompt` and `target`, with `labels` where not all of the target is learned."""
    first = next((i for i in range(1, len(labels)) if labels[i] != IGNORED), len(labels))
    if first == len(labels):
        return {"prompt": before, "target": answer}
    return {"prompt": before[:first], "target": before[first:] + answer, "labels": labels[first:] + answer}


@dataclass(frozen=True)
class CompletionCollator:
    """Batches for a causal model: loss on the target's tokens only.

    Rows are padded on the left, so that all targets end in the last column. Where the model can (`logits_to_keep`), the
    product with the vocabulary is then made for the last columns alone; on a small model it is a fifth of a step.

    accepts: the names of the model's forward parameters (`forward_parameters`).
    shares: leave out of the rows what all prompts of a batch begin with, for `prefix.model_inputs` to compute once.
    left: pad on the left; otherwise on the right, for models that see their padding there (`batching.padding_side`).
    """

    pad_token: int
    accepts: frozenset[str]
    shares: bool = False
    left: bool = True

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
        ids = torch.tensor(pad(sequences, self.pad_token, self.left))
        mask = torch.tensor(pad([[1] * len(s) for s in sequences], 0, self.left))
        learned = [[IGNORED] * len(row["prompt"]) + row.get("labels", row["target"]) for row in rows]
        labels = torch.tensor(pad(learned, IGNORED, self.left))
        batch: dict[str, Tensor | int] = {"input_ids": ids, "attention_mask": mask, "labels": labels}
        if not self.left and "attention_mask" not in self.accepts:
            del batch["attention_mask"]
        if self.left and "position_ids" in self.accepts:
            batch["position_ids"] = positions(mask) + len(prefix)
        if "logits_to_keep" in self.accepts:
            first = ids.shape[1] - max(len(r["target"]) for r in rows) if self.left else min(len(r["prompt"]) for r in rows)
            kept = min(ids.shape[1], ids.shape[1] - first + 1)
            batch["labels"], batch["logits_to_keep"] = labels[:, -kept:], kept
        batch |= without_router_loss(self.accepts)
        if prefix:
            batch["attention_mask"] = torch.cat([mask.new_ones(len(rows), len(prefix)), mask], dim=1)
            batch[SHARED] = torch.tensor([prefix])
        return batch


@dataclass(frozen=True)
class Seq2SeqCollator:
    """Batches for an encoder-decoder model: prompts to the encoder, targets to the decoder, padded on the right.

    start: the token that the decoder begins with in `generate`; what it reads of a target is that and all but the last.
    """

    pad_token: int
    start: int
    accepts: frozenset[str]

    def __call__(self, rows: Sequence[Encoded]) -> dict[str, Tensor | int]:
        """`input_ids` and `attention_mask` [batch, length], `decoder_input_ids` and `labels` [batch, target length]."""
        prompts, targets = [row["prompt"] for row in rows], [row["target"] for row in rows]
        return {
            "input_ids": torch.tensor(pad(prompts, self.pad_token, left=False)),
            "attention_mask": torch.tensor(pad([[1] * len(p) for p in prompts], 0, left=False)),
            "decoder_input_ids": torch.tensor(pad([[self.start, *t[:-1]] for t in targets], self.pad_token, left=False)),
            "labels": torch.tensor(pad(targets, IGNORED, left=False)),
            **without_router_loss(self.accepts),
        }


Collator = CompletionCollator | Seq2SeqCollator


def collator(model: Any, form: PromptFormat, share: bool = False) -> Collator:
    """The collator that fits a base model. share: share beginnings where the model can; its loss is then `prefix.loss_of`.

    Raises ModelError for a model whose rows cannot share a batch, or whose decoder has no token to begin with.
    """
    kind, side = model.config.model_type, padding_side(model)
    if side is None:
        raise ModelError(
            f"the model ({kind}) sees the padding of its rows, so their losses depend on what they share a batch with."
        )
    if hasattr(model.config, "expert_capacity"):
        raise ModelError(
            f"the model ({kind}) drops tokens by how many a batch has, so the loss of a row depends on the others."
        )
    accepts = forward_parameters(model)
    if form.encoder_decoder:
        return Seq2SeqCollator(padding_token(form), decoder_start(model), accepts)
    left = side == "left"
    return CompletionCollator(padding_token(form), accepts, left and share and can_share(model), left)
