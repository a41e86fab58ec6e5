"""Rows of tasks and texts as a probe reads them: as they are, with their tokens shuffled, or after demonstrations."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sparselet.activations.probe import ProbeRow
from sparselet.errors import ConfigError, TaskError, prefix_errors
from sparselet.generation.prompts import PromptFormat, longest_prompt, prompt_format, prompt_tokens, target_tokens
from sparselet.tasks.row_files import read_file
from sparselet.tasks.rows import Row
from sparselet.tuner.mask_state import seeded

TEXT = "text"  # the field of a row that is a text alone


def probe_rows(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Row],
    *,
    chat_template: bool = False,
    max_length: int = 1024,
) -> list[ProbeRow]:
    """Each row as the tokens of its prompt and, scored, of its target; a prompt is cut from the left to `max_length` tokens.

    Raises ConfigError for an encoder-decoder model, TaskError for a row that cannot be encoded or does not fit.
    """
    form = _causal_format(model, tokenizer, chat_template)
    encoded = []
    for number, row in enumerate(rows, 1):
        with prefix_errors(f"row {number}"):
            prompt, target = prompt_tokens(form, row.input), target_tokens(form, row.target)
            longest = longest_prompt(form, max_length, len(target))
            if longest < 1:
                raise TaskError(f"the target has {len(target)} tokens, which leave the model no position for the prompt.")
            encoded.append(ProbeRow((*prompt[-longest:], *target), len(target)))
    return encoded


def text_rows(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], *, max_length: int = 1024
) -> list[ProbeRow]:
    """Each text as the tokens of its first half and, scored, of its second half, of the first `max_length` tokens.

    Raises ConfigError for an encoder-decoder model, TaskError for a text of fewer than two tokens.
    """
    form = _causal_format(model, tokenizer, False)
    encoded = []
    for number, text in enumerate(texts, 1):
        with prefix_errors(f"text {number}"):
            tokens = prompt_tokens(form, text)[: longest_prompt(form, max_length, 0)]
            if len(tokens) < 2:
                raise TaskError("has one token only; expected at least two.")
            encoded.append(ProbeRow(tuple(tokens), len(tokens) // 2))
    return encoded


def shuffled_rows(rows: Sequence[ProbeRow], seed: int = 0) -> list[ProbeRow]:
    """The same tokens in random order: of each prompt all but the first and the last, so that the same token is probed."""
    mixed = []
    for i, row in enumerate(rows):
        prompt, scored = row.tokens[: len(row.tokens) - row.scored], row.tokens[len(row.tokens) - row.scored :]
        inner = prompt[1:-1]
        order = torch.randperm(len(inner), generator=seeded(seed, "shuffled", i)).tolist()
        mixed.append(ProbeRow((*prompt[:1], *(inner[k] for k in order), *prompt[1:][-1:], *scored), row.scored))
    return mixed


def random_rows(rows: Sequence[ProbeRow], vocabulary: int, seed: int = 0) -> list[ProbeRow]:
    """Random tokens below `vocabulary` for all of each prompt but the first and the last, so that the same token is probed."""
    drawn = []
    for i, row in enumerate(rows):
        prompt, scored = row.tokens[: len(row.tokens) - row.scored], row.tokens[len(row.tokens) - row.scored :]
        inner = torch.randint(vocabulary, (max(0, len(prompt) - 2),), generator=seeded(seed, "random", i)).tolist()
        drawn.append(ProbeRow((*prompt[:1], *inner, *prompt[1:][-1:], *scored), row.scored))
    return drawn


def demonstrated_rows(rows: Sequence[Row], pool: Sequence[Row], count: int, seed: int = 0) -> list[Row]:
    """Each row after `count` demonstrations drawn from `pool`. Raises ConfigError if the pool has too few."""
    if len(pool) < count:
        raise ConfigError(f"demonstrations must be at most {len(pool)}, the task's training rows, got {count}.")
    chosen = (torch.randperm(len(pool), generator=seeded(seed, "demonstrations", i))[:count].tolist() for i in range(len(rows)))
    return [with_demonstrations(row, [pool[k] for k in order]) for row, order in zip(rows, chosen, strict=True)]


def with_demonstrations(row: Row, demonstrations: Sequence[Row]) -> Row:
    """The row with prompts and targets of others before its own prompt, parted by empty lines. Raises TaskError."""
    parts = [text for other in demonstrations for text in (other.input, other.target)]
    if not isinstance(row.input, str) or not all(isinstance(part, str) for part in parts):
        raise TaskError("demonstrations are put before prompts that are text; these rows are conversations.")
    pairs = [f"{other.input}\n{other.target}" for other in demonstrations]
    return replace(row, input="\n\n".join([*pairs, row.input]))


def read_texts(file: str | Path, limit: int | None = None) -> list[str]:
    """The lines of a .txt file that are not blank, or the field `text` of each row of a JSON or Parquet file.

    Raises TaskError for a file that cannot be read, and for none.
    """
    path = Path(file)
    if path.suffix.lower() == ".txt":
        try:
            texts = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        except (OSError, UnicodeDecodeError) as error:
            raise TaskError(f"cannot read {path}: {error}.") from error
    else:
        texts = []
        for place, fields in read_file(path, lambda columns, where: (TEXT,)):
            if not isinstance(fields, dict) or not isinstance(fields.get(TEXT), str):
                raise TaskError(f"{place}: expected an object with the field {TEXT!r}, a text.")
            texts.append(fields[TEXT])
    if not texts:
        raise TaskError(f"{path}: no texts.")
    return texts[:limit]


def _causal_format(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, chat_template: bool) -> PromptFormat:
    form = prompt_format(model, tokenizer, chat_template)
    if form.encoder_decoder:
        raise ConfigError("model must be a causal language model to be probed; this one has an encoder and a decoder.")
    return form
