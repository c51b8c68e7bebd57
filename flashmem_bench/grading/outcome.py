"""What a grader may say besides metrics."""

from __future__ import annotations


class GradeTimeout(Exception):
    """The deadline struck before there was a verdict: no points, counted apart from wrong answers."""
