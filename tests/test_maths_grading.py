"""Mathematical equality, the worker process behind it, and what lm-eval says of the same answers."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from importlib import metadata

import pytest

from flashmem_bench.grading.extract import boxed, final_expression, last_quantity, marked_quantity
from flashmem_bench.grading.hooks import maths_results
from flashmem_bench.grading.match import same_quantity
from flashmem_bench.grading.maths import plain_maths, same_maths
from flashmem_bench.grading.outcome import GradeTimeout
from flashmem_bench.grading.worker import Worker, WorkerError
from flashmem_bench.rows import grade_columns
from flashmem_bench.samples import Grade
from flashmem_bench.tasks import load_suite
from tests.test_suites import write_jsonl

HERE = "tests.test_maths_grading"

# Functions for the worker; they run in its process.


def loops_for_ever(answer: str, gold: str) -> bool:
    while answer == "hang":
        pass
    return answer == gold


def prints_and_fails(text: str) -> str:
    print("noise on standard output")
    if text == "raise":
        raise ValueError("no such thing")
    if text == "die":
        os._exit(3)
    return text * 2


def own_id() -> int:
    return os.getpid()


# Extraction


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (r"so $\boxed{7}$.", "7"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{1} and then \boxed{2}", "2"),
        (r"\boxed{\boxed{3}}", "3"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{\left\{ 1 \right.}", r"\left\{ 1 \right."),
        (r"\boxed{4} but \boxed{5", "4"),
        (r"\boxed 9$ done", "9"),
        (r"\fbox{8}", "8"),
        (r"\boxed{}", None),
        (r"\boxedtext{3}", None),
        ("boxed{3}", None),
        ("", None),
    ],
)
def test_the_last_box_with_balanced_braces_counts(text, found):
    assert boxed(text) == found


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (r"the answer is 5 but \boxed{6}", "6"),
        ("Final Answer: The final answer is $x+1$. I hope it is correct.", "x+1"),
        ("The answer is 12.", "12"),
        (r"hence \(a\) and so \[b + 1\]", "b + 1"),
        ("it costs 3 and then 4 coins", "4"),
        ("nothing", None),
    ],
)
def test_the_flexible_expression_falls_back_step_by_step(text, found):
    assert final_expression(text) == found


@pytest.mark.parametrize(
    ("text", "marked", "last"),
    [
        ("#### 1/2", "1/2", "1/2"),
        ("#### -3 / 4 of it", "-3 / 4", "-3 / 4"),
        ("#### 4.33", "4.33", "4.33"),
        ("#### None", "None", "None"),
        ("We cannot determine the price of 3 pens.", None, "None"),
        ("There is not enough information.", None, "None"),
        ("He pays 7 - 3 = 4", None, "4"),
        ("", None, None),
    ],
)
def test_quantities_may_be_fractions_or_the_word_none(text, marked, last):
    assert (marked_quantity(text), last_quantity(text)) == (marked, last)


@pytest.mark.parametrize(
    ("answer", "gold", "same"),
    [
        ("0.5", "1/2", True),
        ("2/4", "1/2", True),
        ("$1,000", "1000.0", True),
        ("0.33", "1/3", False),
        ("none", "None", True),
        ("0", "None", False),
        ("None", "4", False),
        ("1/0", "1/0", False),
        ("x", "x", False),
    ],
)
def test_quantities_are_compared_by_value(answer, gold, same):
    assert same_quantity(answer, gold) is same


# Equality


@pytest.mark.parametrize(
    ("answer", "gold", "same"),
    [
        (r"\dfrac{3}{4}", r"\frac34", True),
        ("0.75", r"\frac{3}{4}", True),
        (r"\left( 1, 2 \right)", "(1,2)", True),
        ("(2,1)", "(1,2)", False),
        (r"\{2,1\}", r"\{1,2\}", True),
        ("x = 5", "5", True),
        ("1{,}000", "1000", True),
        (r"2\sqrt{3}", r"\sqrt{12}", True),
        ("(x-1)(x+1)", "x^2-1", True),
        (r"\text{East}", r"\text{east}", True),
        (r"\pi", "3.14", False),
        ("6", "5", False),
        ("", "5", False),
        (r"\notacommand{", "5", False),
    ],
)
def test_maths_is_equal_by_value(answer, gold, same):
    assert same_maths(answer, gold) is same


def test_looks_alone_need_no_comparison(monkeypatch):
    monkeypatch.setattr("flashmem_bench.grading.maths._worker", None)
    assert same_maths(r" $\left[ \dfrac{1}{2},\ 3 \right]$. ", r"[\frac{1}{2},3]")
    assert plain_maths(r"a \leftarrow b") == r"a\leftarrowb"


# The worker


def test_a_function_that_never_ends_is_stopped_and_the_next_call_works():
    worker = Worker(f"{HERE}:loops_for_ever", deadline_s=3.0)
    assert worker.call("a", "a") is True
    process = worker._process
    with pytest.raises(GradeTimeout, match="took longer than 3 s") as caught:
        worker.call("hang", "x")
    assert not caught.value.counts_as_wrong
    assert process.poll() is not None, "the process that hangs is gone"
    assert worker.call("a", "b") is False
    worker.close()


def test_prints_failures_and_deaths_stay_inside_the_worker():
    worker = Worker(f"{HERE}:prints_and_fails", deadline_s=20.0)
    assert worker.call("ab") == "abab"
    with pytest.raises(WorkerError, match="ValueError: no such thing"):
        worker.call("raise")
    with pytest.raises(WorkerError, match="died"):
        worker.call("die")
    assert worker.call("x" * 200_000) == "x" * 400_000
    worker.close()


def test_a_worker_is_one_process_that_threads_share():
    worker, found = Worker(f"{HERE}:own_id", deadline_s=20.0), []
    threads = [threading.Thread(target=lambda: found.append(worker.call())) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 6 and len(set(found)) == 1 and os.getpid() not in found
    worker.close()
    assert worker.call() != found[0]
    worker.close()


@pytest.mark.parametrize("function", ["no.such.module:name", f"{HERE}:no_such_name"])
def test_a_missing_grader_is_an_import_error(function):
    with pytest.raises(ImportError, match="no"):
        Worker(function, deadline_s=20.0).call()


def test_no_process_is_left_at_exit():
    code = (
        "from flashmem_bench.grading.worker import Worker\n"
        f"worker = Worker('{HERE}:own_id', 20.0)\n"
        "print(worker.call(), flush=True)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    with pytest.raises(ProcessLookupError):
        os.kill(int(done.stdout), 0)


# In a suite


def math_row(number: int) -> dict:
    """A row of MATH-500's schema with a sentence of our own."""
    answer = rf"\frac{{{number}}}{{7}}"
    return {
        "problem": f"A rope of {number} metres is cut into seven equal parts. How long is each?",
        "solution": rf"Each part has $\boxed{{{answer}}}$ metres.",
        "answer": answer,
        "subject": "Prealgebra",
        "level": 1 + number % 5,
        "unique_id": f"test/prealgebra/{number}.json",
    }


