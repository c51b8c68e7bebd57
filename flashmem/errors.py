"""The errors of the library.

Every message is one sentence that says what is wrong and what to do next: the command line prints it as it is.
`exit_code` is what a process that ends with the error returns (1 failed, 2 wrong usage).
"""

from __future__ import annotations


class FlashMemError(Exception):
    """Base of all errors that a user can do something about."""

    exit_code = 1


class ConfigError(FlashMemError):
    """A setting has the wrong type or lies outside its range."""

    exit_code = 2


class UnsupportedBackboneError(FlashMemError):
    """A model family whose attention or cache the method cannot use."""


class CheckpointError(FlashMemError):
    """A memory checkpoint that is damaged, or that belongs to another backbone."""


class PromptTooLongError(FlashMemError):
    """A prompt (with its answer budget) that needs more positions than the backbone has."""
