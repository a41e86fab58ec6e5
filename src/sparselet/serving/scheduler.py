"""`Scheduler`: which expert's requests the engine computes next, and which of them may begin."""

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from sparselet.errors import RequestRefused, ServerBusy
from sparselet.serving.limits import ServingLimits
from sparselet.serving.request import GenerationRequest
from sparselet.serving.served_expert import ServedExpert

SWAPS_IN_SLICE = 4  # an expert stays for at least as long as this many swaps take: swaps cost at most a fifth of the time


@dataclass(eq=False)
class ExpertGroup:
    """The requests of one expert. left: when the engine last left it, in seconds. running: requests that have begun."""

    expert: ServedExpert
    waiting: deque[GenerationRequest] = field(default_factory=deque)
    running: set[GenerationRequest] = field(default_factory=set)
    left: float = 0.0

    @property
    def waits_since(self) -> float:
        """Since when it has waited for the engine, if the engine is with another group."""
        return self.left if self.running else max(self.left, self.waiting[0].arrived)


class Scheduler:
    """Groups requests by the content of their experts, and chooses a group whenever the engine asks for one.

    The engine stays with a group while it has work. It leaves a group that has had its slice (`SWAPS_IN_SLICE`) once another
    has waited longer than `limits.max_wait`; of several the one that has waited longest is next. So with N groups that all have
    work, a group waits for at most N slices and swaps. Requests that have begun keep their keys and values meanwhile.
    """

    def __init__(self, limits: ServingLimits, clock: Callable[[], float] = time.monotonic) -> None:
        self.limits, self.clock = limits, clock
        self.groups: dict[str, ExpertGroup] = {}
        self.active: ExpertGroup | None = None
        self.waiting = self.cache_tokens = 0  # requests that wait; tokens of those that have begun
        self._entered = 0.0

    def add(self, request: GenerationRequest) -> None:
        """Queue a request. Raises ServerBusy, and RequestRefused for one that is larger than the whole cache."""
        if request.cache_tokens > self.limits.cache_tokens:
            raise RequestRefused(
                f"the prompt and max_tokens are {request.cache_tokens} tokens; the server keeps {self.limits.cache_tokens}.",
                "max_tokens",
            )
        if self.waiting >= self.limits.max_queue:
            raise ServerBusy(f"{self.waiting} requests wait already; try again later.", retry_after=2)
        group = self.groups.setdefault(request.expert.digest, ExpertGroup(request.expert))
        group.waiting.append(request)
        self.waiting += 1

    def able(self) -> list[ExpertGroup]:
        """The groups that have requests which have begun, or may begin."""
        self.groups = {digest: group for digest, group in self.groups.items() if group.waiting or group.running}
        return [group for group in self.groups.values() if group.running or self._fits(group)]

    def choose(self, swap_seconds: float) -> ExpertGroup | None:
        """The group to compute now, None without work. swap_seconds: what a swap takes, as measured."""
        able, now = self.able(), self.clock()
        if self.active not in able:
            self.active = None
        others = [group for group in able if group is not self.active]
        oldest = min(others, key=lambda group: group.waits_since, default=None)
        if oldest is None:
            return self.active
        if self.active is not None:
            overdue = now - oldest.waits_since > self.limits.max_wait
            if now - self._entered < SWAPS_IN_SLICE * swap_seconds or not overdue:
                return self.active
            self.active.left = now
        self.active, self._entered = oldest, now
        return oldest

    def admit(self, group: ExpertGroup) -> list[GenerationRequest]:
        """The waiting requests of a group that begin now, the oldest first, as far as rows and cache allow.

        None begin while an older, overdue request of another group lacks room in the cache, so that room becomes free for it.
        """
        now, admitted = self.clock(), []
        heads = [other.waiting[0] for other in self.groups.values() if other is not group and other.waiting]
        blocked = [head.arrived for head in heads if now - head.arrived > self.limits.max_wait and not self._has_room(head)]
        while group.waiting and len(group.running) < self.limits.max_rows and self._fits(group):
            if min(blocked, default=now) < group.waiting[0].arrived:
                break
            admitted.append(self._begin(group))
        return admitted

    def admit_oldest(self) -> list[GenerationRequest]:
        """The waiting requests of all groups that begin now in one batch, the oldest first, as far as rows and cache allow."""
        admitted: list[GenerationRequest] = []
        rows = sum(len(group.running) for group in self.groups.values())
        while rows + len(admitted) < self.limits.max_rows:
            waiting = [group for group in self.groups.values() if group.waiting]
            oldest = min(waiting, key=lambda group: group.waiting[0].arrived, default=None)
            if oldest is None or not self._fits(oldest):
                break
            admitted.append(self._begin(oldest))
        return admitted

    def leave_all(self) -> None:
        """The engine has answered all groups together, and is with none of them now."""
        self.active = None
        for group in self.groups.values():
            group.left = self.clock()

    def finish(self, group: ExpertGroup, request: GenerationRequest) -> None:
        """A request of the group has ended."""
        group.running.remove(request)
        self.cache_tokens -= request.cache_tokens

    def drop_cancelled(self) -> None:
        """Remove cancelled requests that have not begun."""
        for group in self.groups.values():
            kept = deque(request for request in group.waiting if not request.cancelled)
            self.waiting -= len(group.waiting) - len(kept)
            group.waiting = kept

    def _begin(self, group: ExpertGroup) -> GenerationRequest:
        request = group.waiting.popleft()
        self.waiting -= 1
        group.running.add(request)
        self.cache_tokens += request.cache_tokens
        return request

    def _fits(self, group: ExpertGroup) -> bool:
        return bool(group.waiting) and self._has_room(group.waiting[0])

    def _has_room(self, request: GenerationRequest) -> bool:
        return self.cache_tokens + request.cache_tokens <= self.limits.cache_tokens
