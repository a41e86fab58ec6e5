"""Greedy answers to many prompts, batched by length."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sparselet.prompts import pad, prompt_tokens


@torch.inference_mode()
def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    *,
    chat_template: bool = True,
    max_input_length: int = 2048,
    max_new_tokens: int = 64,
    batch_size: int = 64,
    progress: Callable[[int], None] | None = None,
) -> list[str]:
    """The model's greedy continuation of each prompt, up to its end token, stripped of white space.

    Prompts of like length share a batch, padded on the left, with a key-value cache.
    progress: called with the number of prompts just answered.
    """
    tokens = [prompt_tokens(tokenizer, prompt, chat_template, max_input_length) for prompt in prompts]
    order = sorted(range(len(tokens)), key=lambda i: len(tokens[i]))
    answers = [""] * len(tokens)
    generator: Any = model
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        assert isinstance(tokenizer.pad_token_id, int)
        ids = torch.tensor(pad([tokens[i] for i in rows], tokenizer.pad_token_id, left=True), device=model.device)
        mask = torch.tensor(pad([[1] * len(tokens[i]) for i in rows], 0, left=True), device=model.device)
        output = generator.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            num_beams=1,
            pad_token_id=tokenizer.pad_token_id,
        )
        new = output if model.config.is_encoder_decoder else output[:, ids.shape[1] :]
        for i, text in zip(rows, tokenizer.batch_decode(new, skip_special_tokens=True), strict=True):
            answers[i] = text.strip()
        if progress is not None:
            progress(len(rows))
    return answers
