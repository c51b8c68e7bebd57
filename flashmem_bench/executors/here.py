"""Answers in this process, one cell after another."""

from __future__ import annotations

from collections.abc import Callable, Generator
from typing import TYPE_CHECKING, Any

from flashmem_bench.answers import CellAnswers, Finished
from flashmem_bench.executors.base import Work
from flashmem_bench.prepare import Prepared, Reference, prepare

if TYPE_CHECKING:
    from flashmem_bench.session import Session


class Here:
    """See `executors.base.Executor`.

    Args:
        session: Holds the backbone.
    """

    name = "here"
    workers = 1

    def __init__(self, session: Session):
        self.session = session
        self._answers: CellAnswers | None = None

    def plan(self, suite: str, method: str, reference: Reference | None, note: Callable[[str], None]) -> Prepared:
        """See `Executor.plan`."""
        return prepare(self.session, suite, method, reference, note)

    def environment(self) -> dict[str, Any]:
        """See `Executor.environment`."""
        from flashmem_bench.environment import describe

        return describe(self.session.backbone)

    def answers(self, work: Work, note: Callable[[str], None]) -> Generator[Finished]:
        """See `Executor.answers`."""
        assert isinstance(work.plan, Prepared)
        answers = self._answers
        # The shards of a cell that come to one process share the method, which is built and warmed up once.
        if answers is None or answers.prepared is not work.plan or answers.stop is not work.stop:
            answers = self._answers = CellAnswers(self.session, work.plan, work.stop, note, work.began)
        return answers.finished(work.batches, work.wanted)

    def summary(self) -> dict[str, Any]:
        """See `Executor.summary`."""
        return self._answers.summary() if self._answers is not None else {}

    def close(self) -> None:
        """See `Executor.close`."""
        self._answers = None
