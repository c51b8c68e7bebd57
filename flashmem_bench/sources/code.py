"""Programming problems whose answers are programs with tests."""

from __future__ import annotations

import ast
import builtins
import re
from collections.abc import Callable, Mapping
from typing import Any

from flashmem_bench.data import Doc, Splits, SuiteFiles, text_field
from flashmem_bench.errors import UsageError
from flashmem_bench.hub import hub_rows

# The hub's KodCode has 484,000 rows; the first of them are as many problems as any suite here has.
_KODCODE_HUB_ROWS = 2500
_KODCODE_IMPORT = "from solution import *\n"
_IMPORTS = re.compile(r"^(?:from[ \t]+\S+[ \t]+import|import)[^\n]*$", re.MULTILINE)
_DEFINED = re.compile(r"^(?:async[ \t]+)?(?:def|class)[ \t]+(\w+)", re.MULTILINE)


def humaneval(*, limits: Mapping[str, Any], data_dir=None, skip_bad_rows: bool = False, **metadata: Any) -> Splits:
    """HumanEval from `humaneval/test.jsonl[.gz]` or `openai/openai_humaneval`; it has a test split alone."""
    files = SuiteFiles(
        "humaneval",
        {"test": "test"},
        _humaneval_doc,
        lambda name: hub_rows("openai/openai_humaneval", "openai_humaneval", name),
        data_dir,
        skip_bad_rows,
    )

    def docs() -> list[Doc]:
        return [_finished(doc, limits, metadata) for _, doc in files.rows("test")]

    return Splits("humaneval", {"test": docs}, lambda: files.bad_rows)


def _humaneval_doc(row: Doc) -> Doc:
    prompt, name = text_field(row, "prompt"), text_field(row, "entry_point")
    solution = prompt + text_field(row, "canonical_solution")
    return {
        "id": text_field(row, "task_id").replace("/", "-"),
        "question": prompt,
        "solution": solution,
        "stub": prompt,
        "preamble": prompt,
        "entry_points": [name],
        "kind": "script",
        "tests": f"{text_field(row, 'test')}\ncheck({name})\n",
        "stratum": None,
    }


# The split that each problem belongs to is a matter of its number; see the paper's appendix.
_MBPP_SPLITS = {"test": (11, 510), "validation": (511, 600), "train": (601, 974)}


def mbpp(
    *,
    limits: Mapping[str, Any],
    variant: str = "full",
    data_dir=None,
    skip_bad_rows: bool = False,
    **metadata: Any,
) -> Splits:
    """MBPP from `mbpp/{full,sanitized}.jsonl[.gz]` or `google-research-datasets/mbpp`.

    Args:
        limits: What a program may use; see `grading.sandbox.Limits`.
        variant: full (974 problems) or sanitized (427 of them, looked through by the authors).
        data_dir: The data folder.
        skip_bad_rows: Leave broken rows out.
        metadata: The rest of the suite's metadata.
    """
    if variant not in ("full", "sanitized"):
        raise UsageError(f"the variant of mbpp is full or sanitized, not {variant!r}")
    files = SuiteFiles("mbpp", {"all": variant}, _mbpp_doc, lambda _: _mbpp_hub(variant), data_dir, skip_bad_rows)

    def part(split: str) -> list[Doc]:
        first, last = _MBPP_SPLITS[split]
        found = sorted((doc for _, doc in files.rows("all")), key=lambda doc: doc["number"])
        return [_finished(doc, limits, metadata) for doc in found if first <= doc["number"] <= last]

    loaders: dict[str, Callable[[], list[Doc]]] = {
        "test": lambda: part("test"),
        "train": lambda: part("train"),
        "calibration": lambda: part("validation"),
        "validation": lambda: part("validation"),
    }
    return Splits("mbpp", loaders, lambda: files.bad_rows)


def _mbpp_hub(variant: str) -> list[Doc]:
    splits = ("train", "test", "validation", "prompt")
    return [row for split in splits for row in hub_rows("google-research-datasets/mbpp", variant, split)]


