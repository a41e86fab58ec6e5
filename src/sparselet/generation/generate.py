"""Greedy answers to many prompts, batched by length."""

import logging
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import groupby
from typing import Any
from weakref import WeakSet

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sparselet.errors import ModelError, TaskError
from sparselet.generation.decode import attends_sparsely, can_decode, decode, encode_prefix
from sparselet.generation.padding import forward_parameters, pad_batch, padding_side, without_router_loss
from sparselet.generation.prefix import shared_prefix
from sparselet.generation.prompts import PromptFormat, longest_prompt, padding_token, prompt_format, prompt_tokens
from sparselet.io.printable import reason
from sparselet.tasks.rows import Prompt

logger = logging.getLogger("sparselet")

WITHOUT_PREFIX: WeakSet[nn.Module] = WeakSet()  # models whose passes act on their last position: no prefix ends a pass

BATCH_TOKENS = 16384  # 0.75 GB of keys and values of a model of 135M parameters in float32


@torch.inference_mode()
def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    *,
    chat_template: bool = True,
    max_input_length: int = 2048,
    max_new_tokens: int = 64,
    batch_size: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> list[str]:
    """The model's greedy continuation of each prompt, a text or a conversation, up to its end token, stripped of white space.

    An answer ends with the end token of training, or with an end token of the model's generation settings; the answer does
    not contain it. Apart from that the texts are those of the model's own `generate`, which is called for models that
    `can_decode` excludes. Prompts of similar length share a batch, with a key-value cache; a model whose logits depend on the
    padding, as under `sparse_attention`, answers one prompt at a time.

    batch_size: prompts of a batch; by default as many as hold 16,384 tokens with their answers.
    progress: called with the number of prompts just answered.
    Where the model's positions do not hold a prompt and an answer of these lengths, the prompt is cut to leave
    `max_new_tokens`, at most half of the positions, and an answer ends at the last position. Raises what `prompts` raises.
    """
    form = prompt_format(model, tokenizer, chat_template)
    tokens = encode_prompts(form, prompts, max_input_length, max_new_tokens)
    limits = [_answer_limit(form, len(prompt), max_new_tokens) for prompt in tokens]
    order = sorted(range(len(tokens)), key=lambda i: len(tokens[i]))
    answers = [""] * len(tokens)
    side = padding_side(model) if tokens else None
    answers_on = "right" if form.encoder_decoder else "left"  # on the right a causal model has no place for an answer
    padded = side == answers_on and not attends_sparsely(model)
    answer = partial(_generate_with_transformers, model, form)
    if padded and can_decode(model):
        prefix = encode_prefix(model, [] if model in WITHOUT_PREFIX else shared_prefix(tokens))
        answer = partial(decode, model, prefix, padding_token(form), form.ends)
    lengths = [len(prompt) + limit for prompt, limit in zip(tokens, limits, strict=True)]
    for limit, group in groupby(order, lambda i: limits[i]):
        for rows in _batches(list(group), lengths, batch_size if padded else 1):
            complete = [_before_end(form, ids) for ids in answer(limit, [tokens[i] for i in rows])]
            for i, text in zip(rows, tokenizer.batch_decode(complete, skip_special_tokens=True), strict=True):
                answers[i] = text.strip()
            if progress is not None:
                progress(len(rows))
    return answers


def encode_prompts(
    form: PromptFormat, prompts: Sequence[Prompt], max_input_length: int, max_new_tokens: int
) -> list[list[int]]:
    """The prompts as tokens, cut from the left. Raises TaskError."""
    answer = max_new_tokens - 1  # the last token of an answer is not read
    if form.positions is not None:
        answer = min(answer, form.positions if form.encoder_decoder else form.positions // 2)
    longest = longest_prompt(form, max_input_length, answer)
    tokens, cut = [], 0
    for number, prompt in enumerate(prompts, 1):
        try:
            ids = prompt_tokens(form, prompt)
        except TaskError as error:
            raise TaskError(f"prompt {number}: {error}") from error
        cut += longest < min(len(ids), max_input_length)
        tokens.append(ids[-longest:])
    if cut:
        logger.warning("%d prompts are cut from the left to leave the model positions for its answers.", cut)
    return tokens


def _answer_limit(form: PromptFormat, prompt_length: int, max_new_tokens: int) -> int:
    """The largest number of tokens of an answer to a prompt of this length."""
    if form.positions is None:
        return max_new_tokens
    return min(max_new_tokens, form.positions if form.encoder_decoder else form.positions + 1 - prompt_length)


def _before_end(form: PromptFormat, answer: Sequence[int]) -> list[int]:
    """The tokens of an answer before its first end token."""
    end = next((i for i, token in enumerate(answer) if token in form.ends), len(answer))
    return list(answer[:end])


def _batches(order: Sequence[int], lengths: Sequence[int], size: int | None) -> Iterator[Sequence[int]]:
    """The rows in `order`, which ascends by length, in batches of `size` rows, or of at most `BATCH_TOKENS` tokens padded."""
    start = 0
    for end in range(1, len(order) + 1):
        rows = end - start
        full = rows == size if size is not None else end < len(order) and (rows + 1) * lengths[order[end]] > BATCH_TOKENS
        if full or end == len(order):
            yield order[start:end]
            start = end


def _generate_with_transformers(
    model: Any, form: PromptFormat, max_new_tokens: int, prompts: Sequence[Sequence[int]]
) -> list[list[int]]:
    """The answers of the model's own `generate`. Raises ModelError."""
    pad_token = padding_token(form)
    ids, mask = (tensor.to(model.device) for tensor in pad_batch(prompts, pad_token, not form.encoder_decoder))
    try:
        output = model.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=max_new_tokens,
            min_new_tokens=0,  # a minimum length would keep answers from ending
            do_sample=False,
            num_beams=1,
            num_return_sequences=1,
            return_dict_in_generate=False,
            eos_token_id=sorted(form.ends) or None,
            pad_token_id=pad_token,
            **without_router_loss(forward_parameters(model)),
        )
    except (ValueError, TypeError, LookupError, AttributeError) as error:  # settings in a file may have any type
        raise ModelError(
            f"the model's generation settings allow no greedy answers of a batch: {type(error).__name__}: {reason(error)}"
        ) from error
    return output[:, 1 if form.encoder_decoder else ids.shape[1] :].tolist()
