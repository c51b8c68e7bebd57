"""The comparison that the worker process of `maths` runs.

Nothing else imports this module, since math-verify takes a second to import, and the worker does that before any
deadline runs. math-verify's own time-outs are switched off: they rest on signals, which work in the main thread alone
and cannot interrupt a C function. The worker's deadline holds instead.
"""

from __future__ import annotations

from math_verify import parse, verify


def equal_expressions(answer: str, gold: str) -> bool:
    """Return whether math-verify holds both for the same; takes as long as it takes."""
    expected, given = (parse(f"\\boxed{{{text}}}", parsing_timeout=None) for text in (gold, answer))
    return bool(verify(expected, given, timeout_seconds=None))
