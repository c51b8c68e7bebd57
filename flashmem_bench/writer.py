"""Writes rows of a cell beside the generation of the next sample.

Making a row durable takes the disk several milliseconds, as long as a small model needs for several tokens, and none
of it is computing. One thread does the waiting. At most one row is under way: `put` first waits for the row before
it, so a kill can cost the row that was being written and no other, and a failed write stops the run at the next row.
"""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flashmem_bench.cell_store import CellStore


class RowWriter:
    """Appends rows to a cell in order; leaving the context waits for the last one."""

    def __init__(self, cell: CellStore):
        self._cell = cell
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="rows")
        self._last: Future[None] | None = None

    def __enter__(self) -> RowWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._thread.shutdown(wait=True)
        # While another error is on its way out, a failed write must not hide it.
        if kind is None:
            self.wait()

    def put(self, row: dict[str, Any], text: dict[str, Any]) -> None:
        """Begin to write a row.

        Raises:
            StoreError: The row before this one could not be written.
        """
        self.wait()
        self._last = self._thread.submit(self._cell.append, row, text)

    def wait(self) -> None:
        """Wait for the row under way and raise what went wrong with it."""
        last, self._last = self._last, None
        if last is not None:
            last.result()
