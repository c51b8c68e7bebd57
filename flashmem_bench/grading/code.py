"""Programs: finding one in a completion and running it with its tests in the sandbox.

A suite's document says what is needed: `stub`, the beginning of a program that a completion may go on from; `preamble`,
what stands above an answer that is whole; `entry_points`, the names that its tests call; `kind` and `tests`; `limits`.
A program is only run where the document says `allow_code_execution`, which the harness puts there for the grading
alone, after the user has said so.

A completion is only read as text here, never parsed: the parser of this process would be at its mercy.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from importlib.util import find_spec
from typing import Any

from flashmem_bench.errors import DataError, UsageError
from flashmem_bench.grading.hooks import NO_ANSWER
from flashmem_bench.grading.outcome import GradeTimeout
from flashmem_bench.grading.sandbox import Limits, Outcome, active_layer, run_program
from flashmem_bench.suites import SuiteInfo, runs_code

METRIC = "pass_at_1"
# Keys of a document with which the harness, or `lm_eval --metadata`, gives the permission.
ALLOW, ALLOW_UNCONTAINED = "allow_code_execution", "allow_uncontained_code"
# Set by the harness alone: lm-eval's own evaluation would stop at the exception.
TELL_TIMEOUT = "tell_timeout"

# A completion that was cut off has no closing fence.
_BLOCK = re.compile(r"^[ \t]*```[ \t]*([\w+-]*)[^\n]*\n(.*?)(?:^[ \t]*```[ \t]*$|\Z)", re.MULTILINE | re.DOTALL)
_PYTHON = {"", "python", "python3", "py"}
# Where a base model that continues a function has left it, as lm-eval's humaneval stops.
_LEFT = re.compile(r"\n(?:class|def|#|if|print)")
_FIRST_LINE = re.compile(r"^(?:from[ \t]+\S+[ \t]+import\b|import\b|@|def\b|async[ \t]+def\b|class\b)", re.MULTILINE)
# A line that begins at the margin and still belongs to a program.
_STATEMENT = re.compile(
    r"[\s#@)\]}\"']|(?:from|import|def|async|class|if|elif|else|for|while|try|except|finally|with|return|raise|assert|"
    r"global|pass|match|case|print)\b|[A-Za-z_][\w.\[\]'\", ]*[ \t]*(?:[-+*/|&]?=|\(|:)"
)


def find_program(text: str, entry_points: Sequence[str], stub: str = "", preamble: str = "") -> str | None:
    """Return the program that a completion holds.

    The last fenced block that defines one of the names, else the last block of Python; where nothing is fenced, a
    completion that goes on from the stub, or the lines from the first to the last that read like a program.

    Args:
        text: The completion.
        entry_points: Names that the tests call.
        stub: The beginning of the program that the prompt showed; empty where it showed none.
        preamble: What the prompt had above the function, put above an answer that defines it anew.

    Returns:
        The whole program; None where there is none.
    """
    blocks = [code for language, code in _BLOCK.findall(text) if language.lower() in _PYTHON and code.strip()]
    whole = [code for code in blocks if _defines(code, entry_points)]
    if whole:
        return preamble + "\n" + whole[-1] if preamble else whole[-1]
    if blocks:
        return _continued(stub, blocks[-1]) if stub and blocks[-1][0].isspace() else blocks[-1]
    first = next((line for line in text.splitlines() if line.strip()), "")
    if stub and first[:1].isspace():
        return _continued(stub, text)
    program = _program_lines(text)
    if program is None or not _defines(program, entry_points):
        return None
    return preamble + "\n" + program if preamble else program


def _defines(code: str, names: Sequence[str]) -> bool:
    choice = "|".join(map(re.escape, names))
    return bool(re.search(rf"^[ \t]*(?:async[ \t]+)?(?:def|class)[ \t]+(?:{choice})\b", code, re.MULTILINE))


def _continued(stub: str, text: str) -> str:
    return stub + _LEFT.split(text, maxsplit=1)[0]


def _program_lines(text: str) -> str | None:
    """Return the lines from the first that can only be Python up to the first that cannot be."""
    start = _FIRST_LINE.search(text)
    if start is None:
        return None
    lines = text[start.start() :].split("\n")
    end = next((i for i, line in enumerate(lines) if line and not _STATEMENT.match(line)), len(lines))
    return "\n".join(lines[:end])


def filter_program(resps: Iterable[Sequence[str]], docs: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Keep the program that each completion holds."""
    return [[_program(text, doc) or NO_ANSWER for text in texts] for texts, doc in zip(resps, docs, strict=True)]


def _program(text: str, doc: Mapping[str, Any]) -> str | None:
    return find_program(text, doc["entry_points"], doc["stub"], doc["preamble"])


def program_results(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """Run the program with the document's tests; `pass_at_1` is 1.0 where all of them pass.

    Raises:
        UsageError: Nobody allowed it.
        GradeTimeout: It did not end in time and the document asks to be told; else that is a failed program.
        RuntimeError: The sandbox failed; the program may be right or wrong.
    """
    if results[0] == NO_ANSWER:
        return {METRIC: 0.0}
    _check_permission("this suite", bool(doc.get(ALLOW)), bool(doc.get(ALLOW_UNCONTAINED)))
    outcome = run_answer(doc, results[0])
    if outcome.status == "timeout" and doc.get(TELL_TIMEOUT):
        raise GradeTimeout(outcome.detail)
    if outcome.status == "error":
        raise RuntimeError(outcome.detail)
    return {METRIC: float(outcome.status == "passed")}


def run_answer(doc: Mapping[str, Any], program: str) -> Outcome:
    """Run a program with the tests of a document, without asking whether that is allowed.

    Raises:
        DataError: The tests need pytest, which is not installed.
    """
    limits = Limits(**doc.get("limits", {}))
    if doc["kind"] == "script":
        return run_program({"program.py": program, "tests.py": doc["tests"]}, "script", limits)
    require_pytest()
    return run_program({"solution.py": program, "test_solution.py": doc["tests"]}, "pytest", limits)


def require_pytest() -> None:
    """Check that pytest can be had inside the sandbox.

    Raises:
        DataError: It is not installed.
    """
    if find_spec("pytest") is None:
        raise DataError("the tests of this suite run under pytest, which is missing; pip install 'flashmem[code]'")


def permit_code(info: SuiteInfo, allowed: bool, uncontained: bool) -> None:
    """Refuse a suite whose grading would run programs that nobody allowed, or that nothing would keep in.

    Called before anything is generated, since the answers could not be graded.

    Raises:
        UsageError: The user has not said that programs may run, or that they may run without containment.
        DataError: The suite's tests need pytest, which is not installed.
    """
    if not runs_code(info):
        return
    if info.kind != "lm-eval":
        _check_permission(info.name, allowed, uncontained)
        if info.metadata.get("tests") == "pytest":
            require_pytest()
    elif not (allowed and uncontained):
        raise UsageError(
            f"{info.name} runs programs that the model writes, in lm-eval's own process and outside the sandbox; "
            "take a bundled code suite, or add --allow-code-execution and --allow-uncontained-code"
        )


def _check_permission(name: str, allowed: bool, uncontained: bool) -> None:
    if not allowed:
        raise UsageError(
            f"{name} runs programs that the model writes; add --allow-code-execution "
            "(flashmem-bench doctor says how they are kept in)"
        )
    if not uncontained and not active_layer().contained:
        raise UsageError(
            "nothing on this machine would keep the model's programs in (see flashmem-bench doctor); run where there "
            "are user namespaces or as root, or add --allow-uncontained-code"
        )
