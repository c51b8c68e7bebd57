"""Stored answers graded again, without any model: after a grader changed, or to put another one to the test.

A row keeps everything that the run measured; its score, metrics, parse status, extracted answer and grader are
replaced. A sample is graded again only if the suite still asks the same question and has the same right answer, since
a grade belongs to both; whatever does not match is left as it is and counted. A grade counts as changed if the score,
the parse status, the extracted answer or a metric differs; the name of the grader alone is no change.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from flashmem_bench.errors import UnknownNameError
from flashmem_bench.rows import grade_columns, metric_columns
from flashmem_bench.schema import METRIC_PREFIX
from flashmem_bench.voting import curve
from flashmem_bench.wholeness import check_texts

if TYPE_CHECKING:
    from flashmem_bench.cell_store import CellStore
    from flashmem_bench.session import Session
    from flashmem_bench.tasks import Sample, Suite

Row = dict[str, Any]
_GRADES = ("score", "parse_status", "answer_extracted")


@dataclass(frozen=True)
class Regraded:
    """What became of one cell.

    Attributes:
        graded: Answers graded again.
        changed: Those whose grade is now another.
        left: Answers left as they were, since the suite no longer has their question.
        before: Mean score before; None without a scored sample.
        after: Mean score now.
        why: Why the whole cell was left as it was.
    """

    suite: str
    method: str
    cell: str
    graded: int = 0
    changed: int = 0
    left: int = 0
    before: float | None = None
    after: float | None = None
    why: str | None = None


def regrade_cell(session: Session, cell: CellStore, suites: Mapping[str, str]) -> Regraded:
    """Grade the stored answers of one cell again and store the grades all at once.

    Args:
        session: Loads suites; its backbone is never touched.
        cell: The cell.
        suites: Name of a suite in the results -> how it is asked for, where the two differ (a file of one's own).

    Raises:
        BenchError: The suite's data cannot be read, or its grader refuses to work.
    """
    name, method = str(cell.get("suite")), str(cell.get("method"))
    try:
        suite = session.suite(suites.get(name, name))
    except UnknownNameError:
        why = f"{name} is a suite file of your own; name it with --suite PATH.yaml"
        return Regraded(name, method, cell.cell_id, why=why)
    rows, texts = cell.rows(), cell.texts()
    check_texts(texts, cell.path)
    samples = suite.samples(str(cell.get("split") or "test"))
    answered = [row for row in rows if row.get("error") is None and row.get("output_tokens") is not None]
    new = []
    for row in answered:
        sample = _question(samples, row, texts[row["sample_id"]])
        if sample is not None:
            new.append(_graded(suite, sample, row, texts[row["sample_id"]], bool(cell.get("score_valid", True))))
    old = {row["sample_id"]: row for row in answered}
    changed = sum(_grades(row) != _grades(old[row["sample_id"]]) for row in new)
    after = {row["sample_id"]: row for row in rows} | {row["sample_id"]: row for row in new}
    means = _mean(rows), _mean(list(after.values()))
    if new:
        note = {"grader": suite.grader, "graded": len(new), "changed": changed}
        cell.revise(new, {"score": means[1]}, note)
    left = len(answered) - len(new)
    why = "the suite's questions are others now" if answered and not new else None
    return Regraded(name, method, cell.cell_id, len(new), changed, left, *means, why=why)


def _question(samples: Sequence[Sample], row: Row, text: Mapping[str, Any]) -> Sample | None:
    """Return the sample that a row answers, None where the suite has another question or answer in its place."""
    index = row.get("index")
    if not isinstance(index, int) or not 0 <= index < len(samples):
        return None
    sample = samples[index]
    same = sample.sample_id == row["sample_id"] and sample.prompt == text["prompt"] and sample.answer == text["answer"]
    return sample if same else None


def _graded(suite: Suite, sample: Sample, row: Row, text: Mapping[str, Any], scored: bool) -> Row:
    """Return the row with the grades of the text as the suite gives them now."""
    grade = suite.grade(sample, text["text"])
    kept = {key: value for key, value in row.items() if not key.startswith(METRIC_PREFIX)}
    return {
        **kept,
        "grader": suite.grader,
        **grade_columns(grade, scored=scored, valid=not row.get("beyond_trained_context")),
        **metric_columns(curve(suite, sample, text.get("candidates") or ())),
    }


def _grades(row: Row) -> Row:
    return {key: value for key, value in row.items() if key in _GRADES or key.startswith(METRIC_PREFIX)}


def _mean(rows: Sequence[Row]) -> float | None:
    scores = [row["score"] for row in rows if row.get("score") is not None and row.get("score_valid")]
    return sum(scores) / len(scores) if scores else None
