"""What a person sees while cells run; the runner knows only the `Progress` protocol.

The bar shows samples, the running score, the time per text token and the triggers a sample. It is drawn on stderr, so
that stdout stays for results. Nothing here changes a result.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol

from flashmem_bench.terminal import clean, console

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress as RichBar
    from rich.progress import TaskID


class Progress(Protocol):
    """Told what the runner does."""

    def note(self, text: str) -> None:
        """A sentence that the user should see."""

    def start(self, title: str, total: int, done: int) -> None:
        """A cell begins; `done` of its `total` samples are there already."""

    def advance(self, row: Mapping[str, Any]) -> None:
        """A sample is finished."""

    def stop(self) -> None:
        """The cell has ended."""


class Silent:
    """Shows nothing."""

    def note(self, text: str) -> None:
        """See `Progress.note`."""

    def start(self, title: str, total: int, done: int) -> None:
        """See `Progress.start`."""

    def advance(self, row: Mapping[str, Any]) -> None:
        """See `Progress.advance`."""

    def stop(self) -> None:
        """See `Progress.stop`."""


class Running:
    """Running means of one cell."""

    def __init__(self) -> None:
        self.score_sum = self.scored = self.samples = self.triggers = self.tokens = 0.0
        self.milliseconds = 0.0

    def add(self, row: Mapping[str, Any]) -> None:
        """Take one row in."""
        self.samples += 1
        if row.get("score") is not None:
            self.score_sum, self.scored = self.score_sum + row["score"], self.scored + 1
        self.triggers += row.get("triggers") or 0
        self.tokens += row.get("output_tokens") or 0
        self.milliseconds += row.get("e2e_ms") or 0.0

    def columns(self) -> dict[str, str]:
        """Return the texts of the bar's columns."""
        return {
            "score": f"score {self.score_sum / self.scored:.3f}" if self.scored else "score -",
            "speed": f"{self.milliseconds / self.tokens:.2f} ms/token" if self.tokens else "- ms/token",
            "triggers": f"{self.triggers / self.samples:.2f} triggers" if self.samples else "- triggers",
        }


class Bar:
    """A rich progress bar on stderr; on a plain pipe one line a cell."""

    def __init__(self) -> None:
        self._console: Console = console(stderr=True, soft_wrap=True)
        self._bar: RichBar | None = None
        self._task: TaskID | None = None
        self._running, self._title = Running(), ""

    def note(self, text: str) -> None:
        """Print a sentence above the bar."""
        (self._bar.console if self._bar else self._console).print(text, style="yellow", highlight=False)

    def start(self, title: str, total: int, done: int) -> None:
        """Open the bar of a cell."""
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self._running, self._title = Running(), title
        if not self._console.is_terminal:
            return
        self._bar = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[score]}"),
            TextColumn("{task.fields[speed]}"),
            TextColumn("{task.fields[triggers]}"),
            TimeRemainingColumn(compact=True),
            console=self._console,
            refresh_per_second=4,
            transient=True,
        )
        self._bar.start()
        # What a bar draws by itself, several times a second, does not pass the console's printing.
        self._task = self._bar.add_task(clean(title), total=total, completed=done, **self._running.columns())

    def advance(self, row: Mapping[str, Any]) -> None:
        """Move the bar on."""
        self._running.add(row)
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, advance=1, **self._running.columns())

    def stop(self) -> None:
        """Close the bar and leave one line about the cell."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = self._task = None
        if self._running.samples:
            parts = ", ".join(self._running.columns().values())
            self._console.print(f"{self._title}: {int(self._running.samples)} samples, {parts}", highlight=False)


def progress_for(quiet: bool) -> Progress:
    """Return the progress display; none with `--quiet`."""
    return Silent() if quiet or sys.stderr is None else Bar()
