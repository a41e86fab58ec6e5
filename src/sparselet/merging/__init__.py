"""Merging experts into one. A method is a function of deltas and weights, and a line in `METHODS`."""

from sparselet.merging.average import overlap, uniform
from sparselet.merging.stream import METHODS, merge, merge_to

__all__ = ["METHODS", "merge", "merge_to", "overlap", "uniform"]
