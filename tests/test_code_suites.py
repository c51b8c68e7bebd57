"""The code suites: documents, programs found in completions, permission, grades, and what the command line says."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from flashmem_bench.errors import DataError, UsageError
from flashmem_bench.grading import code
from flashmem_bench.grading.code import filter_program, find_program, permit_code, program_results
from flashmem_bench.grading.hooks import NO_ANSWER
from flashmem_bench.grading.outcome import GradeTimeout
from flashmem_bench.grading.sandbox import Layer, Outcome
from flashmem_bench.suites import find_suite, list_suites, runs_code, suites_dir
from flashmem_bench.tasks import load_suite
from tests.test_suites import write_jsonl

CODE = ["humaneval", "kodcode", "mbpp"]
linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the sandbox needs Linux")


def humaneval_row(number: int) -> dict:
    """A function that needs what stands above it."""
    prompt = (
        f"import math\n\n\ndef half(x):\n    return math.floor(x / 2)\n\n\ndef plus{number}(x: int) -> int:\n"
        f'    """ Add {number} to the half of x.\n    >>> plus{number}(2)\n    {1 + number}\n    """\n'
    )
    return {
        "task_id": f"Own/{number}",
        "prompt": prompt,
        "entry_point": f"plus{number}",
        "canonical_solution": f"    return half(x) + {number}\n",
        "test": f"\nMETADATA = {{}}\n\n\ndef check(candidate):\n    assert candidate(4) == {2 + number}\n",
    }


def mbpp_row(number: int) -> dict:
    return {
        "text": f"Write a function to add {number}.",
        "code": f"def add(x):\r\n  return x + {number}",
        "task_id": number,
        "test_setup_code": "START = 1" if number % 2 else "",
        "test_list": [f"assert sorted([add({n})]) == [{n + number}]" for n in range(3)],
        "challenge_test_list": [],
    }


def sanitized_row(number: int) -> dict:
    row = mbpp_row(number)
    return {
        "source_file": "own",
        "task_id": number,
        "prompt": row["text"],
        "code": "def add(x):\n  return floor(x) + " + str(number),
        "test_imports": ["from math import floor"],
        "test_list": row["test_list"],
    }


def kodcode_row(number: int, kind: str) -> dict:
    words = f"Write a function that adds {number}."
    stub = f'from typing import List\n\ndef add{number}(x: int) -> int:\n    """ Add {number}. """\n'
    return {
        "style": "instruct",
        "subset": "Prefill" if number % 2 else "Algorithm",
        "question_id": f"Own_{number:08d}_{kind}",
        "question": words if kind == "I" else stub,
        "solution": f"def add{number}(x):\n    return x + {number}\n",
        # Half of the real tests do not import what they call.
        "test": f"def test_add():\n    assert add{number}(1) == {1 + number}\n",
        "test_info": None,
        "gpt_pass_sequence": [1],
        "gpt_difficulty": "easy",
        "metadata": {"row_id": number},
    }


@pytest.fixture
def data(tmp_path, monkeypatch) -> Path:
    monkeypatch.delenv("FLASHMEM_DATA", raising=False)
    folder = tmp_path / "data"
    write_jsonl(folder / "humaneval/test.jsonl", [humaneval_row(n) for n in range(3)])
    write_jsonl(folder / "mbpp/full.jsonl", [mbpp_row(n) for n in (601, 974, 10, 11, 510, 511, 600)])
    write_jsonl(folder / "mbpp/sanitized.jsonl", [sanitized_row(n) for n in (11, 511, 601)])
    write_jsonl(folder / "kodcode/demo.jsonl.gz", [kodcode_row(n, kind) for kind in "IC" for n in range(10)])
    return folder


def suite_of(name: str, data: Path, **more):
    return load_suite(name, data_dir=data, allow_code=True, **more)


# Documents


def test_the_suites_say_that_they_run_code():
    found = {info.name for info in list_suites() if runs_code(info)}
    assert set(CODE) <= found and not found & {"gsm8k", "babi", "wordmath"}
    for name in CODE:
        metadata = find_suite(name).metadata
        assert metadata["runs_code"] is True and metadata["traps"]
    assert len(find_suite("kodcode").metadata["published"]) == 4
    assert runs_code(find_suite("lm-eval/humaneval"))


def test_splits_and_ids(data):
    mbpp, humaneval, kodcode = (load_suite(name, data_dir=data) for name in ("mbpp", "humaneval", "kodcode"))
    ids = {
        split: [s.sample_id for s in mbpp.samples(split)] for split in ("test", "calibration", "validation", "train")
    }
    assert ids["test"] == ["mbpp-0011", "mbpp-0510"] and ids["train"] == ["mbpp-0601", "mbpp-0974"]
    assert ids["calibration"] == ids["validation"] == ["mbpp-0511", "mbpp-0600"]
    assert [s.sample_id for s in humaneval.samples()] == ["Own-0", "Own-1", "Own-2"]
    with pytest.raises(UsageError, match="use another suite's checkpoint and threshold"):
        humaneval.samples("train")
    problems = {split: {s.cluster for s in kodcode.samples(split)} for split in ("test", "calibration", "train")}
    assert {split: len(found) for split, found in problems.items()} == {"test": 6, "calibration": 2, "train": 2}
    assert len(set.union(*problems.values())) == 10
    # Both wordings of a problem are in one split.
    assert len(kodcode.samples()) == 12
    assert {s.stratum for s in kodcode.samples()} == {"Prefill", "Algorithm"}


def test_prompts_show_what_is_needed(data):
    humaneval = load_suite("humaneval", data_dir=data).samples()[0].prompt
    assert humaneval.startswith("Complete this Python function.") and "half of x.\n" in humaneval
    assert humaneval.endswith('"""\n```')
    mbpp = load_suite("mbpp", data_dir=data).samples()[0]
    assert mbpp.prompt.startswith("Write a function to add 11.\n") and "assert sorted([add(0)]) == [11]" in mbpp.prompt
    assert mbpp.target == "```python\ndef add(x):\n  return x + 11\n```"
    words, stub = (load_suite("kodcode", data_dir=data).samples()[i].prompt for i in (0, -1))
    assert words.startswith("Write a function that adds 2.\nName it: add2\n") and "```python\nfrom typing" in stub


