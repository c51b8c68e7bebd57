"""Grading summaries of a meeting by ROUGE with the Porter stemmer; for ROUGE-Lsum each line is a sentence."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from flashmem_bench.grading.hooks import NO_ANSWER

_KINDS = ("rouge1", "rouge2", "rougeL", "rougeLsum")


def meeting_results(doc: dict[str, Any], results: Sequence[str]) -> dict[str, float]:
    """Grade a summary against `doc["gold"]`: F1 of each kind, 0 to 1."""
    text = "" if results[0] == NO_ANSWER else results[0]
    found = _scorer().score(doc["gold"], text)
    return {kind: float(found[kind].fmeasure) for kind in _KINDS}


@lru_cache(maxsize=1)
def _scorer() -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(list(_KINDS), use_stemmer=True)
