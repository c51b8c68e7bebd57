"""Does a suite's grader give the full score to the suite's own right answers? What `doctor --gold` measures.

The target of every sample of every split, which is what training would teach, is graded as if a model had written it.
What does not get the full score is a broken row, an answer that its own tests refuse, or a grader that is wrong.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from flashmem_bench.errors import DataError, UsageError

if TYPE_CHECKING:
    from flashmem_bench.samples import Sample
    from flashmem_bench.tasks import Suite

SPLITS = ("test", "train", "validation", "calibration")
FULL = 1.0


@dataclass(frozen=True)
class GoldCheck:
    """How a suite's right answers fare.

    Attributes:
        suite: Its name.
        right: Samples whose target has the full score.
        samples: All of them.
        refused: Ids of the others, with what the grader said.
    """

    suite: str
    right: int
    samples: int
    refused: Sequence[str]


def grade_targets(suite: Suite, limit: int | None = None) -> GoldCheck:
    """Grade the targets of every split that a suite has.

    Args:
        suite: The suite; one that runs programs must be allowed to.
        limit: The first so many samples of each split; None takes all.
    """
    samples = {sample.sample_id: sample for split in SPLITS for sample in _part(suite, split)[:limit]}
    grades = [(name, suite.grade(sample, sample.target)) for name, sample in samples.items()]
    refused = [f"{name} ({grade.parse_status}, score {grade.score:g})" for name, grade in grades if grade.score < FULL]
    return GoldCheck(suite.name, len(grades) - len(refused), len(grades), refused)


def _part(suite: Suite, split: str) -> Sequence[Sample]:
    """Return a split; what a suite does not have, or whose file is not here, is none. A test split must be."""
    try:
        return suite.samples(split)
    except (UsageError, DataError):
        if split == SPLITS[0]:
            raise
        return ()
