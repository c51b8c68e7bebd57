"""Writes rows of a cell beside the generation of the next sample, and says when a row is safe.

Making a row durable takes the disk several milliseconds, as long as a small model needs for several tokens, and none
of it is computing. One thread does the waiting. Rows that gather while it waits go to the disk together, and at most
`ROOM` rows wait beside those that it writes: a run that is faster than its disk waits for it. A kill can cost rows that
are under way and no others. A failed write stops the run at the next row.

A row is announced when the disk has it, never before, and always in the thread that puts rows in, so that whoever is
told may draw a progress bar.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flashmem_bench.cell_store import CellStore

ROOM = 16
Row = dict[str, Any]


class RowWriter:
    """Appends rows to a cell in order; leaving the context waits for the last one.

    Args:
        cell: Where the rows go.
        durable: Called with each row, in order, when a kill can no longer cost it; by `put`, `wait` or at the exit.
    """

    def __init__(self, cell: CellStore, durable: Callable[[Row], None] | None = None):
        self._cell, self._durable = cell, durable
        self._waiting: queue.Queue[tuple[Row, Row] | None] = queue.Queue(maxsize=ROOM)
        self._written: queue.SimpleQueue[Row] = queue.SimpleQueue()
        self._error: BaseException | None = None
        self._waited_s = 0.0
        self._thread = threading.Thread(target=self._run, name="rows", daemon=True)
        self._thread.start()

    def __enter__(self) -> RowWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._timed(self._end)
        self._announce()
        # While another error is on its way out, a failed write must not hide it.
        if kind is None:
            self._raise()

    @property
    def write_ms(self) -> float:
        """How long the run had to wait for its rows so far, in milliseconds."""
        return self._waited_s * 1e3

    def put(self, row: Row, text: Row) -> None:
        """Begin to write a row.

        Raises:
            StoreError: A row before this one could not be written.
        """
        self._announce()
        self._raise()
        self._timed(lambda: self._waiting.put((row, text)))

    def wait(self) -> None:
        """Wait for the rows under way and raise what went wrong with them."""
        self._timed(self._waiting.join)
        self._announce()
        self._raise()

    def _timed(self, action: Callable[[], None]) -> None:
        began = time.perf_counter()
        try:
            action()
        finally:
            self._waited_s += time.perf_counter() - began

    def _end(self) -> None:
        try:
            self._close_queue()
        except KeyboardInterrupt:
            # The rows under way take milliseconds and are not given up; then the interrupt goes on.
            self._close_queue()
            raise

    def _close_queue(self) -> None:
        if self._thread.is_alive():
            self._waiting.put(None)
            self._thread.join()

    def _announce(self) -> None:
        while not self._written.empty():
            row = self._written.get()
            if self._durable is not None:
                self._durable(row)

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        ended = False
        while not ended:
            group, ended = self._next_group()
            # After a failure nothing more is written: what is missing is run again.
            if group and self._error is None:
                self._write(group)
            for _ in range(len(group) + ended):
                self._waiting.task_done()

    def _next_group(self) -> tuple[list[tuple[Row, Row]], bool]:
        """Return all rows that wait, at least one, and whether the last one is among them."""
        entry = self._waiting.get()
        group = []
        while entry is not None:
            group.append(entry)
            try:
                entry = self._waiting.get_nowait()
            except queue.Empty:
                return group, False
        return group, True

    def _write(self, group: list[tuple[Row, Row]]) -> None:
        try:
            self._cell.append_many(group)
        except BaseException as error:
            self._error = error
            return
        for row, _ in group:
            self._written.put(row)
