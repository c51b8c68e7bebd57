"""How much may go wrong before a run is stopped, and how long it may take: what the user sets, checked."""

from __future__ import annotations

import math
from dataclasses import dataclass

from flashmem_bench.errors import BenchError, UsageError


@dataclass(frozen=True)
class Limits:
    """Limits of a run; None is no limit.

    Attributes:
        sample_timeout: Seconds that a sample may take, its grading included.
        cell_timeout: Seconds that the missing samples of a cell may take together.
        worker_memory: GiB of resident memory that a worker process may have.
        fail_on_error: Share of a cell's samples that may fail before the run ends.
    """

    sample_timeout: float | None = None
    cell_timeout: float | None = None
    worker_memory: float | None = None
    fail_on_error: float = 1.0

    def __post_init__(self) -> None:
        for option in ("sample_timeout", "cell_timeout", "worker_memory"):
            value = getattr(self, option)
            if value is not None and not (0 < value < math.inf):
                raise UsageError(f"--{option.replace('_', '-')} must be a number above 0, not {value:g}")
        if not 0 <= self.fail_on_error <= 1:
            raise UsageError(f"--fail-on-error must be a share from 0 to 1, not {self.fail_on_error:g}")

    @property
    def need_a_process(self) -> bool:
        """Whether samples must be answered in a process of their own: only such a one can be stopped."""
        return any(value is not None for value in (self.sample_timeout, self.cell_timeout, self.worker_memory))

    def exceeded(self, failed: int, total: int) -> bool:
        """Return whether too many of a cell's samples have failed."""
        return failed > self.fail_on_error * total


class TooManyErrors(BenchError):
    """More samples of a cell failed than `--fail-on-error` allows; the run ends (exit code 1)."""
