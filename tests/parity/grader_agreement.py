"""Our graders against lm-eval's on the same texts, sample by sample: where they part, and how often.

    FLASHMEM_DATA=... python -m tests.parity.grader_agreement gsm8k arc_challenge math humaneval

The texts are made from the right answers of real data: each in the forms that models use, and wrong ones. Every kind of
text on which the two disagree is printed with its count and both grades, so that each difference can be explained.
lm-eval's `minerva_math` needs antlr4-python3-runtime 4.11; its `humaneval` takes the metric `code_eval` from the hub or
from a folder that CODE_EVAL names, and runs programs without a sandbox.
"""

from __future__ import annotations

import collections
import logging
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any
from unittest import mock

from flashmem_bench.samples import Sample
from flashmem_bench.suites import find_suite
from flashmem_bench.tasks import load_suite

Grades = Iterator[tuple[str, float, float]]
_MATH_EVERY = 5
_NEXT_LINE = r"\nclass|\ndef|\n#|\nif|\nprint"


def lm_eval_task(name: str) -> Any:
    """Load a task of lm-eval's for its filters and metrics, without its data."""
    import datasets
    from lm_eval.tasks import TaskManager

    columns = {"question": "q", "answer": "#### 1", "problem": "p", "solution": "\\boxed{1}", "level": "Level 1",
               "type": "Algebra", "choices": {"text": ["a"] * 4, "label": list("ABCD")}, "answerKey": "A"}  # fmt: skip
    rows = datasets.Dataset.from_list([columns])
    splits = datasets.DatasetDict(train=rows, test=rows, validation=rows)
    with mock.patch("datasets.load_dataset", lambda *_, **__: splits):
        path = find_suite(f"lm-eval/{name}").path
        return next(iter(TaskManager(include_defaults=False).load([str(path)])["tasks"].values()))


def their_grade(task: Any, doc: Mapping[str, Any], text: str, metric: str) -> float:
    """Grade a text with a task's own filters and metrics."""
    from lm_eval.api.instance import Instance

    instance = Instance("generate_until", doc=dict(doc), arguments=("", {}), idx=0, resps=[text])
    name, _, wanted = metric.partition(",")
    for ensemble in task._filters:
        ensemble.apply([instance])
        if ensemble.name == wanted:
            return float(task.process_results(dict(doc), [instance.filtered_resps[wanted]])[name])
    raise KeyError(metric)


def gsm8k(metric: str) -> Grades:
    """GSM8K under one filter; lm-eval stops generating at "Question:", so its text ends there."""
    suite, task = load_suite("gsm8k"), lm_eval_task("gsm8k")
    for sample in suite.samples():
        for kind, text in _number_texts(sample.answer, sample.target).items():
            ours = suite.grade(sample, text).metrics[metric]
            yield kind, ours, their_grade(task, sample.doc, text.split("Question:")[0], metric)


def _number_texts(gold: str, target: str) -> dict[str, str]:
    return {
        "target": target, "plain": f"#### {gold}", "dollar": f"#### ${gold}", "decimals": f"#### {gold}.00",
        "full stop": f"#### {gold}.", "unit": f"#### {gold} apples", "wrong": f"#### {gold}7",
        "no mark": f"The answer is {gold}.", "negative": f"#### -{gold}", "plus": f"#### +{gold}",
        "runs on": f"#### {gold}\n\nQuestion: more?\n#### 17", "empty": "", "per cent": f"#### {gold}%",
        "no blank": f"####{gold}", "bold": f"**#### {gold}**",
    }  # fmt: skip


def arc_challenge(metric: str) -> Grades:
    """ARC against lm-eval's chat task, whose text ends at a blank line or a full stop."""
    suite, task = load_suite("arc_challenge"), lm_eval_task("arc_challenge_chat")
    for sample in suite.samples():
        doc = {"choices": {"text": sample.doc["options"], "label": list(sample.doc["letters"])},
               "question": "", "answerKey": sample.answer}  # fmt: skip
        for kind, text in _letter_texts(sample).items():
            theirs = their_grade(task, doc, re.split(r"\n\n|\.", text)[0], "exact_match,remove_whitespace")
            yield kind, suite.grade(sample, text).metrics[metric], theirs