def train_row(number: int) -> dict:
    """A row of MATH's training schema: no answer, the level in words."""
    row = math_row(number)
    return {"problem": row["problem"], "level": "Level 2", "type": "Prealgebra", "solution": row["solution"]}


@pytest.fixture
def suite(tmp_path, monkeypatch):
    monkeypatch.delenv("FLASHMEM_DATA", raising=False)
    write_jsonl(tmp_path / "math/math500_test.jsonl", [math_row(n) for n in range(1, 7)])
    write_jsonl(tmp_path / "math/train_prm800k_part.jsonl.gz", [train_row(n) for n in range(100, 140)])
    return load_suite("math", data_dir=tmp_path)


def test_a_hanging_comparison_is_a_timeout_without_a_score(suite, monkeypatch):
    worker = Worker(f"{HERE}:loops_for_ever", deadline_s=1.0)
    monkeypatch.setattr("flashmem_bench.grading.maths._worker", worker)
    sample = suite.samples()[0]
    late = suite.grade(sample, r"\boxed{hang}")
    assert (late.parse_status, late.metrics, late.counts) == ("timeout", {}, False)
    columns = grade_columns(late, scored=True, valid=True)
    assert columns["score"] is None and columns["score_valid"] is False and columns["parse_status"] == "timeout"
    after = suite.grade(sample, rf"\boxed{{{sample.answer}}}")
    assert (after.score, after.parse_status, after.counts) == (1.0, "ok", True)
    worker.close()


def test_a_hanging_flexible_comparison_costs_that_metric_alone(suite, monkeypatch):
    worker = Worker(f"{HERE}:loops_for_ever", deadline_s=1.0)
    monkeypatch.setattr("flashmem_bench.grading.maths._worker", worker)
    grade = suite.grade(suite.samples()[0], "the answer is $hang$")
    assert (grade.score, grade.parse_status) == (0.0, "no_answer")
    assert grade.metrics == {"exact_match,boxed": 0.0}
    worker.close()


