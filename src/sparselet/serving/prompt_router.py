"""`PromptRouter`: which expert answers a request that names none, by the prompt's state in the base model."""

import threading

from torch import Tensor

from sparselet.errors import RequestRefused
from sparselet.profiles.profile import Profile
from sparselet.profiles.router import Route, Router
from sparselet.serving.latest import Latest
from sparselet.serving.registry import ExpertRegistry

KEPT_STATES = 4096  # of the prompts that were routed last


class PromptRouter:
    """Routes prompts among the registered experts that have a profile, by `Router` with its defaults.

    A prompt's state is of the base model alone, so it is kept while experts come and go; the router is made anew when the
    experts with a profile change.

    states: of the last prompts, float32 [width], by their tokens.
    """

    def __init__(self, registry: ExpertRegistry) -> None:
        self._registry = registry
        self._lock = threading.Lock()
        self.states: Latest[tuple[int, ...], Tensor] = Latest(KEPT_STATES)
        self._router: tuple[dict[str, Profile], Router] | None = None

    def chat_template(self) -> bool:
        """Whether the candidates were trained with the chat template; True unless all that say so were trained without."""
        trained = {self._registry[name].metadata.chat_template for name in self.candidates()} - {None}
        return trained != {False}

    def candidates(self) -> dict[str, Profile]:
        """The experts with a profile, by name. Raises RequestRefused for fewer than two."""
        profiles = {name: r.profile for name, r in self._registry.registrations().items() if r.profile is not None}
        if len(profiles) < 2:
            raise RequestRefused(
                f"experts are chosen by their profiles, and {len(profiles)} of the served experts have one; two are needed. "
                "`sparselet profile EXPERT` makes one; then load the expert again.",
                "model",
            )
        return profiles

    def route(self, state: Tensor) -> Route:
        """The expert nearest to a state, float32 [width]. Raises RequestRefused, and what `Router` raises."""
        profiles = self.candidates()
        with self._lock:
            if self._router is None or self._router[0] != profiles:
                self._router = profiles, Router(profiles)
            router = self._router[1]
        return router.route(state[None])[0]
