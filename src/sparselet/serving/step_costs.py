"""`StepCosts`: what a decoding step costs, as measured, and which of two ways to answer several experts is cheaper."""

from collections.abc import Mapping

DECAY = 0.98  # of a measured step's weight at each further one
SHARE = 0.2  # of the last measured step in the mean of what products add, once there are five
FORGETTING = 0.99  # of that mean at each step of one expert, so that mixing is tried again after a while
ROW_COST = 0.1  # of a row in a sparse product, relative to reading its matrix
EAGERNESS = 0.9  # the other way must cost less than this fraction


class StepCosts:
    """Seconds of a step of n rows with one expert in the weights: a + b·n, by least squares over the last steps. A mixed step
    adds c·Σ nnzₑ·(1 + 0.1·nₑ) over its experts, c the mean of the last mixed steps.
    """

    def __init__(self) -> None:
        self._sums = [0.0] * 5  # of 1, n, n², s, n·s
        self._added: float | None = None
        self._mixed = 0  # measured mixed steps

    def measure_plain(self, rows: int, seconds: float) -> None:
        """A step with one expert in the weights."""
        terms = (1.0, rows, rows * rows, seconds, rows * seconds)
        self._sums = [DECAY * total + term for total, term in zip(self._sums, terms, strict=True)]
        self._added = None if self._added is None else FORGETTING * self._added

    def measure_mixed(self, work: Mapping[str, tuple[int, int]], seconds: float) -> None:
        """A mixed step. work: by expert its selected entries and its rows."""
        size = _product_size(work)
        if size:
            added = max(0.0, seconds - self.plain(sum(rows for _, rows in work.values()))) / size
            self._mixed += 1
            before = self._added or 0.0
            self._added = before + max(SHARE, 1 / self._mixed) * (added - before)

    def plain(self, rows: int) -> float:
        """Estimated seconds of a step with one expert in the weights; 0 if none was measured."""
        count, n, nn, s, ns = self._sums
        spread = count * nn - n * n
        if spread <= 1e-6 * count * nn:  # one number of rows
            return s / count if count else 0.0
        slope = max(0.0, (count * ns - n * s) / spread)
        return max(0.0, (s - slope * n) / count) + slope * rows

    def mixed_is_cheaper(self, work: Mapping[str, tuple[int, int]], limit: int, swap_share: float, mixes: bool) -> bool:
        """Whether a token costs less in a mixed step than in steps of one expert each.

        work: by expert its selected entries and the rows that it could have. limit: of a mixed step's rows. swap_share: time of
        swaps, relative to the steps between them. mixes: whether mixed steps are in use, which go on unless the other way is
        cheaper by a tenth. Until steps of one expert are measured it is False; until a mixed one is, its products cost nothing.
        """
        total = sum(rows for _, rows in work.values())
        if not self._sums[0] or not total:
            return False
        swapping = sum(self.plain(rows) for _, rows in work.values()) * (1 + swap_share) / total
        share = min(1.0, limit / total)
        mixing = (self.plain(min(total, limit)) + (self._added or 0.0) * _product_size(work, share)) / min(total, limit)
        return EAGERNESS * mixing < swapping if mixes else mixing < EAGERNESS * swapping


def _product_size(work: Mapping[str, tuple[int, int]], share: float = 1.0) -> float:
    return sum(entries * (1 + ROW_COST * share * rows) for entries, rows in work.values())
