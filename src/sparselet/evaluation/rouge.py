"""Scores of answers against targets."""

from collections.abc import Sequence

from rouge_score.rouge_scorer import RougeScorer


def rouge_l(answers: Sequence[str], targets: Sequence[str]) -> float:
    """Mean Rouge-L F1 × 100 (Lin 2004; rouge-score, without stemming), the paper's measure."""
    scores = rouge_l_of_each(answers, targets)
    return 100 * sum(scores) / len(scores)


def rouge_l_of_each(answers: Sequence[str], targets: Sequence[str]) -> list[float]:
    """Rouge-L F1 of each answer, from 0 to 1."""
    scorer = RougeScorer(["rougeL"])
    return [scorer.score(target, answer)["rougeL"].fmeasure for answer, target in zip(answers, targets, strict=True)]


def exact_match(answers: Sequence[str], targets: Sequence[str]) -> float:
    """Answers equal to their target up to white space and case, per hundred."""
    same = [" ".join(a.split()).casefold() == " ".join(t.split()).casefold() for a, t in zip(answers, targets, strict=True)]
    return 100 * sum(same) / len(same)
