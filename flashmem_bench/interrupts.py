"""How a run is stopped: the first Ctrl-C asks, the second does not wait."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType


class Interrupted(Exception):
    """The user asked to stop; everything finished is stored."""


@dataclass
class Stop:
    """Whether the user asked to stop."""

    asked: bool = False


@contextmanager
def interruptible() -> Iterator[Stop]:
    """Turn the first Ctrl-C into `Stop.asked`; the second raises KeyboardInterrupt."""
    stop = Stop()

    def handle(signum: int, frame: FrameType | None) -> None:
        if stop.asked:
            raise KeyboardInterrupt
        stop.asked = True

    try:
        previous = signal.signal(signal.SIGINT, handle)
    except ValueError:  # Not in the main thread, where signals cannot be caught.
        yield stop
        return
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, previous)
