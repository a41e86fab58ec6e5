"""Prompts and targets as token ids, kept in the cache directory, so that another run on the same rows need not make them.

A file holds the ids of one list of texts: `ids` int32, one after another, and `offsets` int64 [texts + 1]. Its name is the
SHA-256 of all that they depend on. Files are removed, the longest unused first, once all take more than their bound.
"""

import contextlib
import hashlib
import itertools
import json
import logging
import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
import tokenizers
import transformers
from transformers import PreTrainedTokenizerBase

from sparselet.errors import ConfigError, WriteFailed
from sparselet.files import atomic_write, cache_directory
from sparselet.prompts import prompt_tokens, target_tokens

logger = logging.getLogger("sparselet")

BOUND = "SPARSELET_TOKEN_CACHE_MB"  # the environment variable that bounds the files together; 0 keeps none
DEFAULT_MB = 1000
FEWEST = 1000  # texts that are worth a file: tokenising fewer takes no longer than the key and the file


def prompts(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], chat_template: bool, max_length: int) -> list[list[int]]:
    """`prompt_tokens` of each text, from the cache where they are in it. Raises ConfigError for a bound that is no number."""
    tokenise = partial(prompt_tokens, tokenizer, chat_template=chat_template, max_length=max_length)
    return _cached(tokenizer, texts, tokenise, ("prompt", chat_template, max_length))


def targets(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], chat_template: bool, encoder_decoder: bool
) -> list[list[int]]:
    """`target_tokens` of each text, from the cache where they are in it. Raises ConfigError for a bound that is no number."""
    tokenise = partial(target_tokens, tokenizer, chat_template=chat_template, encoder_decoder=encoder_decoder)
    return _cached(tokenizer, texts, tokenise, ("target", chat_template, encoder_decoder))


def _cached(
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    tokenise: Callable[[str], list[int]],
    options: tuple[str | int, ...],
) -> list[list[int]]:
    bound = _bound()
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if not bound or len(texts) < FEWEST or backend is None:  # of a tokenizer in Python nothing tells all that it does
        return [tokenise(text) for text in texts]
    # What it makes of a text with all special tokens shows what the rest does not: switches, a template's date.
    probe = tokenise(f"Ab 1{''.join(tokenizer.all_special_tokens)} c")
    versions = (transformers.__version__, tokenizers.__version__, type(tokenizer).__qualname__)
    described = json.dumps([versions, backend.to_str(), tokenizer.chat_template, probe, options, list(texts)])
    file = cache_directory() / "tokens" / f"{hashlib.sha256(described.encode()).hexdigest()}.safetensors"
    rows = _read(file, len(texts), len(tokenizer)) if file.exists() else None
    if rows is None:
        rows = [tokenise(text) for text in texts]
        _write(file, rows, bound)
    return rows


def _bound() -> int:
    """The bytes that all files may take together."""
    told = os.environ.get(BOUND) or str(DEFAULT_MB)
    if not told.isdecimal():
        raise ConfigError(f"{BOUND} must be a whole number of megabytes, 0 for no cache; got {told!r}.")
    return int(told) * 10**6


def _read(file: Path, texts: int, vocabulary: int) -> list[list[int]] | None:
    """The rows in a file; None, with a warning, if they cannot be those that were written."""
    try:
        tensors = safetensors.numpy.load(file.read_bytes())
        ids, offsets = _checked(tensors, texts, vocabulary)
    except Exception as error:  # safetensors and numpy have many kinds, all meaning that the file is not ours
        logger.warning("%s is not a file of token ids, so it is made anew: %s", file, error)
        return None
    with contextlib.suppress(OSError):
        os.utime(file)
    flat, ends = ids.tolist(), offsets.tolist()
    return [flat[start:end] for start, end in itertools.pairwise(ends)]


def _checked(tensors: dict[str, Any], texts: int, vocabulary: int) -> tuple[Any, Any]:
    """`ids` and `offsets`. Raises KeyError, ValueError."""
    ids, offsets = tensors["ids"], tensors["offsets"]
    if ids.dtype != np.int32 or offsets.dtype != np.int64 or ids.ndim != 1 or offsets.shape != (texts + 1,):
        raise ValueError(f"expected int32 ids and {texts + 1} int64 offsets")
    if offsets[0] != 0 or offsets[-1] != len(ids) or (np.diff(offsets) < 0).any():
        raise ValueError("the offsets do not divide the ids")
    if len(ids) and (ids.min() < 0 or ids.max() >= vocabulary):
        raise ValueError(f"an id is not in the vocabulary of {vocabulary}")
    return ids, offsets


def _write(file: Path, rows: Sequence[Sequence[int]], bound: int) -> None:
    """Write the rows, and remove the files that were not used for longest. A cache that cannot be written stops nothing."""
    offsets = np.cumsum([0, *(len(row) for row in rows)], dtype=np.int64)
    ids = np.fromiter((token for row in rows for token in row), dtype=np.int32, count=int(offsets[-1]))
    content = safetensors.numpy.save({"ids": ids, "offsets": offsets})
    if len(content) > bound:
        return
    try:
        with atomic_write(file) as opened:
            opened.write(content)
        files = sorted(((other.stat(), other) for other in file.parent.iterdir()), key=lambda found: -found[0].st_mtime_ns)
        kept = 0
        for status, other in files:
            kept += status.st_size
            if kept > bound:
                other.unlink(missing_ok=True)
    except (WriteFailed, OSError) as error:  # a file that another process removed meanwhile, too
        logger.warning("token ids are not kept: %s", error)
