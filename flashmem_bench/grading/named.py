"""Graders and extractors by name, for suite files without code.

A suite file says `grader: numbers` in its `metadata.flashmem` and, if it wants another extractor than the one that goes
with it, `extractor: marked-number`; the two become what `!function` lines would have named: a filter and a
`process_results`. The right answer is what the extractor finds in the document's target, or the whole target where it
finds nothing there, so that a target may be a rationale that ends in its answer. A document's field `gold` wins over
that.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from flashmem_bench.errors import UnknownNameError, UsageError
from flashmem_bench.grading import hooks
from flashmem_bench.grading.choice import choice_letter
from flashmem_bench.grading.extract import EXTRACTORS as TEXT_EXTRACTORS

Doc = Mapping[str, Any]


@dataclass(frozen=True)
class Named:
    """A grader as suite files name it.

    Attributes:
        function: Its function in `hooks`, which gives the metrics of a document.
        metric: The metric that is the score.
        extractor: The extractor that it goes with.
        package: The installed package that does the work, if it is not ours.
    """

    function: Callable[[hooks.Doc, Sequence[str]], dict[str, float]]
    metric: str
    extractor: str
    package: str | None = None


GRADERS = {
    "numbers": Named(hooks.number_results, "exact_match", "last-number"),
    "quantities": Named(hooks.quantity_results, "exact_match", "last-quantity"),
    "words": Named(hooks.words_results, "exact_match", "first-line"),
    "math": Named(hooks.maths_results, "exact_match", "boxed", "math-verify"),
    "choice": Named(hooks.letter_results, "exact_match", "letter"),
    "rouge": Named(hooks.rouge_results, "rouge1", "whole-text", "rouge-score"),
}
_LETTERS = "ABCDE"
EXTRACTORS = {**TEXT_EXTRACTORS, "letter": lambda text: choice_letter(text, _LETTERS)}
# Goes up when a grade by name can change.
_VERSION = 1


def version_of(grader: str) -> tuple[str, str | None]:
    """Return what results say of a grader, and the package whose version stands beside it."""
    return f"{grader} {_VERSION}", GRADERS[grader].package


def wanted(metadata: Mapping[str, Any], suite: str) -> tuple[str, str] | None:
    """Return the names of the grader and the extractor that a suite asks for; None where it asks for none.

    Raises:
        UnknownNameError: One of them does not exist.
        UsageError: An extractor without a grader.
    """
    grader, extractor = metadata.get("grader"), metadata.get("extractor")
    if grader is None and extractor is None:
        return None
    if grader is None:
        raise UsageError(f"{suite} names the extractor {extractor} and no grader; add one of {', '.join(GRADERS)}")
    if grader not in GRADERS:
        raise UnknownNameError("grader", str(grader), GRADERS)
    chosen = extractor or GRADERS[grader].extractor
    if chosen not in EXTRACTORS:
        raise UnknownNameError("extractor", str(chosen), EXTRACTORS)
    return grader, chosen


def task_keys(grader: str, extractor: str, target_of: Callable[[Doc], str]) -> dict[str, Any]:
    """Return the keys of an lm-eval task that grade by name.

    Args:
        grader: A name in `GRADERS`.
        extractor: A name in `EXTRACTORS`.
        target_of: Gives the target of a document.
    """
    extract, chosen = EXTRACTORS[extractor], GRADERS[grader]

    def keep(resps: hooks.Responses, docs: Any) -> list[list[str]]:
        return [[extract(text) or hooks.NO_ANSWER for text in texts] for texts in resps]

    def results(doc: Doc, found: Any) -> dict[str, float]:
        target = target_of(doc)
        gold = doc.get("gold")
        return chosen.function({**doc, "gold": str(gold) if gold is not None else extract(target) or target}, found)

    steps = [{"function": "custom", "filter_fn": keep}, {"function": "take_first"}]
    metric = {"metric": chosen.metric, "aggregation": "mean", "higher_is_better": True}
    return {
        "filter_list": [{"name": extractor, "filter": steps}],
        "process_results": results,
        "metric_list": [metric],
    }
