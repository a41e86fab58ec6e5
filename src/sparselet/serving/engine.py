"""`Engine`: one thread that answers requests for many experts with one model, in the cheaper of two ways.

Swapping: one expert at a time is in the model's weights, written in place; the base weights come back bit for bit. Each
expert's requests are a batch of their own. Mixed: the base model is in the weights, and all requests are one batch, to each row
of which its own expert's product is added. Either way a row reads keys and values of its own expert, and no others.
"""

import contextlib
import logging
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sparselet.apply import apply_temporarily
from sparselet.errors import ModelError, ServerBusy
from sparselet.fingerprint import Fingerprint
from sparselet.generation.decode import can_decode
from sparselet.generation.padding import padding_side
from sparselet.generation.prompts import padding_token, prompt_format
from sparselet.profiles.collect import prompt_states
from sparselet.serving.limits import ServingLimits
from sparselet.serving.mixed_products import MixedProducts
from sparselet.serving.request import GenerationRequest, Output
from sparselet.serving.row_batch import Remembering, RowBatch
from sparselet.serving.scheduler import SWAPS_IN_SLICE, ExpertGroup, Scheduler
from sparselet.serving.served_expert import ServedExpert
from sparselet.serving.step_costs import StepCosts

logger = logging.getLogger("sparselet")

TRIED_STEPS = 8  # mixed steps before they may be found too dear


@dataclass
class EngineCounts:
    """What an engine has done. swap_seconds: of all swaps together. mixed_steps: of `steps`."""

    swaps: int = 0
    swap_seconds: float = 0.0
    steps: int = 0
    mixed_steps: int = 0
    tokens: int = 0