def test_the_sanitized_variant_has_other_fields(data, tmp_path):
    text = (suites_dir() / "mbpp.yaml").read_text().replace("variant: full", "variant: sanitized")
    own = tmp_path / "own.yaml"
    own.write_text(text)
    suite = suite_of(str(own), data, trust_suite=True)
    assert [sample.sample_id for sample in suite.samples()] == ["mbpp-0011"]
    # The reference calls floor, which only test_imports brings.
    assert suite.grade(suite.samples()[0], suite.samples()[0].target).score == 1.0
    own.write_text(text.replace("sanitized", "tidy"))
    with pytest.raises(UsageError, match="full or sanitized, not 'tidy'"):
        suite_of(str(own), data, trust_suite=True)


@pytest.mark.parametrize(
    ("suite", "file", "change", "why"),
    [
        ("humaneval", "test.jsonl", {"prompt": None}, "'prompt' is not text"),
        ("mbpp", "full.jsonl", {"task_id": "11"}, "'task_id' is missing or not a number"),
        ("mbpp", "full.jsonl", {"test_list": []}, "'test_list' is missing or not a list"),
        ("mbpp", "full.jsonl", {"test_list": ["assert ("]}, "a test that is not Python"),
        ("mbpp", "full.jsonl", {"test_list": ["assert x == 1"]}, "calls no function"),
        ("kodcode", "demo.jsonl.gz", {"test": "def test_other(): pass"}, "nothing that 'solution' defines"),
    ],
)
def test_a_broken_row_is_named(suite, file, change, why, data):
    row = {"humaneval": humaneval_row(1), "mbpp": mbpp_row(11), "kodcode": kodcode_row(1, "I")}[suite]
    write_jsonl(data / suite / file, [row, {**row, **change}])
    with pytest.raises(DataError, match=f"row 2 is broken: .*{why}"):
        load_suite(suite, data_dir=data).samples()


# Programs in completions

STUB = 'import math\n\n\ndef f(x):\n    """ Do. """\n'
WHOLE = "def f(x):\n    return x\n"


@pytest.mark.parametrize(
    ("text", "program"),
    [
        (f"Sure:\n```python\n{WHOLE}```\nIt works.", f"{STUB}\n{WHOLE}"),
        (f"```\n{WHOLE}```", f"{STUB}\n{WHOLE}"),
        (f"```python\n{WHOLE}", f"{STUB}\n{WHOLE}"),
        # Not the example of its use that follows, and the corrected one of two.
        (f"```python\n{WHOLE}```\nUse:\n```python\nprint(f(1))\n```", f"{STUB}\n{WHOLE}"),
        (f"```python\ndef f(x): pass\n```\nBetter:\n```py\n{WHOLE}```", f"{STUB}\n{WHOLE}"),
        (f"```bash\npip install x\n```\n```Python\n{WHOLE}```", f"{STUB}\n{WHOLE}"),
        ("```python\n    return x\n```", f"{STUB}    return x\n"),
        ("    return x\n", f"{STUB}    return x\n"),
        ("    y = x\n    return y\n\ndef g():\n    pass\n", f"{STUB}    y = x\n    return y\n"),
        ("    return x\n\n# next\nprint(f(1))", f"{STUB}    return x\n"),
        (f"Here it is.\n\n{WHOLE}\nThis function returns x.", f"{STUB}\n{WHOLE}"),
        (f"import re\n{WHOLE}", f"{STUB}\nimport re\n{WHOLE}"),
        ("I cannot do that.", None),
        ("", None),
        ("  \n ", None),
    ],
)
def test_the_program_of_a_completion_with_a_stub(text, program):
    found = find_program(text, ["f"], STUB, STUB)
    assert (found and found.rstrip()) == (program and program.rstrip())