def test_a_timeout_of_the_models_own_program_is_a_score_of_zero(suite, monkeypatch):
    def late(doc, results):
        raise GradeTimeout("the program did not end")

    monkeypatch.setattr(suite.task, "process_results", late)
    grade = suite.grade(suite.samples()[0], "x")
    assert grade == Grade(0.0, "timeout", {suite.primary_metric: 0.0}, None, counts=True)
    assert grade_columns(grade, scored=True, valid=True)["score"] == 0.0


def test_math_splits_strata_and_golds(suite):
    test, train = suite.samples(), suite.samples("train")
    assert [sample.stratum for sample in test[:2]] == ["level=2", "level=3"]
    assert {split: len(suite.samples(split)) for split in ("test", "train", "calibration", "validation")} == {
        "test": 6, "train": 38, "calibration": 2, "validation": 2}  # fmt: skip
    assert train[0].answer == r"\frac{100}{7}" and train[0].stratum == "level=2"
    for sample in [*test, *train]:
        assert suite.grade(sample, sample.target).score == 1.0
    assert suite.grader == f"math-verify {metadata.version('math-verify')} / maths 1"


# Against lm-eval


CASES = [
    # gold, completion; the comment says where lm-eval differs and why.
    ("5", r"\boxed{5}"),
    ("5", r"\boxed{6}"),
    ("5", r"$\boxed{5.0}$"),
    (r"\frac{1}{2}", r"$\boxed{\dfrac{1}{2}}$"),
    (r"\frac{1}{2}", r"$\boxed{0.5}$"),
    (r"\frac{1}{2}", r"$\boxed{2}$"),
    (r"\sqrt{12}", r"$\boxed{2\sqrt{3}}$"),
    ("(1,2)", r"$\boxed{(1, 2)}$"),
    ("(1,2)", r"$\boxed{(2, 1)}$"),
    (r"x^2-1", r"$\boxed{(x-1)(x+1)}$"),
    (r"\text{even}", r"$\boxed{\text{even}}$"),
    (r"\text{even}", r"$\boxed{\text{odd}}$"),
    ("5", "The final answer is $5$."),
    ("5", "Nothing was found."),
    ("5", ""),
]


@pytest.mark.parametrize(("gold", "text"), CASES)
def test_our_grade_is_that_of_lm_evals_math_verify_metric(gold, text, monkeypatch):
    """minerva_math's `math_verify` hands the whole texts to math-verify; ours extracts first and compares then."""
    # The module wants a release of the parser's runtime that only its other metric needs.
    real = metadata.version
    monkeypatch.setattr(metadata, "version", lambda name: "4.11" if name.startswith("antlr4") else real(name))
    monkeypatch.delitem(sys.modules, "lm_eval.tasks.minerva_math.utils", raising=False)
    from lm_eval.tasks.minerva_math import utils

    monkeypatch.setattr(utils, "is_equiv", lambda a, b: a == b)
    theirs = utils.process_results({"solution": rf"\boxed{{{gold}}}", "answer": gold}, [text])["math_verify"]
    found = final_expression(text)
    ours = maths_results({"gold": gold}, [found if found is not None else "[invalid]"])["exact_match"]
    assert ours == float(theirs)


@pytest.mark.parametrize(
    ("answer", "gold", "ours", "theirs"),
    [
        (r"\frac{1}{2}", r"\frac{1}{2}", True, True),
        (r"\dfrac{1}{2}", r"\frac{1}{2}", True, True),
        ("1/2", r"\frac{1}{2}", True, True),
        ("0.5", r"\frac{1}{2}", True, True),
        ("7", "6", False, False),
        # Values, where hendrycks_math compares spellings.
        ("0.25", r"\frac{1}{4}", True, False),
        (r"\frac{2}{4}", r"\frac{1}{2}", True, False),
        ("5.0", "5", True, False),
        (r"\{2,1\}", r"\{1,2\}", True, False),
    ],
)
def test_differences_from_hendrycks_math_are_values_against_spellings(answer, gold, ours, theirs):
    from lm_eval.tasks.hendrycks_math.utils import is_equiv

    assert same_maths(answer, gold) is ours and is_equiv(answer, gold) is theirs
