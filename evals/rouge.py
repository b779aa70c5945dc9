"""ROUGE of one summary, for the task files in tasks/: lm-eval calls it by document. It comes with lm-eval."""

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

METRICS = ("rouge1", "rouge2", "rougeL")


def score_summary(document: Mapping[str, Any], written: Sequence[str]) -> dict[str, float]:
    """Returns the F-measures, in [0, 1], of the first text written against document["summary"], of stemmed words."""
    scores = _scorer().score(document["summary"], written[0])
    return {name: float(scores[name].fmeasure) for name in METRICS}


@cache
def _scorer() -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(list(METRICS), use_stemmer=True)
