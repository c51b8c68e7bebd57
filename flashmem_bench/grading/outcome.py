"""What a grader says when it cannot say right or wrong."""

from __future__ import annotations


class GradeTimeout(Exception):
    """Grading did not finish within its deadline.

    A program of the model that does not end is a failed program, so there the time-out counts as wrong. A grader that
    cannot decide whether two expressions are equal says nothing about the answer, so there the sample has no score.

    Attributes:
        counts_as_wrong: The score is 0; otherwise the sample has none and stays out of every mean.
    """

    def __init__(self, message: str = "grading ran into its deadline", *, counts_as_wrong: bool = True):
        super().__init__(message)
        self.counts_as_wrong = counts_as_wrong
