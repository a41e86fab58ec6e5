"""Greedy answers to many prompts, batched by length."""

import logging
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import groupby
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sparselet.errors import ModelError, TaskError
from sparselet.generation.decode import can_decode, decode, encode_prefix
from sparselet.generation.padding import forward_parameters, padding_side, without_router_loss
from sparselet.generation.prompts import (
    PromptFormat,
    longest_prompt,
    pad,
    padding_token,
    prompt_format,
    prompt_tokens,
    shared_prefix,
)
from sparselet.io.printable import reason
from sparselet.tasks.rows import Prompt

logger = logging.getLogger("sparselet")

TOKENS = 16384  # of a batch; 0.75 GB of keys and values of a model of 135M parameters in float32


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

    An answer ends where training teaches it to end, or with an end token of the model's generation settings; that token is
    no part of it. Else the texts are those of the model's own `generate`, which is called for models that `decode` does not
    know to answer alike. Prompts of like length share a batch, with a key-value cache; of a model that sees padding where
    it would have to be, each is answered alone.
    batch_size: prompts of a batch; by default as many as hold 16,384 tokens with their answers.
    progress: called with the number of prompts just answered.
    Where the model's positions hold no prompt and answer of these lengths, a prompt is cut to leave room for `max_new_tokens`,
    at most to half of them, and an answer ends with the last. Raises what `prompts` raises.
    """
    form = prompt_format(model, tokenizer, chat_template)
    tokens = _prompts(form, prompts, max_input_length, max_new_tokens)
    limits = [_answer_limit(form, len(prompt), max_new_tokens) for prompt in tokens]
    order = sorted(range(len(tokens)), key=lambda i: len(tokens[i]))
    answers = [""] * len(tokens)
    side = padding_side(model) if tokens else None
    padded = side == ("right" if form.encoder_decoder else "left")  # on the right there is no room for an answer
    answer = partial(_by_model, model, form)
    if padded and can_decode(model):
        prefix = encode_prefix(model, shared_prefix(tokens))
        answer = partial(decode, model, prefix, padding_token(form), form.ends)
    lengths = [len(prompt) + limit for prompt, limit in zip(tokens, limits, strict=True)]
    for limit, group in groupby(order, lambda i: limits[i]):
        for rows in _batches(list(group), lengths, batch_size if padded else 1):
            ended = [_without_end(form, tokens_) for tokens_ in answer(limit, [tokens[i] for i in rows])]
            for i, text in zip(rows, tokenizer.batch_decode(ended, skip_special_tokens=True), strict=True):
                answers[i] = text.strip()
            if progress is not None:
                progress(len(rows))
    return answers


def _prompts(form: PromptFormat, prompts: Sequence[Prompt], max_input_length: int, max_new_tokens: int) -> list[list[int]]:
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


def _answer_limit(form: PromptFormat, prompt: int, max_new_tokens: int) -> int:
    """The most tokens of an answer, beside a prompt of so many."""
    if form.positions is None:
        return max_new_tokens
    return min(max_new_tokens, form.positions if form.encoder_decoder else form.positions + 1 - prompt)


def _without_end(form: PromptFormat, answer: Sequence[int]) -> list[int]:
    """An answer up to its end token, without it."""
    end = next((i for i, token in enumerate(answer) if token in form.ends), len(answer))
    return list(answer[:end])


def _batches(order: Sequence[int], lengths: Sequence[int], size: int | None) -> Iterator[Sequence[int]]:
    """The rows in `order`, which ascends by length, in batches of `size` rows, or of at most `TOKENS` tokens padded."""
    start = 0
    for end in range(1, len(order) + 1):
        rows = end - start
        full = rows == size if size is not None else end < len(order) and (rows + 1) * lengths[order[end]] > TOKENS
        if full or end == len(order):
            yield order[start:end]
            start = end


def _by_model(model: Any, form: PromptFormat, max_new_tokens: int, prompts: Sequence[Sequence[int]]) -> list[list[int]]:
    """What transformers generates."""
    left, filler = not form.encoder_decoder, padding_token(form)
    ids = torch.tensor(pad(prompts, filler, left), device=model.device)
    mask = torch.tensor(pad([[1] * len(prompt) for prompt in prompts], 0, left), device=model.device)
    try:
        output = model.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=max_new_tokens,
            min_new_tokens=0,  # a least length would keep answers from ending
            do_sample=False,
            num_beams=1,
            num_return_sequences=1,
            return_dict_in_generate=False,
            eos_token_id=sorted(form.ends) or None,
            pad_token_id=filler,
            **without_router_loss(forward_parameters(model)),
        )
    except (ValueError, TypeError, LookupError, AttributeError) as error:  # of settings that are of any kind in their file
        raise ModelError(
            f"the model's generation settings allow no greedy answers of a batch: {type(error).__name__}: {reason(error)}"
        ) from error
    return output[:, 1 if form.encoder_decoder else ids.shape[1] :].tolist()
