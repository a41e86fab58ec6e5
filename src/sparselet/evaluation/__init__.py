"""Measuring models on tasks."""

from sparselet.evaluation.harness import EvalResult, EvalSettings, evaluate
from sparselet.evaluation.metrics import METRICS, chrf, exact_match, rouge_l

__all__ = ["METRICS", "EvalResult", "EvalSettings", "chrf", "evaluate", "exact_match", "rouge_l"]
