"""A progress bar for work that has stages rather than samples: training and calibration."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from flashmem_bench.fitting import Watcher
from flashmem_bench.terminal import clean, console


class BarWatcher(Watcher):
    """Draws one bar for the stage in progress, on stderr; on a plain pipe one line a stage."""

    def __init__(self) -> None:
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        self._console = console(stderr=True, soft_wrap=True)
        self.bar = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=24),
            TextColumn("{task.percentage:>3.0f}%"),
            TextColumn("{task.fields[text]}", markup=False),
            TimeRemainingColumn(compact=True),
            console=self._console,
            refresh_per_second=2,
            transient=True,
            disable=not self._console.is_terminal,
        )
        self._task = self.bar.add_task("", total=None, text="", visible=False)

    def stage(self, text: str, total: float | None = None) -> None:
        """See `Watcher.stage`."""
        self.bar.console.print(text, highlight=False)
        self.bar.reset(self._task, total=total, description=clean(text), text="", visible=True)

    def advance(self, done: float, text: str = "") -> None:
        """See `Watcher.advance`."""
        self.bar.update(self._task, completed=done, text=clean(text))


@contextmanager
def watching(quiet: bool) -> Iterator[Watcher]:
    """Yield a watcher that draws, or a silent one."""
    if quiet:
        yield Watcher()
        return
    watcher = BarWatcher()
    with watcher.bar:
        yield watcher