@pytest.mark.parametrize(
    ("text", "program"),
    [
        (f"```python\n{WHOLE}```", WHOLE),
        ("```python\nf = lambda x: x\n```", "f = lambda x: x\n"),
        (
            "class A:\n    pass\n\nB = A()\n\ndef f(x):\n    return x",
            "class A:\n    pass\n\nB = A()\n\ndef f(x):\n    return x",
        ),
        ("    return x", None),
        ("def g(x):\n    return x", None),
        ("f(x) is x", None),
    ],
)
def test_the_program_of_a_completion_without_a_stub(text, program):
    assert find_program(text, ["f"]) == program


def test_the_filter_says_that_there_is_no_answer():
    doc = {"entry_points": ["f"], "stub": "", "preamble": ""}
    assert filter_program([["no"], [WHOLE]], [doc, doc]) == [[NO_ANSWER], [WHOLE]]


# Grades


@linux
@pytest.mark.parametrize("name", CODE)
def test_the_reference_passes_and_others_do_not(name, data):
    suite = suite_of(name, data)
    sample = suite.samples()[0]
    right = suite.grade(sample, sample.target)
    assert (right.score, right.parse_status, right.metrics) == (1.0, "ok", {"pass_at_1,program": 1.0})
    entry = sample.doc["entry_points"][0]
    wrong = suite.grade(sample, f"```python\ndef {entry}(x):\n    return None\n```")
    assert (wrong.score, wrong.parse_status) == (0.0, "ok") and f"def {entry}" in wrong.extracted
    silent = suite.grade(sample, "No.")
    assert (silent.score, silent.parse_status, silent.extracted) == (0.0, "no_answer", None)


@linux
def test_a_continued_prompt_is_graded_as_well(data):
    suite = suite_of("humaneval", data)
    for sample, row in zip(suite.samples(), map(humaneval_row, range(3)), strict=True):
        assert suite.grade(sample, row["canonical_solution"] + "\n\nprint('more')").score == 1.0
    assert suite.grade(suite.samples()[0], "    return half(x) + 7\n").score == 0.0


@linux
def test_a_program_that_is_too_slow_is_a_timeout(data):
    suite = suite_of("mbpp", data)
    sample = suite.samples()[0]
    sample.doc["limits"] = {"wall_s": 0.5}
    grade = suite.grade(sample, "```python\ndef add(x):\n    while True: pass\n```")
    assert (grade.score, grade.parse_status, grade.metrics) == (0.0, "timeout", {"pass_at_1,program": 0.0})


@pytest.mark.parametrize(
    ("outcome", "status"),
    [("timeout", "timeout"), ("error", "error"), ("memory", "ok"), ("output", "ok"), ("failed", "ok")],
)
def test_outcomes_become_statuses(outcome, status, data, monkeypatch):
    monkeypatch.setattr(code, "run_program", lambda *given: Outcome(outcome, "because", 0.1))
    monkeypatch.setattr(code, "active_layer", lambda: Layer("uid", True, (), ()))
    suite = suite_of("mbpp", data)
    grade = suite.grade(suite.samples()[0], suite.samples()[0].target)
    assert (grade.score, grade.parse_status) == (0.0, status)


def test_lm_evals_own_evaluation_is_not_stopped_by_a_timeout(monkeypatch):
    monkeypatch.setattr(code, "run_program", lambda *given: Outcome("timeout", "late", 0.1))
    monkeypatch.setattr(code, "active_layer", lambda: Layer("uid", True, (), ()))
    doc = {"kind": "script", "tests": "", "allow_code_execution": True}
    assert program_results(doc, [WHOLE]) == {"pass_at_1": 0.0}
    with pytest.raises(GradeTimeout):
        program_results({**doc, "tell_timeout": True}, [WHOLE])


