"""The errors that the library raises on purpose.

Each message is one clear sentence that says what was wrong and what to do next, so that a command line can print it
as it stands. `exit_code` is what a command line should exit with. This module imports nothing heavy.
"""

from __future__ import annotations


class FlashMemError(Exception):
    """Base of every error that FlashMem raises on purpose."""

    exit_code = 1


class ConfigError(FlashMemError):
    """A setting has a bad value, type or range."""

    exit_code = 2


class UnsupportedBackboneError(FlashMemError):
    """The model family cannot carry the method; the message says why."""


class CheckpointError(FlashMemError):
    """A memory checkpoint is missing, corrupt, or belongs to another backbone."""


class PromptTooLongError(FlashMemError):
    """The prompt does not fit into the positions of the backbone."""