class Engine:
    """Answers `GenerationRequest`s from a thread of its own, from `start` until `stop`.

    model: the base model without adapters, which nothing else may use or change meanwhile. base: its fingerprints by target.
    remembering: of sparse attention, set before `start` where the model attends sparsely; limits then have one row, not mixed.
    Raises ModelError for a model whose rows cannot be decoded together (`can_decode`).
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        base: Mapping[str, Fingerprint],
        limits: ServingLimits | None = None,
    ) -> None:
        if padding_side(model) != "left" or not can_decode(model):
            raise ModelError(
                f"the model ({model.config.model_type}) cannot be served: that needs a decoder with full attention in every "
                "layer, and generation settings without processors of logits."
            )
        self.limits, self.counts = limits or ServingLimits(), EngineCounts()
        self.scheduler = Scheduler(self.limits)
        self.model = model
        self.remembering: Remembering | None = None
        self._tokenizer, self._base = tokenizer, base
        self._pad_token = padding_token(prompt_format(model, tokenizer, chat_template=False))
        self._batches: dict[ExpertGroup, RowBatch] = {}
        self._mixed: RowBatch | None = None  # in place of all of these while experts are mixed
        self._products = MixedProducts(model) if self.limits.mixed else None
        self._costs, self._mode_began, self._mode_steps = StepCosts(), 0.0, 0
        self._changed = threading.Condition()
        self._closing = self._aborting = False
        self._resident: ServedExpert | None = None
        self._weights = contextlib.ExitStack()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        """Begin to answer."""
        self._thread.start()

    def submit(self, request: GenerationRequest) -> None:
        """Queue a request. Raises ServerBusy, RequestRefused."""
        with self._changed:
            if self._closing:
                raise ServerBusy("the server is shutting down.", retry_after=10)
            self.scheduler.add(request)
            self._changed.notify()

    def stop(self, drain: bool = True) -> None:
        """Accept no more requests, and return when all are answered, or failed with `drain=False`, and the base is restored."""
        with self._changed:
            self._closing, self._aborting = True, self._aborting or not drain
            self._changed.notify()
        if self._thread.ident is not None:
            self._thread.join()

    @property
    def running(self) -> int:
        """Requests that have begun."""
        return sum(len(group.running) for group in list(self.scheduler.groups.values()))

    @property
    def accepts(self) -> bool:
        """Whether requests are accepted and answered."""
        return self._thread.is_alive() and not self._closing

    def _run(self) -> None:
        try:
            while self._wait_for_work():
                self._work()
        finally:
            self._weights.close()

    def _wait_for_work(self) -> bool:
        """Sleep until there are requests; False when the engine is to end."""
        with self._changed:
            while not self.scheduler.waiting and not self.running and not self._closing:
                self._changed.wait()
            if self._aborting:
                for group in list(self.scheduler.groups.values()):
                    self._fail(group, ServerBusy("the server is shutting down.", retry_after=10))
                self._mixed = None
            return bool(self.scheduler.waiting or self.running)

    def _work(self) -> None:
        """One step: drop what was cancelled, choose a group or all, begin requests, decode a token of each row."""
        with self._changed:
            self._drop_cancelled()
            groups = self.scheduler.able()
            mixes = self._chooses_mixed(groups)
            if mixes:
                admitted = self.scheduler.admit_oldest()
            else:
                chosen = self.scheduler.choose(self._mean_swap)
                groups = [] if chosen is None else [chosen]
                admitted = [] if chosen is None else self.scheduler.admit(chosen)
                self._batches = {group: batch for group, batch in self._batches.items() if group.running or group is chosen}
        if not groups:
            return
        try:
            if mixes != (self._mixed is not None):
                self._change_mode(mixes, groups)
            if self._mixed is not None:
                self._make_resident(None)
                self._decode(self._mixed, groups, admitted)
            else:
                self._make_resident(groups[0].expert)
                batch = self._batches.setdefault(groups[0], self._new_batch())
                self._decode(batch, groups, admitted)
        except Exception as error:  # of the model or the machine; other groups go on
            logger.exception("answering for %s failed", " and ".join(group.expert.digest for group in groups))
            if mixes or self._mixed is not None:  # all fail together, so experts are swapped from now on
                self._mixed, self._products, groups = None, None, list(self.scheduler.groups.values())
            with self._changed:
                for group in groups:
                    self._fail(group, error)

    def _drop_cancelled(self) -> None:
        self.scheduler.drop_cancelled()
        for batch in [*self._batches.values(), *([] if self._mixed is None else [self._mixed])]:
            for request in batch.drop_cancelled():
                self.scheduler.finish(self.scheduler.groups[request.expert.digest], request)

    def _decode(self, batch: RowBatch, groups: Sequence[ExpertGroup], admitted: Sequence[GenerationRequest]) -> None:
        if len(batch):
            work, began = _work_of(batch), time.monotonic()
            self.counts.tokens += batch.step()
            self.counts.steps += 1
            if batch is self._mixed:
                self.counts.mixed_steps += 1
                self._mode_steps += 1
                self._costs.measure_mixed(work, time.monotonic() - began)
            else:
                self._costs.measure_plain(sum(rows for _, rows in work.values()), time.monotonic() - began)
        answered = [request for request in admitted if not request.state_only]
        if answered:
            batch.join(answered)
            self.counts.tokens += len(answered)
        for request in admitted:
            if request.state_only:
                request.emit(Output(state=prompt_states(self.model, [request.prompt])[0]))
        rows = {answer.request for answer in batch.answers}
        with self._changed:
            for group in groups:
                for request in group.running - rows:
                    self.scheduler.finish(group, request)

    def _chooses_mixed(self, groups: Sequence[ExpertGroup]) -> bool:
        """Whether all groups are answered in one batch now. That goes on for as long as the engine would stay with an expert,
        and for at least a few steps, so that a slow one does not decide."""
        mixes, products = self._mixed is not None, self._products
        if products is None or not all(products.can_mix(group.expert) for group in groups):
            return False
        stay = max(self.limits.max_wait, SWAPS_IN_SLICE * self._mean_swap)
        if mixes and (time.monotonic() - self._mode_began < stay or self._mode_steps < TRIED_STEPS):
            return True
        rows = {group: min(self.limits.max_rows, len(group.running) + len(group.waiting)) for group in groups}
        work = {group.expert.digest: (group.expert.nnz, count) for group, count in rows.items()}
        swap_share = self._mean_swap / stay if stay else 0.0
        return len(groups) > 1 and self._costs.mixed_is_cheaper(work, self.limits.max_rows, swap_share, mixes)

    def _change_mode(self, mixes: bool, groups: Sequence[ExpertGroup]) -> None:
        """Put the rows of all groups into one batch, or back into one for each group."""
        if mixes:
            assert self._products is not None
            mixed = self._new_batch(self._products)
            for group in groups:
                self._products.prepare(group.expert)
            for batch in self._batches.values():
                mixed.take_over(batch)
            self._batches, self._mixed = {}, mixed
        else:
            assert self._mixed is not None
            for group in [group for group in self.scheduler.groups.values() if group.running]:
                self._batches[group] = self._new_batch()
                self._batches[group].take_over(self._mixed, group.expert)
            self._mixed = None
            with self._changed:
                self.scheduler.leave_all()
        self._mode_began, self._mode_steps = time.monotonic(), 0

    def _new_batch(self, products: MixedProducts | None = None) -> RowBatch:
        return RowBatch(self.model, self._tokenizer, self._pad_token, products, self.remembering)

    @property
    def _mean_swap(self) -> float:
        return self.counts.swap_seconds / max(1, self.counts.swaps)

    def _make_resident(self, expert: ServedExpert | None) -> None:
        """Write an expert into the weights, in place of the one that is there; None for the base weights."""
        if expert is not None and expert.adapter is None:
            expert = None
        digests = [None if each is None else each.digest for each in (expert, self._resident)]
        if digests[0] == digests[1]:
            return
        began = time.monotonic()
        self._weights.close()
        self._resident = None
        if expert is not None and expert.adapter is not None:
            self._weights.enter_context(apply_temporarily(self.model, expert.adapter, self._base))
            self._resident = expert
        self.counts.swaps += 1
        self.counts.swap_seconds += time.monotonic() - began

    def _fail(self, group: ExpertGroup, error: Exception) -> None:
        """End all requests of a group with an error."""
        self._batches.pop(group, None)
        for request in [*group.running]:
            self.scheduler.finish(group, request)
            request.emit(Output(error=error))
        self.scheduler.waiting -= len(group.waiting)
        while group.waiting:
            group.waiting.popleft().emit(Output(error=error))


def _work_of(batch: RowBatch) -> dict[str, tuple[int, int]]:
    """By expert its selected entries and its rows in a batch."""
    work: dict[str, tuple[int, int]] = {}
    for answer in batch.answers:
        expert = answer.request.expert
        work[expert.digest] = (expert.nnz, work.get(expert.digest, (0, 0))[1] + 1)
    return work
