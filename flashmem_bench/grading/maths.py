r"""Whether two mathematical expressions are equal, decided by math-verify in a worker process.

Two spellings that differ only in spaces and in commands that change the look alone (`\dfrac` for `\frac`, `\left(`
for `(`) are equal without asking anyone. For the rest math-verify parses both and compares them as sympy objects:
values, expressions, sets, intervals, matrices (`expressions`). An answer that cannot be parsed is wrong; a
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

_worker = Worker("flashmem_bench.grading.expressions:equal_expressions", DEADLINE_S)


def same_maths(answer: str, gold: str) -> bool:
    """Return whether an answer equals the right one.

    Args:
        answer: LaTeX or plain text, without its box.
        gold: The same for the right answer. The order matters: `x = 5` answers `5`.

    Raises:
        GradeTimeout: The comparison did not end within `DEADLINE_S` seconds.
    """
    plain = plain_maths(answer)
    if not plain:
        return False
    return plain == plain_maths(gold) or bool(_worker.call(_bare(answer), _bare(gold)))


def plain_maths(text: str) -> str:
    """Return the expression without spaces, sizes of brackets and outer dollar signs."""
    bare = _bare(text)
    # Behind `\left` and `\right` stands a bracket or a dot for none; `\leftarrow` is another word.
    bare = re.sub(r"\\(left|right)(?=[a-zA-Z])", r"\\keep\1", bare)
    bare = _LOOKS.sub("", _FRACTIONS.sub(r"\\frac", bare))
    return bare.replace("\\keep", "\\")


def _bare(text: str) -> str:
    """Return the text without outer dollar signs and the full stop of its sentence."""
    return text.strip().rstrip(".").strip("$").strip().rstrip(".")
