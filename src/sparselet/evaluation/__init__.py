"""Measuring models on tasks."""

from sparselet.evaluation.generate import generate
from sparselet.evaluation.harness import EvalSettings, Result, evaluate
from sparselet.evaluation.rouge import exact_match, rouge_l

__all__ = ["EvalSettings", "Result", "evaluate", "exact_match", "generate", "rouge_l"]
