"""The command line `flashmem-bench`: one file a command, each a thin layer over the modules that do the work.

This package is imported for `--help`, so it imports neither torch nor transformers nor pandas; commands import what
they need when they run. Every failure on purpose is one sentence on stderr and an exit code: 1 failed, 2 usage, 3
partial results, 130 interrupted. A traceback appears only with `--debug`.
"""

from __future__ import annotations

import sys
import traceback
from collections.abc import Sequence

from flashmem.errors import FlashMemError
from flashmem_bench.cli.app import app
from flashmem_bench.terminal import say

__all__ = ["app", "main", "run"]


def main() -> None:
    """Entry point of the console script."""
    try:
        sys.exit(run(sys.argv[1:]))
    except Exception:  # Only with --debug; the interpreter itself would print the message as it stands.
        say(traceback.format_exc())
        sys.exit(1)


def run(arguments: Sequence[str]) -> int:
    """Run one command line and return its exit code; nothing but a bug raises out of here, and that only in debug."""
    debug = "--debug" in arguments
    try:
        return int(app(list(arguments), prog_name="flashmem-bench", standalone_mode=False) or 0)
    except FlashMemError as error:
        if debug:
            raise
        return _fail(str(error), error.exit_code)
    except KeyboardInterrupt:
        return _fail("interrupted; the same command continues", 130)
    except BrokenPipeError:
        sys.stderr.close()
        return 1
    except Exception as error:
        if hasattr(error, "format_message"):  # A mistake in the command line, found by the parser.
            return _fail(_usage(error), 2)
        if type(error).__name__ == "Abort":
            return _fail("aborted", 130)
        if debug:
            raise
        reason = " ".join(str(error).split()) or "no message"
        return _fail(f"unexpected {type(error).__name__}: {reason}; run again with --debug for the traceback", 1)


def _usage(error: Exception) -> str:
    context = getattr(error, "ctx", None)
    command = context.command_path if context is not None else "flashmem-bench"
    message = str(error.format_message()).rstrip(".")  # type: ignore[attr-defined]
    return f"{message[:1].lower()}{message[1:]}; {command} --help shows how it is used"


def _fail(sentence: str, code: int) -> int:
    say(f"error: {' '.join(sentence.split())}")
    return code
