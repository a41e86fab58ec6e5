"""Measuring models on tasks."""

from sparselet.evaluation.harness import EvalSettings, Result, evaluate
from sparselet.evaluation.metrics import METRICS, chrf, exact_match, rouge_l

__all__ = ["METRICS", "EvalSettings", "Result", "chrf", "evaluate", "exact_match", "rouge_l"]
