"""Scores of answers against targets, by name or as functions; those here go to 100, where each answer is its target."""

import importlib
import math
import unicodedata
from collections.abc import Callable, Mapping, Sequence

import regex
from rouge_score.rouge_scorer import RougeScorer
from rouge_score.tokenizers import Tokenizer
from sacrebleu.metrics.chrf import CHRF

from sparselet.errors import ConfigError

Metric = Callable[[Sequence[str], Sequence[str]], float]  # answers and targets, as many

# Scripts that write words without spaces between them.
_UNSPACED = r"\p{Han}\p{Hiragana}\p{Katakana}\p{Bopomofo}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}\p{Tai_Tham}"
_SPACED = rf"[\p{{L}}\p{{Nd}}--[\p{{Latin}}{_UNSPACED}0-9[\p{{Common}}&&\p{{L}}]]]"
_TOKENS = regex.compile(
    rf"(?V1)[a-z0-9]+|[[{_UNSPACED}ー]&&\p{{L}}]\p{{M}}*|{_SPACED}(?:{_SPACED}|[\p{{M}}\u200c\u200d])*"  # joiners
)


class _Words(Tokenizer):
    """rouge-score's own tokens, runs of a to z and 0 to 9, and those of texts in other scripts than Latin.

    There a token is a run of letters, marks and digits, or one letter with its marks where no spaces part the words (Chinese,
    Japanese, Thai ...). A text without any token, such as `+`, has its characters as tokens.
    """

    def tokenize(self, text: str) -> list[str]:
        text = text.lower()
        tokens = [unicodedata.normalize("NFC", match.group()) for match in _TOKENS.finditer(text)]
        return tokens or [character for character in text if not character.isspace()]


def rouge_l(answers: Sequence[str], targets: Sequence[str]) -> float:
    """Mean Rouge-L F1 × 100 (Lin 2004; rouge-score, without stemming), the paper's measure. Of Latin script the tokens are
    rouge-score's own; of others they are words, or single characters where no spaces part the words."""
    scores = rouge_l_of_each(answers, targets)
    return 100 * sum(scores) / len(scores)


def rouge_l_of_each(answers: Sequence[str], targets: Sequence[str]) -> list[float]:
    """Rouge-L F1 of each answer, from 0 to 1."""
    scorer = RougeScorer(["rougeL"], tokenizer=_Words())
    return [scorer.score(target, answer)["rougeL"].fmeasure for answer, target in zip(answers, targets, strict=True)]


def exact_match(answers: Sequence[str], targets: Sequence[str]) -> float:
    """Answers equal to their target up to white space and case, per hundred."""
    same = [" ".join(a.split()).casefold() == " ".join(t.split()).casefold() for a, t in zip(answers, targets, strict=True)]
    return 100 * sum(same) / len(same)


def chrf(answers: Sequence[str], targets: Sequence[str]) -> float:
    """chrF2 of all answers together (Popović 2015; sacrebleu's defaults: characters up to 6-grams, no words, β = 2)."""
    if len(answers) != len(targets):
        raise ValueError(f"{len(answers)} answers to {len(targets)} targets")
    return CHRF().corpus_score(list(answers), [list(targets)]).score


METRICS: dict[str, Metric] = {"rougeL": rouge_l, "exact_match": exact_match, "chrf": chrf}
DEFAULT_METRICS = ("rougeL", "exact_match")


def choose_metrics(metrics: Sequence[str | Metric], field: str = "metric") -> dict[str, Metric]:
    """Metrics by name: those of METRICS, `module:function` of an importable module, and functions by their own name.

    field: the name of the setting, for messages.

    Raises ConfigError for a name that is unknown or there twice, for none, and for a module that cannot be imported.
    """
    chosen: dict[str, Metric] = {}
    for metric in metrics:
        name = metric if isinstance(metric, str) else getattr(metric, "__name__", type(metric).__name__)
        if name in chosen:
            raise ConfigError(f"{field}: {name!r} is there twice.")
        chosen[name] = METRICS[name] if name in METRICS and isinstance(metric, str) else _function(metric, field)
    if not chosen:
        raise ConfigError(f"{field}: expected at least one of {', '.join(METRICS)}.")
    return chosen


def measure(metrics: Mapping[str, Metric], answers: Sequence[str], targets: Sequence[str], task: str) -> dict[str, float]:
    """Each metric of a task's answers. Raises ConfigError where one fails, or gives anything but a finite number."""
    scores: dict[str, float] = {}
    for name, metric in metrics.items():
        try:
            scores[name] = float(metric(answers, targets))
        except Exception as error:  # of a function that a user wrote
            raise ConfigError(f"metric {name} fails on task {task}: {type(error).__name__}: {error}") from error
        if not math.isfinite(scores[name]):
            raise ConfigError(f"metric {name} is {scores[name]} on task {task}; expected a finite number.")
    return scores


def _function(metric: str | Metric, field: str) -> Metric:
    if not isinstance(metric, str):
        return metric
    module, colon, name = metric.partition(":")
    expected = f"expected {', '.join(METRICS)} or MODULE:FUNCTION"
    if not colon or not module or not name:
        raise ConfigError(f"{field}: {metric!r} is unknown; {expected}.")
    try:
        function: Metric = getattr(importlib.import_module(module), name)
    except Exception as error:  # whatever the module raises
        raise ConfigError(f"{field}: cannot import {metric!r}: {type(error).__name__}: {error}; {expected}.") from error
    if not callable(function):
        raise ConfigError(f"{field}: {metric!r} is {type(function).__name__}, which cannot be called; {expected}.")
    return function
