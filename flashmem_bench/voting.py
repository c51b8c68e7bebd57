"""Self-consistency: many answers, one vote (Wang et al., 2023).

The answers of one sample vote with what the suite's extractor finds in them; an answer without any has no vote unless
none has. The most frequent wins, of several the one that came first. From one set of n answers the whole curve follows:
the vote over the first 1, 2, ... n of them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from flashmem_bench.tasks import Sample, Suite

CURVE_PREFIX = "sc_"


def winner(answers: Sequence[str | None]) -> int:
    """Return the place of the first answer that the majority gives.

    Args:
        answers: What was extracted from each, None where there was nothing.

    Raises:
        ValueError: No answers.
    """
    if not answers:
        raise ValueError("nobody votes")
    counted = Counter(answer for answer in answers if answer is not None) or Counter(answers)
    # Counter keeps the order of first appearance, and max takes the first of equals.
    return answers.index(max(counted, key=counted.__getitem__))


def curve(suite: Suite, sample: Sample, texts: Sequence[str]) -> dict[str, float]:
    """Return the score of the vote over the first 1, 2, ... answers as `sc_1`, `sc_2`, ...; empty without answers.

    A vote whose winner could not be graded in time is left out.
    """
    grades = [suite.grade(sample, text) for text in texts]
    found = [grade.extracted for grade in grades]
    won = {n: grades[winner(found[:n])] for n in range(1, len(texts) + 1)}
    return {f"{CURVE_PREFIX}{n}": float(grade.score) for n, grade in won.items() if grade.counts}
