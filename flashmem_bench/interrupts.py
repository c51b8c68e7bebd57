"""How a run is stopped: the first Ctrl-C asks, the second does not wait.

SIGTERM, which schedulers send some time before SIGKILL, counts as a Ctrl-C. While `shielded`, a second one is only
noted (`Stop.at_once`), for code that looks at it several times a second or is about to store a row; a third raises
wherever it comes.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType


class Interrupted(Exception):
    """The user, or a scheduler, asked to stop; everything finished is stored.

    Args:
        signum: The signal that asked.
    """

    def __init__(self, signum: int = signal.SIGINT):
        super().__init__("interrupted")
        self.signum = signum

    @property
    def exit_code(self) -> int:
        """130 after Ctrl-C, 143 after SIGTERM, as shells report a process that a signal has ended."""
        return 128 + self.signum

    def sentence(self, command: str) -> str:
        """Say so, with the command that continues."""
        return f"interrupted; everything finished is stored. Continue with: {command}"


@dataclass
class Stop:
    """Whether the user asked to stop.

    Attributes:
        asked: Samples in progress are finished, no other is begun.
        at_once: Those in progress are not waited for either.
        signum: The signal that asked.
    """

    asked: bool = False
    at_once: bool = False
    signum: int = signal.SIGINT
    _shields: int = 0

    @contextmanager
    def shielded(self) -> Iterator[None]:
        """Have a second Ctrl-C noted instead of raised."""
        self._shields += 1
        try:
            yield
        finally:
            self._shields -= 1

    def take(self, signum: int, frame: FrameType | None = None) -> None:
        """Handle a signal.

        Raises:
            KeyboardInterrupt: It is not to be waited any longer.
        """
        if not self.asked:
            self.asked, self.signum = True, signum
        elif self._shields and not self.at_once:
            self.at_once = True
        else:
            self.at_once = True
            raise KeyboardInterrupt


@contextmanager
def interruptible() -> Iterator[Stop]:
    """Turn the first Ctrl-C or SIGTERM into `Stop.asked`; the second raises KeyboardInterrupt."""
    stop = Stop()
    previous = {}
    try:
        for signum in (signal.SIGINT, signal.SIGTERM):
            previous[signum] = signal.signal(signum, stop.take)
    except ValueError:  # Not in the main thread, where signals cannot be caught.
        yield stop
        return
    try:
        yield stop
    finally:
        for signum, handler in previous.items():
            signal.signal(signum, handler)