def _letter_texts(sample: Sample) -> dict[str, str]:
    gold = sample.answer
    wrong = next(letter for letter in sample.doc["letters"] if letter != gold)
    return {
        "letter": f" {gold}", "full stop": f" {gold}.", "brackets": f" ({gold})", "wrong": f" {wrong}.",
        "small letter": f" {gold.lower()}", "sentence": f"The best answer is {gold}.", "because": f" {gold} because",
        "bold": f"**{gold}**", "two": f" {gold} or {wrong}", "none": "I do not know", "empty": "",
        "quotes": f'"{gold}"',
    }  # fmt: skip


def math(metric: str) -> Grades:
    """MATH-500, every fifth problem, against the `math_verify` metric of lm-eval's `minerva_math`."""
    from lm_eval.tasks.minerva_math import utils

    suite, task = load_suite("math"), lm_eval_task("minerva_math_algebra")
    for sample in suite.samples()[::_MATH_EVERY]:
        solution = sample.doc["solution"]
        answer = utils.normalize_final_answer(utils.remove_boxed(utils.last_boxed_only_string(solution)))
        doc = {"problem": "", "solution": solution, "answer": answer}
        for kind, text in _formula_texts(sample.answer).items():
            ours = suite.grade(sample, text).metrics.get(metric, float("nan"))
            yield kind, ours, their_grade(task, doc, text, "math_verify,none")


def _formula_texts(gold: str) -> dict[str, str]:
    return {
        "boxed": f"So it is $\\boxed{{{gold}}}$.", "blanks": f"$\\boxed{{ {gold} }}$",
        "minerva": f"Final Answer: The final answer is ${gold}$. I hope it is correct.",
        "inline": f"The answer is ${gold}$.", "twice": f"first $\\boxed{{0}}$ then $\\boxed{{{gold}}}$",
        "dfrac": "$\\boxed{" + gold.replace("\\frac", "\\dfrac") + "}$", "wrong": "$\\boxed{123456}$",
        "not closed": f"$\\boxed{{{gold}", "bare": gold, "empty": "", "no box": "I think nothing.",
    }  # fmt: skip


def humaneval(metric: str) -> Grades:
    """HumanEval against the metric of lm-eval's task, which goes on with the prompt up to the next function."""
    os.environ["HF_ALLOW_CODE_EVAL"] = "1"
    import evaluate

    suite = load_suite("humaneval", allow_code=True)
    samples = list(suite.samples())
    asked = [
        (sample, kind, text)
        for sample, other in zip(samples, samples[7:] + samples[:7], strict=True)
        for kind, text in _program_texts(sample.doc, other.doc).items()
    ]
    _, found = evaluate.load(os.environ.get("CODE_EVAL", "code_eval")).compute(
        references=[sample.doc["tests"] for sample, _, _ in asked],
        predictions=[[sample.doc["question"] + re.split(_NEXT_LINE, text)[0]] for sample, _, text in asked],
        k=[1], num_workers=2, timeout=10.0,
    )  # fmt: skip
    for number, (sample, kind, text) in enumerate(asked):
        yield kind, suite.grade(sample, text).metrics[metric], float(found[number][0][1]["passed"])


def _program_texts(doc: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, str]:
    body = doc["solution"].removeprefix(doc["question"])
    return {
        "body": body, "more behind it": f"{body}\n\ndef helper():\n    return 1\n", "none": "    return None\n",
        "another's body": other["solution"].removeprefix(other["question"]), "syntax error": f"{body.rstrip()} ) \n",
        "cut off": body[: len(body) * 2 // 3], "empty": "", "prose": "I would sort the list.",
        "fenced": f"Here:\n```python\n{doc['question']}{body}\n```\n",
    }  # fmt: skip


COMPARED: Mapping[str, tuple[Callable[[str], Grades], tuple[str, ...]]] = {
    "gsm8k": (gsm8k, ("exact_match,strict-match", "exact_match,flexible-extract")),
    "arc_challenge": (arc_challenge, ("exact_match,choice",)),
    "math": (math, ("exact_match,flexible-extract", "exact_match,boxed")),
    "humaneval": (humaneval, ("pass_at_1,program",)),
}


def main(names: list[str]) -> None:
    """Compare and print."""
    logging.disable(logging.WARNING)
    for name in names or list(COMPARED):
        grades, metrics = COMPARED[name]
        for metric in metrics:
            found = list(grades(metric))
            parted = collections.Counter((kind, a, b) for kind, a, b in found if a != b)
            print(f"{name}, {metric}: {len(found) - sum(parted.values())} of {len(found)} grades agree")
            for (kind, ours, theirs), count in sorted(parted.items()):
                print(f"    {kind}: {count} times ours {ours:g}, theirs {theirs:g}")


if __name__ == "__main__":
    main(sys.argv[1:])
