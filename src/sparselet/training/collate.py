"""Batches for training on targets only, with logits only where there is a target."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sparselet.errors import ModelError, TaskError
from sparselet.generation.padding import (
    forward_parameters,
    pad,
    pad_batch,
    padding_side,
    position_ids,
    without_router_loss,
)
from sparselet.generation.prefix import PREFIX_KEY, can_share_prefix, shared_prefix
from sparselet.generation.prompts import PromptFormat, longest_prompt, padding_token, prompt_tokens, target_tokens
from sparselet.models import decoder_start
from sparselet.tasks.rows import ASSISTANT, Message, Row

logger = logging.getLogger("sparselet")

IGNORED = -100  # a label without a loss, by torch's and transformers' convention

LEAST_SAVED = 64  # tokens of a batch; an extra pass over the model costs more than fewer tokens do

Encoded = dict[str, list[int]]


def encode(rows: Sequence[Row], form: PromptFormat, max_input_length: int, where: str) -> list[Encoded]:
    """Each row as `prompt` and `target` token ids. The prompt is cut from the left, the target is never cut.

    A prompt is cut to `max_input_length`, and further where the model's positions must also hold the target. The target of a
    conversation begins with its first learned answer, and `labels` [target] marks the tokens that are learned; only tokens
    before the last answer are cut. where: the name of the rows, for messages. Raises TaskError, naming the row, for a target
    that does not fit the positions, and what `prompts` raises.
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
            encoded.append(_split(before[-longest:], labels[-longest:], answer))
    if cut:
        logger.warning("%s: %d prompts are cut from the left to fit the model's positions.", where, cut)
    return encoded


def _sequences(row: Row, form: PromptFormat) -> list[tuple[list[int], list[int], list[int]]]:
    """The sequences of a row: the tokens before the last answer, their labels, and the tokens of that answer.

    Each answer of a conversation follows its prompt, as in evaluation. If the prompt begins with the sequence of the previous
    answer, as with most chat templates, both are learned in one sequence.
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


def _split(before: list[int], labels: list[int], answer: list[int]) -> Encoded:
    """A sequence as `prompt` and `target`, with `labels` where only a part of the target is learned."""
    start = next((i for i in range(1, len(labels)) if labels[i] != IGNORED), len(labels))
    if start == len(labels):
        return {"prompt": before, "target": answer}
    return {"prompt": before[:start], "target": before[start:] + answer, "labels": labels[start:] + answer}


@dataclass(frozen=True)
class CompletionCollator:
    """Batches for a causal model: loss on the target's tokens only.

    Rows are padded on the left, so that all targets end in the last column. If the model takes `logits_to_keep`, the product
    with the vocabulary is then computed for the last columns only, which saves a fifth of a step of a small model.

    accepts: the names of the model's forward parameters (`forward_parameters`).
    shares: put the shared prefix of a batch apart, for `prefix.model_inputs` to compute once.
    left: pad on the left, otherwise on the right (`padding.padding_side`).
    """

    pad_token: int
    accepts: frozenset[str]
    shares: bool = False
    left: bool = True

    def __call__(self, rows: Sequence[Encoded]) -> dict[str, Tensor | int]:
        """`input_ids` and `attention_mask` [batch, length], `labels` [batch, kept], and other arguments that the model accepts.

        A shared prefix is [1, shared]; `attention_mask` is then [batch, shared + length], and the others do not include it.
        """
        prefix = shared_prefix([row["prompt"] for row in rows]) if self.shares else []
        if len(prefix) * (len(rows) - 1) < LEAST_SAVED:
            prefix = []
        if prefix:
            rows = [{**row, "prompt": row["prompt"][len(prefix) :]} for row in rows]
        ids, mask = pad_batch([row["prompt"] + row["target"] for row in rows], self.pad_token, self.left)
        learned = [[IGNORED] * len(row["prompt"]) + row.get("labels", row["target"]) for row in rows]
        labels = pad(learned, IGNORED, self.left)
        batch: dict[str, Tensor | int] = {"input_ids": ids, "attention_mask": mask, "labels": labels}
        if not self.left and "attention_mask" not in self.accepts:
            del batch["attention_mask"]
        if self.left and "position_ids" in self.accepts:
            batch["position_ids"] = position_ids(mask) + len(prefix)
        if "logits_to_keep" in self.accepts:
            lengths = [len(row["target"]) if self.left else len(row["prompt"]) for row in rows]
            first = ids.shape[1] - max(lengths) if self.left else min(lengths)
            kept = min(ids.shape[1], ids.shape[1] - first + 1)
            batch["labels"], batch["logits_to_keep"] = labels[:, -kept:], kept
        batch |= without_router_loss(self.accepts)
        if prefix:
            batch["attention_mask"] = torch.cat([mask.new_ones(len(rows), len(prefix)), mask], dim=1)
            batch[PREFIX_KEY] = torch.tensor([prefix])
        return batch


@dataclass(frozen=True)
class Seq2SeqCollator:
    """Batches for an encoder-decoder model: prompts to the encoder, targets to the decoder, padded on the right.

    start: the token that the decoder begins with in `generate`; it reads this token and all of a target but its last token.
    """

    pad_token: int
    start: int
    accepts: frozenset[str]

    def __call__(self, rows: Sequence[Encoded]) -> dict[str, Tensor | int]:
        """`input_ids` and `attention_mask` [batch, length], `decoder_input_ids` and `labels` [batch, target length]."""
        ids, mask = pad_batch([row["prompt"] for row in rows], self.pad_token, left=False)
        targets = [row["target"] for row in rows]
        return {
            "input_ids": ids,
            "attention_mask": mask,
            "decoder_input_ids": pad([[self.start, *target[:-1]] for target in targets], self.pad_token, left=False),
            "labels": pad(targets, IGNORED, left=False),
            **without_router_loss(self.accepts),
        }


Collator = CompletionCollator | Seq2SeqCollator


def collator(model: Any, form: PromptFormat, share: bool = False) -> Collator:
    """The collator for a base model. share: share prefixes where the model can; its loss is then `prefix.batch_loss`.

    Raises ModelError for a model whose rows cannot share a batch, or whose decoder has no token to begin with.
    """
    config, side = model.config, padding_side(model)
    if side is None:
        raise ModelError(
            f"the model ({config.model_type}) sees the padding of its rows, so their losses depend on the rest of the batch."
        )
    if "expert_capacity" in config.to_dict():
        raise ModelError(
            f"the model ({config.model_type}) drops tokens by their number in a batch, so the loss of a row depends on the "
            "rest of the batch."
        )
    accepts = forward_parameters(model)
    if form.encoder_decoder:
        return Seq2SeqCollator(padding_token(form), decoder_start(model), accepts)
    left = side == "left"
    return CompletionCollator(padding_token(form), accepts, left and share and can_share_prefix(model), left)
