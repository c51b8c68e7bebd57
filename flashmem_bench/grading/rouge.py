"""ROUGE of a summary: the F1 of shared words, word pairs and longest common subsequences.

The measures are those of the `rouge-score` package with its default tokenizer (lower case, letters and digits) and
the Porter stemmer on, as F1. ROUGE-Lsum compares sentence by sentence and needs them on lines of their own, so both
texts are split first: at line ends, and behind `.`, `!` or `?` (with closing quotes or brackets) where white space
and then a capital, a digit or an opening quote or bracket follows. This splitter knows no abbreviations ("the U.S.
Army" is cut in two); it needs no data files, and of the four measures it touches ROUGE-Lsum alone.

Version 1 of this splitting; the number in a suite file's `grader` goes up when a grade can change.
"""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Any

MEASURES = ("rouge1", "rouge2", "rougeL", "rougeLsum")
_SENTENCE_END = re.compile(r"(?<=[.!?])([\"'”’)\]]*)\s+(?=[\"'“‘(\[]*[A-Z0-9])")


def sentences(text: str) -> list[str]:
    """Return the sentences of a text, none of them blank."""
    lines = (_SENTENCE_END.sub(r"\1\n", line) for line in text.splitlines())
    return [part.strip() for line in lines for part in line.split("\n") if part.strip()]


def rouge(summary: str, reference: str) -> dict[str, float]:
    """Return the F1 of each of `MEASURES`, between 0 and 1; an empty summary scores 0."""
    found = _scorer().score("\n".join(sentences(reference)), "\n".join(sentences(summary)))
    return {name: float(found[name].fmeasure) for name in MEASURES}


@lru_cache(maxsize=1)
def _scorer() -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(list(MEASURES), use_stemmer=True)
