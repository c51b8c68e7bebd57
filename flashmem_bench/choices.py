"""Suites that compare the likelihoods of given answers: their requests and their grades, both through lm-eval's Task.

A `multiple_choice` or `loglikelihood` task turns a document into requests, pairs of a context and a continuation. Which
delimiter stands between the two, what is normalised by which length, and which of several metrics a task has, is the
task's own doing: requests come from `construct_requests`, metrics from `process_results`. The functions here get a Task
and import nothing of lm-eval.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from flashmem_bench.data import Doc
from flashmem_bench.errors import DataError
from flashmem_bench.samples import Likelihoods, Sample

GENERATED = "generate_until"
CHOICE_KINDS = ("multiple_choice", "loglikelihood")
# Without these a task's first metric is the score.
_SCORE = "acc"


def choices_of(task: Any, doc: Doc) -> tuple[str, ...]:
    """Return the given answers of a document; none for a task that generates."""
    if task.OUTPUT_TYPE == "multiple_choice":
        return tuple(str(choice) for choice in task.doc_to_choice(doc))
    return (str(task.doc_to_target(doc)),) if task.OUTPUT_TYPE == "loglikelihood" else ()


def right_choice(target: Any, choices: Sequence[str]) -> str:
    """Return the text of the right answer, which tasks name by its place, by several places, or by its text."""
    first = target[0] if isinstance(target, list) and target else target
    if isinstance(first, int) and 0 <= first < len(choices):
        return choices[first]
    return str(first)


def first_metric(names: Sequence[str]) -> str:
    """Return the metric that is the score unless the suite says otherwise."""
    return _SCORE if _SCORE in names else names[0]


def requests(task: Any, sample: Sample, *, templated: bool) -> list[tuple[str, str]]:
    """Return the `(user message, continuation)` pairs of a sample; an empty message means no context at all.

    Args:
        task: lm-eval's Task.
        sample: The sample.
        templated: Whether a chat template will stand around the message; lm-eval then drops the delimiter.

    Raises:
        DataError: A continuation is empty.
    """
    pairs = [instance.args[:2] for instance in _instances(task, sample, templated)]
    if not all(continuation for _, continuation in pairs):
        raise DataError(f"a choice of {sample.sample_id} is empty; mend the row or leave it out")
    return pairs


def metrics(task: Any, sample: Sample, found: Likelihoods) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield `(filter, metrics as process_results gives them)` of one sample.

    Raises:
        ValueError: There are not as many likelihoods as requests.
    """
    instances = _instances(task, sample, False)
    for instance, value, greedy in zip(instances, found.values, found.greedy, strict=True):
        instance.resps = [(value, greedy)]
    for ensemble in task._filters:
        ensemble.apply(instances)
        results = [instance.filtered_resps[ensemble.name] for instance in instances]
        yield ensemble.name, task.process_results(sample.doc, results)


def chosen(sample: Sample, found: Likelihoods) -> str | None:
    """Return the likeliest choice, the first of equals; for a single given answer, itself where it is greedy."""
    if len(sample.choices) == 1:
        return sample.choices[0] if found.greedy[0] else None
    # Further requests, such as those without a context, come behind those of the choices.
    values = found.values[: len(sample.choices)]
    return sample.choices[values.index(max(values))]


def _instances(task: Any, sample: Sample, templated: bool) -> list[Any]:
    context = list(sample.contexts) if sample.contexts else sample.prompt
    built = task.construct_requests(sample.doc, context, apply_chat_template=templated, metadata=(None, None, None))
    return built if isinstance(built, list) else [built]
