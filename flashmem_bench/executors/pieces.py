"""What is left of a cell's samples, in pieces for workers, and who is to blame when a worker ends.

A worker takes the next piece when it has done its last one, so there are more pieces than workers: the last ones even
out what samples differ in length. What a worker had not done when it ended goes to another. Of those that it had begun,
one by itself is guilty of a limit that was exceeded; several are asked again one by one, so that only the guilty one
fails. A worker that died for no reason that is known here may have been another's victim, so its samples have a second
chance before they fail. Nothing here knows of processes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from flashmem_bench.shards import split

if TYPE_CHECKING:
    from flashmem_bench.tasks import Sample

# The last piece of a worker is on average half a piece too long: with 8 pieces each, 6 % of its time. A stream of
# samples (`--batch-size`) also runs empty at the end of every piece, so there are fewer.
_PIECES, _PIECES_OF_STREAMS = 8, 2


@dataclass(frozen=True)
class Piece:
    """Batches that one worker answers in one go.

    Attributes:
        batches: Indices of samples, see `executors.base.Work`.
        wanted: The indices among them whose rows are missing.
        alone: It is one sample that had been under way when a worker ended.
    """

    batches: list[list[int]]
    wanted: frozenset[int]
    alone: bool = False


@dataclass(frozen=True)
class Fault:
    """Why a worker ended.

    Attributes:
        reason: The rest of a sentence about a sample.
        overdue: The samples that exceeded a limit, for which the worker was stopped; None where it died by itself.
    """

    reason: str
    overdue: frozenset[int] | None = None


@dataclass
class Pieces:
    """The samples of a cell that have no row yet.

    Attributes:
        left: Their indices, whether a worker has them or not.
    """

    left: set[int]
    _waiting: list[Piece] = field(default_factory=list)
    _deaths: Counter[int] = field(default_factory=Counter)

    @classmethod
    def of(
        cls, batches: Sequence[list[int]], wanted: Iterable[int], samples: Sequence[Sample], workers: int, streams: bool
    ) -> Pieces:
        """Split batches among so many workers; `streams` says that several samples are answered at once."""
        pieces = cls(set(wanted))
        parts = split(batches, samples, workers * (_PIECES_OF_STREAMS if streams else _PIECES))
        found = [piece for part in parts if (piece := _piece(part, pieces.left)) is not None]
        # What is large comes first: a large piece at the end would keep one worker busy and the others idle.
        pieces._waiting = sorted(found, key=lambda piece: -len(piece.wanted))
        return pieces

    @property
    def waiting(self) -> int:
        """How many pieces nobody has taken."""
        return len(self._waiting)

    def take(self) -> Piece | None:
        """Return the next piece; None where there is none to take."""
        return self._waiting.pop(0) if self._waiting else None

    def finished(self, index: int) -> bool:
        """Note that a sample has its row; returns whether it was still missing."""
        missing = index in self.left
        self.left.discard(index)
        return missing

    def give_back(self, piece: Piece, under_way: Iterable[int], fault: Fault) -> list[int]:
        """Put back what a worker has left of a piece.

        Args:
            piece: What it had.
            under_way: What it had begun.
            fault: Why it ended.

        Returns:
            The samples that fail: they are no longer left, and the caller makes their rows.
        """
        begun = sorted(self.left.intersection(under_way))
        for index in begun:
            self._deaths[index] += fault.overdue is None
        guilty = [index for index in begun if len(begun) == 1 and self._is_guilty(index, fault)]
        again = [Piece([[index]], frozenset([index]), True) for index in begun if index not in guilty]
        rest = _piece(piece.batches, self.left.difference(begun))
        self.left.difference_update(guilty)
        self._waiting[:0] = [*again, *([rest] if rest is not None else [])]
        return guilty

    def _is_guilty(self, index: int, fault: Fault) -> bool:
        return self._deaths[index] > 1 if fault.overdue is None else index in fault.overdue


def _piece(batches: Sequence[list[int]], left: set[int]) -> Piece | None:
    """Return the batches that hold a sample that is left; None where none does."""
    kept = [batch for batch in batches if not left.isdisjoint(batch)]
    return Piece(kept, frozenset(left.intersection(index for batch in kept for index in batch))) if kept else None