def _mbpp_doc(row: Doc) -> Doc:
    number, tests = row.get("task_id"), row.get("test_list")
    if not isinstance(number, int):
        raise ValueError("the field 'task_id' is missing or not a number")
    if not isinstance(tests, list) or not tests or not all(isinstance(test, str) for test in tests):
        raise ValueError("the field 'test_list' is missing or not a list of texts")
    # The sanitized rows call the same things by other names.
    question = text_field(row, "text" if "text" in row else "prompt")
    setup = [row["test_setup_code"]] if row.get("test_setup_code") else list(row.get("test_imports") or [])
    return {
        "id": f"mbpp-{number:04d}",
        "number": number,
        "question": question.strip(),
        "examples": "\n".join(tests),
        "solution": text_field(row, "code").replace("\r\n", "\n"),
        "stub": "",
        "preamble": "",
        "entry_points": _called(tests[0]),
        "kind": "script",
        "tests": "\n".join([*setup, *tests]) + "\n",
        "stratum": None,
    }


def _called(test: str) -> list[str]:
    """Return the functions that a test calls, without Python's own unless there are no others."""
    try:
        nodes = list(ast.walk(ast.parse(test.strip())))
    except SyntaxError as error:
        raise ValueError(f"the field 'test_list' holds a test that is not Python ({error.msg})") from error
    names = [node.func.id for node in nodes if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)]
    if not names:
        raise ValueError("the first test of 'test_list' calls no function")
    return [name for name in dict.fromkeys(names) if not hasattr(builtins, name)] or names[:1]


def kodcode(*, limits: Mapping[str, Any], data_dir=None, skip_bad_rows: bool = False, **metadata: Any) -> Splits:
    """KodCode from `kodcode/demo.jsonl[.gz]` or the first rows of `KodCode/KodCode-V1`.

    Neither has a split of its own. Of every five problems the first is for training, the second for calibration and
    validation, the other three for the test; two rows that pose one problem stay together.
    """
    files = SuiteFiles(
        "kodcode",
        {"all": "demo"},
        _kodcode_doc,
        lambda _: hub_rows("KodCode/KodCode-V1", "default", f"train[:{_KODCODE_HUB_ROWS}]"),
        data_dir,
        skip_bad_rows,
    )

    def part(*turns: int) -> list[Doc]:
        docs = [doc for _, doc in files.rows("all")]
        turn = {cluster: i % 5 for i, cluster in enumerate(dict.fromkeys(doc["cluster"] for doc in docs))}
        return [_finished(doc, limits, metadata) for doc in docs if turn[doc["cluster"]] in turns]

    loaders: dict[str, Callable[[], list[Doc]]] = {
        "test": lambda: part(2, 3, 4),
        "train": lambda: part(0),
        "calibration": lambda: part(1),
        "validation": lambda: part(1),
    }
    return Splits("kodcode", loaders, lambda: files.bad_rows)


def _kodcode_doc(row: Doc) -> Doc:
    number, question = text_field(row, "question_id"), text_field(row, "question")
    solution, test = text_field(row, "solution"), text_field(row, "test")
    names = [name for name in _DEFINED.findall(solution) if re.search(rf"\b{name}\b", test)]
    if not names:
        raise ValueError("the field 'test' calls nothing that 'solution' defines")
    # An id that ends in _C poses as a stub to complete what the same id in _I asks in words.
    stub = question if number.endswith("_C") else ""
    return {
        "id": f"kodcode-{number}",
        "question": question,
        "solution": solution,
        "stub": stub,
        "preamble": "\n".join(_IMPORTS.findall(stub)),
        "entry_points": names,
        "kind": "pytest",
        "tests": _KODCODE_IMPORT + test,
        "stratum": text_field(row, "subset"),
        "cluster": re.sub(r"_[IC]$", "", number),
    }


def _finished(doc: Doc, limits: Mapping[str, Any], metadata: Mapping[str, Any]) -> Doc:
    """Return a document with its limits, and with the permission to run code where the metadata gives it."""
    permission = {key: True for key in ("allow_code_execution", "allow_uncontained_code") if metadata.get(key)}
    return {**doc, "gold": doc["solution"], "limits": dict(limits), **permission}
