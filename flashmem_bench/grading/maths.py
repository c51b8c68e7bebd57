r"""Whether two mathematical expressions are equal, decided by math-verify in a worker process.

Two spellings that differ only in spaces and in commands that change the look alone (`\dfrac` for `\frac`, `\left(`
for `(`) are equal without asking anyone. For the rest math-verify parses both and compares them as sympy objects:
values, expressions, sets, intervals, matrices. Its own time-outs are switched off, since they rest on signals, which
work in the main thread alone; the worker's deadline holds instead. An answer that cannot be parsed is wrong; a
comparison that does not end is neither right nor wrong (`GradeTimeout`).

Version 1 of this comparison; the number in a suite file's `grader` goes up when a grade can change.
"""

from __future__ import annotations

import re

from flashmem_bench.grading.worker import Worker

DEADLINE_S = 10.0
# Commands that change how a formula looks and not what it says.
_LOOKS = re.compile(r"\\(?:left|right|[,;:!]|displaystyle(?![a-zA-Z]))|\\ |~|\s")
_FRACTIONS = re.compile(r"\\[dt]frac(?![a-zA-Z])")

_worker = Worker("flashmem_bench.grading.maths:equal_expressions", DEADLINE_S)


def same_maths(answer: str, gold: str) -> bool:
    """Return whether an answer equals the right one.

    Args:
        answer: LaTeX or plain text, without its box and without dollar signs around it.
        gold: The same for the right answer. The order matters: `x = 5` answers `5`.

    Raises:
        GradeTimeout: The comparison did not end within `DEADLINE_S` seconds.
    """
    plain = plain_maths(answer)
    if not plain:
        return False
    return plain == plain_maths(gold) or bool(_worker.call(answer, gold))


def plain_maths(text: str) -> str:
    """Return the expression without spaces, sizes of brackets and outer dollar signs."""
    bare = text.strip().removeprefix("$").removesuffix("$").strip().removesuffix(".")
    # Behind `\left` and `\right` stands a bracket or a dot for none; `\leftarrow` is another word.
    bare = re.sub(r"\\(left|right)(?=[a-zA-Z])", r"\\keep\1", bare)
    bare = _LOOKS.sub("", _FRACTIONS.sub(r"\\frac", bare))
    return bare.replace("\\keep", "\\")


def equal_expressions(answer: str, gold: str) -> bool:
    """Compare with math-verify; runs in the worker process, without any deadline of its own."""
    from math_verify import parse, verify

    expected, given = (parse(f"\\boxed{{{text}}}", parsing_timeout=None) for text in (gold, answer))
    return bool(verify(expected, given, timeout_seconds=None))
