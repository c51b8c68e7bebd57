"""Word problems and formulas with a right answer."""

from __future__ import annotations

from typing import Any

from flashmem_bench.data import Doc, Splits, SuiteFiles, text_field
from flashmem_bench.grading.extract import marked_number
from flashmem_bench.grading.match import normal_number
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
