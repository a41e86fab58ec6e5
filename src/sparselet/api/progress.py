"""Progress of a verb, reported to a callback."""

from collections.abc import Callable

ProgressCallback = Callable[[float, float], None]
"""Called with the amount of work done and the total."""


class StepCounter:
    """Reports each call as steps of a total.

    total: the number of steps. callback: receives the steps done and the total; None reports to nobody.
    """

    def __init__(self, total: float, callback: ProgressCallback | None) -> None:
        self.total, self.callback, self.done = total, callback, 0.0

    def step(self, _: object = None) -> None:
        """Report one step. The argument, such as a target's name, is ignored."""
        self.advance(1)

    def advance(self, steps: float) -> None:
        """Report several steps."""
        self.done += steps
        if self.callback is not None:
            self.callback(self.done, self.total)
