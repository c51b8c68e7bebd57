"""What runs on a node of a Ray cluster: a servant that is asked for one sample after another.

Ray keeps the process and carries the messages; nothing here imports it. Answers are pulled, so that whoever asks has
each row as soon as it is finished, and a node that is lost takes along the samples under way and no others. What goes
wrong comes back as a sentence, never as an exception: its type need not be loadable on the other side.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flashmem_bench import __version__
from flashmem_bench.interrupts import Stop

if TYPE_CHECKING:
    from flashmem_bench.answers import Finished
    from flashmem_bench.executors.servant import Servant, Task
    from flashmem_bench.executors.travel import Parcel
    from flashmem_bench.prepare import Reference
    from flashmem_bench.session import Request


@dataclass(frozen=True)
class Reply:
    """What comes back of a question.

    Attributes:
        value: The answer.
        notes: What the user should know.
        trouble: Why there is no answer, a sentence; None where there is one.
        exit_code: Of the command, should that end it.
        parcels: Files that were made on the way.
    """

    value: Any = None
    notes: tuple[str, ...] = ()
    trouble: str | None = None
    exit_code: int = 1
    parcels: tuple[Parcel, ...] = ()


@dataclass(frozen=True)
class Question:
    """What a question is about.

    Attributes:
        request: The user's, its paths from the root.
        suite: The suite, as the request names it.
        unseen: Paths of the request that this node does not see.
        shared: It sees the results folder.
    """

    request: Request
    suite: str
    unseen: frozenset[str] = frozenset()
    shared: bool = True


@dataclass
class _Piece:
    """Samples that are being answered."""

    finished: Generator[Finished]
    summary: Callable[[], dict[str, Any]]


class Answerer:
    """Answers questions; it holds a backbone from the first one on."""

    def __init__(self) -> None:
        self._folder: Path | None = None
        self._servant: Servant | None = None
        self._piece: _Piece | None = None
        self._banks: set[str] = set()
        # The same for all pieces, so that the method which answered one answers the next.
        self._stop, self._notes = Stop(), list[str]()

    def hello(self, token: str, text: str, paths: Sequence[str]) -> dict[str, Any]:
        """Return what must be known before anything else is sent; plain values alone, whatever the version here.

        Args:
            token: Path of a file in the results folder.
            text: What it holds.
            paths: What the request names besides.
        """
        from flashmem_bench.executors.travel import seen

        shared, unseen = seen(token, text), [path for path in paths if not Path(path).exists()]
        if unseen or not shared:
            self._folder = self._folder or Path(tempfile.mkdtemp(prefix="flashmem-"))
        return {"version": __version__, "folder": str(self._folder or ""), "shared": shared, "unseen": unseen}

    def plan(self, question: Question, method: str, reference: Reference | None, *sent: Parcel) -> Reply:
        """Return the `PlainPlan` of a cell and what its timings depend on, with the banks that were made for it."""

        def answer(note: Callable[[str], None]) -> Any:
            servant, suite = self._at(question, sent)
            return servant.plan(suite, method, reference, note), servant.environment()

        from flashmem_bench.executors.travel import banks_made

        reply = _guarded(answer)
        banks = banks_made(self._folder) if self._folder is not None else ()
        made = tuple(bank for bank in banks if bank.path not in self._banks)
        self._banks |= {bank.path for bank in made}
        return Reply(reply.value, reply.notes, reply.trouble, reply.exit_code, made)

    def begin(self, question: Question, task: Task, *sent: Parcel) -> Reply:
        """Take up a piece of a cell; returns what its timings depend on."""

        def answer(note: Callable[[str], None]) -> Any:
            servant, suite = self._at(question, sent)
            here, self._stop.asked = replace(task, suite=suite), False
            self._piece = _Piece(servant.answers(here, self._stop, self._notes.append), servant.summary)
            return servant.environment()

        return _guarded(answer)

    def next(self, stopping: bool) -> Reply:
        """Return the next finished sample of the piece; None, and then the summary, where there is no more.

        Args:
            stopping: Samples under way are finished, no other is begun.
        """
        piece = self._piece
        assert piece is not None
        self._stop.asked = self._stop.asked or stopping

        def answer(note: Callable[[str], None]) -> Any:
            finished = next(piece.finished, None)
            return (finished, None) if finished is not None else (None, piece.summary())

        reply = _guarded(answer)
        notes, self._notes[:] = tuple(self._notes), []
        return Reply(reply.value, notes, reply.trouble, reply.exit_code)

    def leave(self) -> None:
        """Remove what was written here."""
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)

    def _at(self, question: Question, sent: Sequence[Parcel]) -> tuple[Servant, str]:
        """Return the servant, asked as the user asked but for the places, and the suite as it is called here."""
        from flashmem_bench.executors.servant import Servant
        from flashmem_bench.executors.travel import arrived, suite_here, unpack
        from flashmem_bench.session import Session

        request, suite = question.request, question.suite
        if self._folder is not None:
            unpack(self._folder, sent)
            self._banks |= {parcel.path.removeprefix("results/") for parcel in sent}
            request = arrived(request, self._folder, question.unseen, question.shared)
            suite = suite_here(suite, self._folder, question.unseen)
        if self._servant is None:
            self._servant = Servant(Session(request))
        self._servant.session.request = request
        return self._servant, suite


def _guarded(answer: Callable[[Callable[[str], None]], Any]) -> Reply:
    from flashmem.errors import FlashMemError
    from flashmem_bench.errors import sentence

    notes: list[str] = []
    try:
        return Reply(answer(notes.append), tuple(notes))
    except FlashMemError as error:
        return Reply(None, tuple(notes), str(error), error.exit_code)
    except Exception as error:
        return Reply(None, tuple(notes), f"a worker failed: {sentence(error)}")
