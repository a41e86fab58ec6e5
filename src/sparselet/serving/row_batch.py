"""`RowBatch`: rows of one expert, or of several, that are decoded together; rows join at any step and leave when they end.

The project's own decoding, as `sparselet.generation.decode`, and not transformers' `generate_batch`: that keeps blocks of keys
and values of all requests in one manager, which outlives a change of the weights.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import Cache, DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from sparselet.generation.decode import PreallocatedCacheLayer
from sparselet.generation.padding import forward_parameters, pad_batch, position_ids, without_router_loss
from sparselet.serving.answer import Answer, choose_tokens
from sparselet.serving.mixed_products import MixedProducts
from sparselet.serving.request import GenerationRequest
from sparselet.serving.served_expert import ServedExpert
from sparselet.steering.switch import steered_rows

# Of sparse attention: what layers remember of the rows, in the place of what they remembered of others, within a block.
Remembering = Callable[[dict[int, dict[str, Any]]], contextlib.AbstractContextManager[None]]

SPARE_COLUMNS = 128  # tokens that a cache has room for beyond its longest row, before it is copied


class RowBatch:
    """Rows aligned at their last tokens. All keys and values of a row were computed with its own expert.

    model: a decoder for which `can_decode` holds; while rows are decoded it has their expert in its weights, or with `products`
        the base weights, to which these add each row's expert. pad_token: for padding, masked everywhere.
    remembering: of sparse attention, for which a batch has one row at most.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        pad_token: int,
        products: MixedProducts | None = None,
        remembering: Remembering | None = None,
    ) -> None:
        self.model, self.tokenizer, self.pad_token, self.products = model, tokenizer, pad_token, products
        self.forward: Any = partial(model, use_cache=True, logits_to_keep=1, **without_router_loss(forward_parameters(model)))
        self.remembering, self.memory = remembering, {}
        self.answers: list[Answer] = []
        self.layers: list[PreallocatedCacheLayer] = []
        self.mask = torch.zeros(0, 0, dtype=torch.int64, device=model.device)  # [rows, columns of the cache]

    def __len__(self) -> int:
        return len(self.answers)

    @torch.inference_mode()
    def join(self, requests: Sequence[GenerationRequest]) -> None:
        """Compute prompts and choose their first tokens. Answers that end with these never become rows."""
        answers = [Answer(request, self.tokenizer) for request in requests]
        tokens, mask = (t.to(self.model.device) for t in pad_batch([r.prompt for r in requests], self.pad_token, left=True))
        layers = [PreallocatedCacheLayer(mask.shape[1]) for _ in DynamicCache(config=self.model.config).layers]
        cache = Cache(layers=[*layers])
        with self._changed(answers), self._remembering():
            output = self.forward(input_ids=tokens, attention_mask=mask, position_ids=position_ids(mask), past_key_values=cache)
        chosen = choose_tokens(output.logits[:, -1], answers)
        unfinished = [row for row, (a, token) in enumerate(zip(answers, chosen, strict=True)) if not a.take(token)]
        if unfinished:
            self._append([answers[row] for row in unfinished], layers, mask, unfinished)

    @torch.inference_mode()
    def step(self) -> int:
        """Decode one token of each row; rows that end leave. Returns the number of tokens."""
        count = len(self.answers)
        if self.layers[0].capacity <= self.mask.shape[1]:
            self._keep(list(range(count)))
        tokens = torch.tensor([[answer.tokens[-1]] for answer in self.answers], device=self.model.device)
        positions = torch.tensor([[answer.length] for answer in self.answers], device=self.model.device)
        self.mask = torch.cat([self.mask, self.mask.new_ones(count, 1)], dim=1)
        cache = Cache(layers=[*self.layers])
        with self._changed(self.answers), self._remembering():
            output = self.forward(input_ids=tokens, attention_mask=self.mask, position_ids=positions, past_key_values=cache)
        chosen = choose_tokens(output.logits[:, -1], self.answers)
        unfinished = [row for row, (a, token) in enumerate(zip(self.answers, chosen, strict=True)) if not a.take(token)]
        if len(unfinished) < count:
            self._keep(unfinished)
        return count

    def drop_cancelled(self) -> list[GenerationRequest]:
        """Remove the rows of cancelled requests, and return these."""
        cancelled = [answer.request for answer in self.answers if answer.request.cancelled]
        if cancelled:
            self._keep([row for row, answer in enumerate(self.answers) if not answer.request.cancelled])
        return cancelled

    @torch.inference_mode()
    def take_over(self, other: "RowBatch", expert: ServedExpert | None = None) -> None:
        """Add the rows of another batch, or those of one expert in it."""
        rows = [i for i, a in enumerate(other.answers) if expert is None or a.request.expert.digest == expert.digest]
        if rows:
            self._append([other.answers[row] for row in rows], other.layers, other.mask, rows)

    @contextlib.contextmanager
    def _changed(self, answers: Sequence[Answer]) -> Iterator[None]:
        """Within the block a pass of these rows adds what is each row's own: its expert's products, and its vector."""
        experts = [answer.request.expert for answer in answers]
        adding = contextlib.nullcontext() if self.products is None else self.products.adding(experts)
        with adding, steered_rows(self.model, [answer.request.steer for answer in answers]):
            yield

    def _remembering(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext() if self.remembering is None else self.remembering(self.memory)

    def _keep(self, rows: list[int]) -> None:
        """Remove all rows but these, and the columns that none of them uses."""
        answers, self.answers = [self.answers[row] for row in rows], []
        layers, self.layers = self.layers, []
        if answers:
            self._append(answers, layers, self.mask, rows)

    def _append(self, answers: list[Answer], layers: list[PreallocatedCacheLayer], mask: Tensor, rows: list[int]) -> None:
        """Add rows that have their keys and values in `rows` of other layers, their last token in the last column."""
        index = torch.tensor(rows, device=mask.device)
        mask = mask.index_select(0, index)
        before, self.answers = len(self.answers), [*self.answers, *answers]
        columns = max(answer.length for answer in self.answers)
        old, self.layers = self.layers, [PreallocatedCacheLayer(columns + SPARE_COLUMNS) for _ in layers]
        for place, (layer, source) in enumerate(zip(self.layers, layers, strict=True)):
            parts = []
            for kind in ("keys", "values"):
                added = aligned(vars(source)[kind].index_select(0, index), columns)
                parts.append(torch.cat([aligned(vars(old[place])[kind], columns), added]) if before else added)
            layer.start(parts[0], parts[1], len(self.answers))
        mask = aligned(mask[:, None, :, None], columns)[:, 0, :, 0]
        self.mask = torch.cat([aligned(self.mask[:, None, :, None], columns)[:, 0, :, 0], mask]) if before else mask


def aligned(states: Tensor, columns: int) -> Tensor:
    """The last `columns` columns of [rows, heads, length, size], or all of them behind columns of zeros."""
    length = states.shape[2]
    return states[:, :, length - columns :] if length >= columns else pad(states, (0, 0, columns - length, 0))