@linux
def test_lm_eval_runs_our_files_where_it_is_allowed(data):
    import lm_eval
    from lm_eval.api.model import LM
    from lm_eval.tasks import TaskManager

    class Constant(LM):
        def generate_until(self, requests, disable_tqdm=False):
            return ["```python\ndef plus1(x):\n    return half(x) + 1\n```" for _ in requests]

        def loglikelihood(self, requests):
            raise NotImplementedError

        def loglikelihood_rolling(self, requests):
            raise NotImplementedError

    def evaluate(**metadata):
        manager = TaskManager(
            include_path=str(suites_dir()), include_defaults=False, metadata={"data_dir": str(data), **metadata}
        )
        return lm_eval.simple_evaluate(
            Constant(),
            tasks=["flashmem_humaneval"],
            task_manager=manager,
            bootstrap_iters=0,
            confirm_run_unsafe_code=True,
        )

    found = evaluate(allow_code_execution=True)
    assert found["results"]["flashmem_humaneval"]["pass_at_1,program"] == pytest.approx(1 / 3)
    with pytest.raises(UsageError, match="--allow-code-execution"):
        evaluate()


# Permission


@pytest.mark.parametrize("name", CODE)
def test_nothing_runs_without_permission(name, data, monkeypatch):
    monkeypatch.setattr(code, "run_program", lambda *given: pytest.fail("a program ran"))
    suite = load_suite(name, data_dir=data)
    with pytest.raises(UsageError, match="add --allow-code-execution"):
        suite.grade(suite.samples()[0], suite.samples()[0].target)
    # A completion without a program needs none.
    assert suite.grade(suite.samples()[0], "").parse_status == "no_answer"


def test_permission_changes_no_content_hash(data):
    assert load_suite("mbpp", data_dir=data).content_hash == suite_of("mbpp", data).content_hash


def test_what_nothing_keeps_in_needs_a_second_permission(data, monkeypatch):
    monkeypatch.setattr(code, "active_layer", lambda: Layer("none", False, (), ()))
    monkeypatch.setattr(code, "run_program", lambda *given: Outcome("passed", "", 0.1))
    info = find_suite("mbpp")
    with pytest.raises(UsageError, match="--allow-uncontained-code"):
        permit_code(info, True, False)
    permit_code(info, True, True)
    suite = suite_of("mbpp", data)
    with pytest.raises(UsageError, match="--allow-uncontained-code"):
        suite.grade(suite.samples()[0], suite.samples()[0].target)
    suite.allow_uncontained = True
    assert suite.grade(suite.samples()[0], suite.samples()[0].target).score == 1.0


def test_a_missing_pytest_is_told_before_anything_runs(data, monkeypatch):
    monkeypatch.setattr(code, "find_spec", lambda name: None)
    monkeypatch.setattr(code, "active_layer", lambda: Layer("uid", True, (), ()))
    with pytest.raises(DataError, match=r"pip install 'flashmem\[code\]'"):
        permit_code(find_suite("kodcode"), True, False)
    permit_code(find_suite("mbpp"), True, False)


def test_lm_evals_own_code_tasks_need_both_permissions():
    info = find_suite("lm-eval/humaneval")
    for given in ((False, False), (True, False), (False, True)):
        with pytest.raises(UsageError, match="outside the sandbox"):
            permit_code(info, *given)
    permit_code(info, True, True)


def flashmem_bench(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", "flashmem_bench", *arguments], capture_output=True, text=True)


def test_the_command_line_refuses_before_anything_is_generated(data, tmp_path):
    results = tmp_path / "results"
    common = ["--suite", "mbpp", "--data-dir", str(data), "--results-dir", str(results)]
    for command in (["run", "--method", "vanilla"], ["train", "--method", "flashmem", "--steps", "1"]):
        done = flashmem_bench(*command, *common)
        assert done.returncode == 2, done.stderr
        assert "mbpp runs programs that the model writes; add --allow-code-execution" in done.stderr
        assert len(done.stderr.strip().splitlines()) == 1
    assert not list(results.rglob("samples.jsonl"))


@linux
def test_the_command_line_runs_and_grades(data, tmp_path, bench):
    results = tmp_path / "results"
    done = flashmem_bench(
        "run", "--suite", "mbpp", "--method", "vanilla", "--limit", "1", "--model", str(bench.model), "--json",
        "--quiet", "--data-dir", str(data), "--results-dir", str(results), "--allow-code-execution",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["cells"][0]["status"] == "complete"
    (rows,) = results.rglob("samples.jsonl")
    assert json.loads(rows.read_text().splitlines()[0])["parse_status"] == "no_answer"


@linux
def test_doctor_names_the_layer():
    from flashmem_bench.doctor import _sandbox

    (check,) = _sandbox()
    assert check.name == "code sandbox" and check.status in ("ok", "warning")
    assert check.detail.split(",")[0] in ("namespaces", "user-namespaces", "uid", "none")
