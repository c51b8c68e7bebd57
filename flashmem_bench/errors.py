"""The errors of the harness, each one a sentence with the next step.

A command prints the message and exits with `exit_code`; a traceback appears only with `--debug`. Nothing here imports
torch: the command line loads this module before it knows whether a model is needed.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from flashmem.errors import FlashMemError
from flashmem_bench.privacy import redact


def sentence(error: Exception) -> str:
    """Return what an error says on one line, fit to be stored; where it is none of this project's, with its type."""
    text = redact(" ".join(str(error).split()))
    return text if isinstance(error, FlashMemError) else f"{type(error).__name__}: {text}"


class BenchError(FlashMemError):
    """Base of the errors raised by the harness itself (exit code 1)."""


class UsageError(BenchError):
    """The command was asked for something that it cannot mean (exit code 2)."""

    exit_code = 2


# What `flashmem-bench list` calls the kinds that it can show.
_LISTED = {"suite": "suites", "method": "methods", "ablation axis": "ablations", "model": "models", "run": "runs"}


class UnknownNameError(UsageError):
    """A name that no registry knows, with its near misses.

    Args:
        kind: What was named, e.g. `suite`, `method`, `ablation axis`, `setting`.
        name: The name as the user wrote it.
        known: Every name that would have been accepted.
    """

    def __init__(self, kind: str, name: str, known: Iterable[str]):
        self.kind, self.name, self.known = kind, name, sorted(known)
        super().__init__(self._sentence())

    def _sentence(self) -> str:
        near = near_misses(self.name, self.known)
        hint = f" (did you mean {' or '.join(near)}?)" if near else ""
        if self.kind in _LISTED:
            return f"no {self.kind} named {self.name!r}{hint}; flashmem-bench list {_LISTED[self.kind]} shows all"
        shown = "" if near else f"; known: {', '.join(self.known)}"
        return f"no {self.kind} named {self.name!r}{hint}{shown}"


class DataError(BenchError):
    """Data is missing, empty or broken; the message names the row or the ways out."""


class StoreError(BenchError):
    """The results folder cannot be used: not writable, or of another schema."""


class MissingCheckpointError(BenchError):
    """A method needs a trained memory or a threshold that was not found; the message gives the commands."""


def near_misses(name: str, known: Iterable[str], limit: int = 3) -> list[str]:
    """Return the known names that look like `name`, best first, ignoring case and `_` against `-`."""
    plain = {entry.lower().replace("_", "-"): entry for entry in known}
    wanted = name.lower().replace("_", "-")
    close = difflib.get_close_matches(wanted, plain, n=limit, cutoff=0.6)
    if not close:
        close = [entry for entry in plain if wanted and (entry.startswith(wanted) or wanted in entry)][:limit]
    return [plain[entry] for entry in close]
