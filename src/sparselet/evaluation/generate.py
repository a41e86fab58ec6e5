"""Greedy answers to many prompts, batched by length."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sparselet.evaluation.decode import can_decode, decode, encode_prefix, end_tokens
from sparselet.prompts import pad, prompt_tokens, shared_prefix

TOKENS = 16384  # of a batch; 0.75 GB of keys and values of a model of 135M parameters in float32


@torch.inference_mode()
def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    *,
    chat_template: bool = True,
    max_input_length: int = 2048,
    max_new_tokens: int = 64,
    batch_size: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> list[str]:
    """The model's greedy continuation of each prompt, up to its end token, stripped of white space.

    Prompts of like length share a batch, padded on the left, with a key-value cache. The texts are those of the model's own
    `generate`, which is called for models that `decode` does not know to answer alike.
    batch_size: prompts of a batch; by default as many as hold 16,384 tokens with their answers.
    progress: called with the number of prompts just answered.
    """
    tokens = [prompt_tokens(tokenizer, prompt, chat_template, max_input_length) for prompt in prompts]
    order = sorted(range(len(tokens)), key=lambda i: len(tokens[i]))
    answers = [""] * len(tokens)
    assert isinstance(tokenizer.pad_token_id, int)
    answer = partial(_by_model, model, tokenizer.pad_token_id, max_new_tokens)
    if tokens and can_decode(model):
        prefix = encode_prefix(model, shared_prefix(tokens))
        answer = partial(decode, model, prefix, tokenizer.pad_token_id, end_tokens(model), max_new_tokens)
    for rows in _batches(order, [len(prompt) + max_new_tokens for prompt in tokens], batch_size):
        texts = tokenizer.batch_decode(answer([tokens[i] for i in rows]), skip_special_tokens=True)
        for i, text in zip(rows, texts, strict=True):
            answers[i] = text.strip()
        if progress is not None:
            progress(len(rows))
    return answers


def _batches(order: Sequence[int], lengths: Sequence[int], size: int | None) -> Iterator[Sequence[int]]:
    """The rows in `order`, which ascends by length, in batches of `size` rows, or of at most `TOKENS` tokens padded."""
    start = 0
    for end in range(1, len(order) + 1):
        rows = end - start
        full = rows == size if size is not None else end < len(order) and (rows + 1) * lengths[order[end]] > TOKENS
        if full or end == len(order):
            yield order[start:end]
            start = end


def _by_model(model: Any, pad_token: int, max_new_tokens: int, prompts: Sequence[Sequence[int]]) -> list[list[int]]:
    """What transformers generates."""
    ids = torch.tensor(pad(prompts, pad_token, left=True), device=model.device)
    mask = torch.tensor(pad([[1] * len(prompt) for prompt in prompts], 0, left=True), device=model.device)
    output = model.generate(
        input_ids=ids,
        attention_mask=mask,
        max_new_tokens=max_new_tokens,
        do_sample=False,
        num_beams=1,
        pad_token_id=pad_token,
    )
    return (output if model.config.is_encoder_decoder else output[:, ids.shape[1] :]).tolist()
