"""What suite files name: extractors as lm-eval filters, comparisons as lm-eval `process_results`.

A filter gets the completions of many documents (`resps[document][repeat]`) and the documents, and returns
text of the same shape; `NO_ANSWER`, lm-eval's own word for it, stands where nothing was found. A
`process_results` function gets a document and the filtered completions and returns the metrics of that
document.

Documents carry their right answer in `gold`. Only plain lists and dicts pass through here, so nothing of
lm-eval is needed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from flashmem_bench.grading.choice import choice_letter, said_letter
from flashmem_bench.grading.extract import (
    boxed,
    echoed_lines,
    final_expression,
    first_line,
    last_number,
    last_quantity,
    marked_number,
    marked_quantity,
    whole_text,
)
from flashmem_bench.grading.match import item_shares, same_number, same_quantity, same_words
from flashmem_bench.grading.maths import same_maths
from flashmem_bench.grading.outcome import GradeTimeout
from flashmem_bench.grading.rouge import MEASURES, rouge

NO_ANSWER = "[invalid]"

Doc = dict[str, Any]
Responses = Iterable[Sequence[str]]


def filter_marked_number(resps: Responses, docs: Sequence[Doc]) -> list[list[str]]:
    """Keep the number after the first `####`."""
    return _each(marked_number, resps)


def filter_last_number(resps: Responses, docs: Sequence[Doc]) -> list[list[str]]:
    """Keep the last number."""
    return _each(last_number, resps)


def filter_first_line(resps: Responses, docs: Sequence[Doc]) -> list[list[str]]:
    """Keep the first line that is not blank."""
    return _each(first_line, resps)


def filter_boxed(resps: Responses, docs: Sequence[Doc]) -> list[list[str]]:
    """Keep what stands in the last box."""
    return _each(boxed, resps)


def filter_final_expression(resps: Responses, docs: Sequence[Doc]) -> list[list[str]]:
    """Keep the box, else what is called the answer, else the last formula, else the last number."""
    return _each(final_expression, resps)


def filter_marked_quantity(resps: Responses, docs: Sequence[Doc]) -> list[list[str]]:
    """Keep the number, fraction or `None` after the first `####`."""
    return _each(marked_quantity, resps)


def filter_last_quantity(resps: Responses, docs: Sequence[Doc]) -> list[list[str]]:
    """Keep `None` where the text says that there is no answer, else the last number or fraction."""
    return _each(last_quantity, resps)


def filter_whole_text(resps: Responses, docs: Sequence[Doc]) -> list[list[str]]:
    """Keep everything, stripped."""
    return _each(whole_text, resps)


def filter_said_letter(resps: Responses, docs: Sequence[Doc]) -> list[list[str]]:
    """Keep the letter of `doc["letters"]` that is called the answer or stands in a box."""
    return [[said_letter(text, doc["letters"]) or NO_ANSWER for text in texts]
            for texts, doc in zip(resps, docs, strict=True)]  # fmt: skip


def filter_choice_letter(resps: Responses, docs: Sequence[Doc]) -> list[list[str]]:
    """Keep the letter of `doc["letters"]` that the text chooses in any of the known forms."""
    return [[choice_letter(text, doc["letters"]) or NO_ANSWER for text in texts]
            for texts, doc in zip(resps, docs, strict=True)]  # fmt: skip


def filter_echoed_lines(resps: Responses, docs: Sequence[Doc]) -> list[list[str]]:
    """Keep one `<echo> <value>` line for every look-up of the document that was answered."""
    return [[_answered(text, doc["echoes"]) for text in texts] for texts, doc in zip(resps, docs, strict=True)]


def number_results(doc: Doc, results: Sequence[str]) -> dict[str, float]:
    """Grade a number against `doc["gold"]` by value."""
    return {"exact_match": float(same_number(results[0], doc["gold"]))}


def quantity_results(doc: Doc, results: Sequence[str]) -> dict[str, float]:
    """Grade a number, a fraction or `None` against `doc["gold"]` by value."""
    return {"exact_match": float(same_quantity(results[0], doc["gold"]))}


def maths_results(doc: Doc, results: Sequence[str]) -> dict[str, float]:
    """Grade an expression against `doc["gold"]` by mathematical equality.

    A comparison that does not end within its deadline gives no metric at all: our adapter reports a time-out, and
    lm-eval, where it runs the suite file itself, leaves the sample out of the mean.
    """
    try:
        return {"exact_match": float(results[0] != NO_ANSWER and same_maths(results[0], doc["gold"]))}
    except GradeTimeout:
        return {}


def letter_results(doc: Doc, results: Sequence[str]) -> dict[str, float]:
    """Grade a letter against `doc["gold"]`."""
    return {"exact_match": float(results[0] == doc["gold"])}


def rouge_results(doc: Doc, results: Sequence[str]) -> dict[str, float]:
    """Grade a summary against `doc["gold"]`; no text scores 0 everywhere."""
    return dict.fromkeys(MEASURES, 0.0) if results[0] == NO_ANSWER else rouge(results[0], doc["gold"])


def words_results(doc: Doc, results: Sequence[str]) -> dict[str, float]:
    """Grade words against `doc["gold"]`."""
    return {"exact_match": float(results[0] != NO_ANSWER and same_words(results[0], doc["gold"]))}


def list_results(doc: Doc, results: Sequence[str]) -> dict[str, float]:
    """Grade look-ups against `doc["values"]`; see `match.item_shares` for the metrics."""
    values = echoed_lines(results[0], doc["echoes"])
    return item_shares(values, doc["values"], doc["echoes"], doc["moments"])


def _each(extract: Callable[[str], str | None], resps: Responses) -> list[list[str]]:
    return [[extract(text) or NO_ANSWER for text in texts] for texts in resps]


def _answered(text: str, echoes: Sequence[str]) -> str:
    values = echoed_lines(text, echoes)
    lines = [f"{echo} {value}" for echo, value in zip(echoes, values, strict=True) if value is not None]
    return "\n".join(lines) or NO_ANSWER
