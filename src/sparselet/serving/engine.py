"""`Engine`: one thread that answers requests for many experts with one model.

One expert at a time is in the model's weights, written in place; the base weights come back bit for bit. Each expert's requests
are a batch of their own with their own keys and values, which are read only while that expert is in the weights: after a swap
nothing that other weights computed is used.
"""

import contextlib
import logging
import threading
import time
from collections.abc import Mapping
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
from sparselet.serving.request import GenerationRequest, Output
from sparselet.serving.row_batch import RowBatch
from sparselet.serving.scheduler import ExpertGroup, Scheduler
from sparselet.serving.served_expert import ServedExpert

logger = logging.getLogger("sparselet")


@dataclass
class EngineCounts:
    """What an engine has done. swap_seconds: of all swaps together."""

    swaps: int = 0
    swap_seconds: float = 0.0
    steps: int = 0
    tokens: int = 0


class Engine:
    """Answers `GenerationRequest`s from a thread of its own, from `start` until `stop`.

    model: the base model without adapters, which nothing else may use or change meanwhile. base: its fingerprints by target.
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
        self._model, self._tokenizer, self._base = model, tokenizer, base
        self._pad_token = padding_token(prompt_format(model, tokenizer, chat_template=False))
        self._batches: dict[ExpertGroup, RowBatch] = {}
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
            return bool(self.scheduler.waiting or self.running)

    def _work(self) -> None:
        """One step: drop what was cancelled, choose a group, write its expert, begin requests, decode a token of each row."""
        with self._changed:
            self.scheduler.drop_cancelled()
            for group, batch in self._batches.items():
                for request in batch.drop_cancelled():
                    self.scheduler.finish(group, request)
            mean_swap = self.counts.swap_seconds / max(1, self.counts.swaps)
            group = self.scheduler.choose(mean_swap)
            self._batches = {kept: batch for kept, batch in self._batches.items() if kept.running or kept is group}
            admitted = [] if group is None else self.scheduler.admit(group)
        if group is None:
            return
        try:
            self._make_resident(group.expert)
            self._decode(group, admitted)
        except Exception as error:  # of the model or the machine; other groups go on
            logger.exception("answering for %s failed", group.expert.digest)
            with self._changed:
                self._fail(group, error)

    def _decode(self, group: ExpertGroup, admitted: list[GenerationRequest]) -> None:
        batch = self._batches.setdefault(group, RowBatch(self._model, self._tokenizer, self._pad_token))
        if len(batch):
            self.counts.tokens += batch.step()
            self.counts.steps += 1
        answered = [request for request in admitted if not request.state_only]
        if answered:
            batch.join(answered)
            self.counts.tokens += len(answered)
        for request in admitted:
            if request.state_only:
                request.emit(Output(state=prompt_states(self._model, [request.prompt])[0]))
        rows = {answer.request for answer in batch.answers}
        with self._changed:
            for request in group.running - rows:
                self.scheduler.finish(group, request)

    def _make_resident(self, expert: ServedExpert) -> None:
        """Write an expert into the weights, in place of the one that is there."""
        if self._resident is not None and self._resident.digest == expert.digest:
            return
        began = time.monotonic()
        self._weights.close()
        self._resident = None
        if expert.adapter is not None:
            self._weights.enter_context(apply_temporarily(self._model, expert.adapter, self._base))
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
