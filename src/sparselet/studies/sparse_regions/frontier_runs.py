"""Quality and cost of attention by one pattern, at prompts of one length."""

import hashlib
import math
from collections.abc import Callable, Iterator
from functools import cache
from pydoc_data.topics import topics

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sparselet.attention import SparseAttention, sparse_attention
from sparselet.generation.prompts import prompt_format, prompt_tokens, target_tokens
from sparselet.tasks.long_context import long_rows
from sparselet.tuner.mask_state import seeded

ALL_KEYS = "window:window=999999999"  # wider than any prompt: attended densely, and counted
NATURAL_TEXT = "text"  # beside the tasks of LONG_CONTEXT: natural text goes on as it does
_CONTINUED = 32  # tokens of natural text that are measured after a prompt

Tokens = list[int]


def frontier(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    task: str,
    attention: str,
    length: int,
    rows: int,
    digest: str = "",
    progress: Callable[[float], None] | None = None,
) -> dict[str, float]:
    """Answers by a pattern to `rows` prompts of about `length` tokens, each answer's tokens given one by one.

    task: a kind of LONG_CONTEXT, or NATURAL_TEXT. attention: a pattern as text. digest: of the text, for NATURAL_TEXT: a
    unit's key has it.
    Returns, in percent: `exact`, the answers that greedy decoding gives; `likelihood`, exp of the mean log-probability of an
    answer's tokens; `prompts` and `answers`, the share of dense attention's pairs that is used; `attention`, the share that is
    computed; `flops`, that of all products of the model's layers, 2 · weights · tokens with attention's, choosing not counted.
    """
    exact, scores = [], []
    with torch.inference_mode(), sparse_attention(model, attention) as counted:
        pairs = list(_pairs(model, tokenizer, task, length, rows))
        for number, (prompt, answer) in enumerate(pairs, 1):
            logits = _answer_logits(model, prompt, answer)
            scores.append(float(-nn.functional.cross_entropy(logits, torch.tensor(answer, device=logits.device))))
            exact.append(logits.argmax(-1).tolist() == answer)
            if progress is not None:
                progress(number / rows)
    tokens = sum(len(prompt) + len(answer) - 1 for prompt, answer in pairs)
    return {
        "exact": 100 * sum(exact) / rows,
        "likelihood": 100 * math.exp(sum(scores) / rows),
        "prompts": 100 * counted.prefill.density,
        "answers": 100 * counted.decode.density,
        **_cost(model, counted, tokens),
    }


@cache
def text_digest() -> str:
    """SHA-256 of the natural text, 16 hex digits: it is Python's own documentation, which differs from version to version."""
    return hashlib.sha256(_text().encode()).hexdigest()[:16]


def _text() -> str:
    return "\n".join(topics[name] for name in sorted(topics))


def _pairs(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, task: str, length: int, rows: int
) -> Iterator[tuple[Tokens, Tokens]]:
    """Prompts and answers as tokens, without a chat template and without an end token."""
    form = prompt_format(model, tokenizer, chat_template=False)
    if task == NATURAL_TEXT:
        tokens = prompt_tokens(form, _text())
        starts = torch.randint(len(tokens) - length - _CONTINUED, (rows,), generator=seeded(0, NATURAL_TEXT, rows)).tolist()
        for start in starts:
            end = start + length
            yield tokens[start:end], tokens[end : end + _CONTINUED]
        return
    for row in long_rows(task, length, rows, count=lambda text: len(prompt_tokens(form, text))):
        yield prompt_tokens(form, str(row.input)), target_tokens(form, row.target)[:-1]


def _answer_logits(model: PreTrainedModel, prompt: Tokens, answer: Tokens) -> torch.Tensor:
    """The logits of each token of an answer, [tokens, vocabulary]: the prompt in one pass, the answer token by token."""
    ids = torch.tensor([prompt], device=model.device)
    logits, cache = [], None
    for token in answer:
        output = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        logits.append(output.logits[0, -1].float())
        ids, cache = torch.tensor([[token]], device=model.device), output.past_key_values
    return torch.stack(logits)


def _cost(model: PreTrainedModel, counted: SparseAttention, tokens: int) -> dict[str, float]:
    """`attention` and `flops`, in percent of dense attention's."""
    head = model.get_output_embeddings()
    weights = sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear) and m is not head)
    both = (counted.prefill, counted.decode)
    computed, dense = (sum(vars(counts)[name] for counts in both) for name in ("computed", "dense"))
    flops_of_pair = sum(counts.flops for counts in both) / computed
    products = 2 * weights * tokens
    share = (products + flops_of_pair * computed) / (products + flops_of_pair * dense)
    return {"attention": 100 * computed / dense, "flops": 100 * share}
