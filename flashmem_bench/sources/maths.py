"""Word problems and formulas with a right answer."""

from __future__ import annotations

from typing import Any

from flashmem_bench.data import Doc, Splits, SuiteFiles, text_field
from flashmem_bench.grading.extract import boxed, marked_number
from flashmem_bench.grading.match import normal_number, same_quantity
from flashmem_bench.hub import hub_rows
from flashmem_bench.sources.splits import held_out_loaders


def gsm8k(*, held_out: float, data_dir=None, skip_bad_rows: bool = False, **_: Any) -> Splits:
    """GSM8K from `gsm8k/{train,test}.jsonl[.gz]` or `openai/gsm8k`."""
    files = SuiteFiles(
        "gsm8k",
        {"train": "train", "test": "test"},
        _gsm8k_doc,
        lambda name: hub_rows("openai/gsm8k", "main", name),
        data_dir,
        skip_bad_rows,
    )

    def docs(name: str) -> list[Doc]:
        return [{"id": f"gsm8k-{name}-{number:05d}", **doc} for number, doc in files.rows(name)]

    return Splits("gsm8k", held_out_loaders(docs, held_out), lambda: files.bad_rows)


def _gsm8k_doc(row: Doc) -> Doc:
    question, answer = text_field(row, "question"), text_field(row, "answer")
    gold = normal_number(marked_number(answer) or "")
    if gold is None:
        raise ValueError("the field 'answer' has no '#### <number>'")
    return {"question": question, "answer": answer, "gold": gold, "stratum": None}


# The configurations of the hub's copy of MATH.
_MATH_SUBJECTS = (
    "algebra",
    "counting_and_probability",
    "geometry",
    "intermediate_algebra",
    "number_theory",
    "prealgebra",
    "precalculus",
)


def math(*, held_out: float, data_dir=None, skip_bad_rows: bool = False, **_: Any) -> Splits:
    """MATH-500 and a training split that shares no problem with it.

    From `math/{math500_test,train_prm800k_part}.jsonl[.gz]`, or `HuggingFaceH4/MATH-500` and the training split of
    `EleutherAI/hendrycks_math`; the two training splits hold different problems.
    """
    files = SuiteFiles(
        "math",
        {"train": "train_prm800k_part", "test": "math500_test"},
        _math_doc,
        _math_from_hub,
        data_dir,
        skip_bad_rows,
    )

    def docs(name: str) -> list[Doc]:
        return [{"id": f"math-{name}-{number:05d}", **doc} for number, doc in files.rows(name)]

    return Splits("math", held_out_loaders(docs, held_out), lambda: files.bad_rows)


def _math_doc(row: Doc) -> Doc:
    """Test rows name their answer, their subject and a number as level; training rows none, a type and `Level 3`."""
    problem, solution = text_field(row, "problem"), text_field(row, "solution")
    gold = row.get("answer") or boxed(solution)
    if not isinstance(gold, str) or not gold.strip():
        raise ValueError("there is neither a field 'answer' nor a \\boxed answer in 'solution'")
    level = str(row.get("level", "")).rpartition(" ")[2]
    return {
        "problem": problem,
        "solution": solution,
        "gold": gold.strip(),
        "subject": row.get("subject") or row.get("type"),
        "stratum": f"level={level}" if level.isdecimal() else "level=unknown",
    }


def _math_from_hub(name: str) -> list[Doc]:
    if name == "test":
        return hub_rows("HuggingFaceH4/MATH-500", None, "test")
    return [row for subject in _MATH_SUBJECTS for row in hub_rows("EleutherAI/hendrycks_math", subject, "train")]


def gsm_plus(*, data_dir=None, skip_bad_rows: bool = False, **_: Any) -> Splits:
    """GSM-Plus testmini from `gsm_plus/testmini.jsonl[.gz]` or `qintongli/GSM-Plus`: eight variants a question."""
    files = SuiteFiles(
        "gsm_plus",
        {"test": "testmini"},
        _gsm_plus_doc,
        lambda name: hub_rows("qintongli/GSM-Plus", None, "testmini"),
        data_dir,
        skip_bad_rows,
    )

    def docs() -> list[Doc]:
        seeds: dict[str, int] = {}
        numbered = [(number, seeds.setdefault(doc["seed_question"], len(seeds) + 1), doc)
                    for number, doc in files.rows("test")]  # fmt: skip
        return [{"id": f"gsm_plus-testmini-{number:05d}", "cluster": f"gsm_plus-seed-{seed:04d}", **doc}
                for number, seed, doc in numbered]  # fmt: skip

    return Splits("gsm_plus", {"test": docs}, lambda: files.bad_rows)


def _gsm_plus_doc(row: Doc) -> Doc:
    names = ("question", "solution", "perturbation_type", "seed_question")
    doc = {name: text_field(row, name) for name in names}
    # A file may hold the word None or the JSON value for a question that cannot be answered.
    gold = "None" if row.get("answer") is None else str(row["answer"]).strip()
    if not same_quantity(gold, gold):
        raise ValueError(f"the answer {gold!r} is neither a number nor a fraction nor None")
    return {**doc, "gold": gold, "stratum": doc["perturbation_type"]}
