"""The suites over maths, lettered options and summaries, on rows of our own in the schemas of the real files."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path

import pytest

from flashmem_bench import hub
from flashmem_bench.checkpoints import find_checkpoint
from flashmem_bench.errors import DataError, UsageError
from flashmem_bench.grading.choice import choice_letter, said_letter
from flashmem_bench.sources.choice import lettered
from flashmem_bench.suites import find_suite, list_suites, suites_dir
from flashmem_bench.tasks import load_suite
from tests.test_maths_grading import math_row, train_row
from tests.test_suites import write_jsonl

NAMES = ["arc_challenge", "booksum", "govreport", "gpqa", "gpqa-diamond", "gsm_plus", "math", "qmsum"]
# What the suites without training data lack.
UNTRAINED = ["gpqa", "gpqa-diamond", "gsm_plus"]
KINDS = ["numerical substitution", "critical thinking", "distraction insertion"]


def arc_row(number: int, labels: str = "ABCD") -> dict:
    texts = [f"It is {number + step} metres" for step in range(len(labels))]
    return {
        "id": f"Own_{number}",
        "question": f"A plank of {number} metres: how long is it?",
        "choices": {"text": texts, "label": list(labels)},
        "answerKey": labels[number % len(labels)],
    }


def gpqa_row(number: int) -> dict:
    return {
        "Record ID": f"rec{number}",
        "Question": f"Which particle number {number} is meant?",
        "Correct Answer": f"right {number}",
        "Incorrect Answer 1": f"wrong one {number}",
        "Incorrect Answer 2": f"wrong two {number}",
        "Incorrect Answer 3": f"wrong three {number}",
        "Explanation": "Because.",
        "High-level domain": "Physics" if number % 2 else "Biology",
    }


def gsm_plus_row(number: int, kind: str) -> dict:
    answer = "None" if kind == "critical thinking" else "1/2" if number == 2 else str(3 * number)
    return {
        "question": f"Lin folds {number} boats three times, {kind}. How many folds?",
        "solution": f"Think about it.\n#### {answer}",
        "answer": answer,
        "perturbation_type": kind,
        "seed_question": f"Lin folds {number} boats. How many folds?",
        "seed_solution": f"#### {number}",
        "seed_answer": str(number),
    }


def meeting_row(number: int, queries: int = 2) -> dict:
    """A meeting with one general query and some specific ones."""
    asked = [
        {"query": f"What was said of point {n}?", "answer": f"Point {n} of meeting {number} was agreed.",
         "relevant_text_span": [["0", "1"]]} for n in range(queries)
    ]  # fmt: skip
    return {
        "topic_list": [{"topic": "Points", "relevant_text_span": [["0", "1"]]}],
        "general_query_list": [{"query": "Summarize the meeting.", "answer": f"Meeting {number} agreed on points."}],
        "specific_query_list": asked,
        "meeting_transcripts": [
            {"speaker": "Chair", "content": f"Welcome to meeting {number}."},
            {"speaker": "Member", "content": "Agreed."},
        ],
    }


def report_row(number: int) -> dict:
    return {"report": f"The agency spent {number} coins. It built a road.", "summary": f"A road cost {number} coins."}


def chapter_row(number: int) -> dict:
    return {
        "bid": 10 + number // 2,
        "chapter": f"In chapter {number} the ship left. Nobody waved.",
        "summary_text": f"The ship leaves in chapter {number}.",
        "source": "ours",
    }


def write_text_data(folder: Path) -> Path:
    """Write the files of every suite of this page."""
    numbers = range(1, 9)
    write_jsonl(folder / "math/math500_test.jsonl", [math_row(n) for n in numbers])
    write_jsonl(folder / "math/train_prm800k_part.jsonl", [train_row(n) for n in range(100, 140)])
    write_jsonl(folder / "gsm_plus/testmini.jsonl", [gsm_plus_row(n, kind) for n in (1, 2, 4) for kind in KINDS])
    for part, count in (("main", 40), ("diamond", 10)):
        write_jsonl(folder / f"gpqa/gpqa_{part}.jsonl", [gpqa_row(n) for n in range(count)])
    for split, start in (("train", 100), ("validation", 200), ("test", 0)):
        span = range(start, start + 8)
        write_jsonl(folder / f"arc_challenge/{split}.jsonl", [arc_row(n) for n in span])
        write_jsonl(folder / f"qmsum/{split}.jsonl", [meeting_row(n, 1 + n % 3) for n in span])
        write_jsonl(folder / f"govreport/{split}.jsonl", [report_row(n) for n in span])
        write_jsonl(folder / f"booksum/{split}.jsonl", [chapter_row(n) for n in span])
    return folder


@pytest.fixture
def data(tmp_path, monkeypatch) -> Path:
    monkeypatch.delenv("FLASHMEM_DATA", raising=False)
    return write_text_data(tmp_path / "data")


# All of them


@pytest.mark.parametrize("name", NAMES)
def test_a_suite_file_says_what_a_reader_needs(name):
    info = find_suite(name)
    assert info.kind == "real" and info.licence and info.title and len(info.metadata["traps"]) >= 4
    assert info.metadata["training_split"] == (None if name in UNTRAINED else "train")


@pytest.mark.parametrize("name", NAMES)
def test_the_target_scores_full_marks_and_silence_is_no_answer(name, data):
    suite = load_suite(name, data_dir=data)
    for split in ("test",) if name in UNTRAINED else ("test", "train", "validation", "calibration"):
        samples = suite.samples(split)
        assert len({sample.sample_id for sample in samples}) == len(samples) > 0
        for sample in samples:
            right = suite.grade(sample, sample.target)
            assert (right.score, right.parse_status) == (1.0, "ok")
        silent = suite.grade(samples[0], " ")
        assert (silent.score, silent.parse_status, silent.extracted) == (0.0, "no_answer", None)


@pytest.mark.parametrize("name", NAMES)
def test_prompts_and_scores_are_those_of_lm_eval_over_the_same_file(name, data):
    import lm_eval
    from lm_eval.api.model import LM
    from lm_eval.tasks import TaskManager

    text = "The answer is (B), so \\boxed{\\frac{3}{7}} and #### 6"

    class Constant(LM):
        def generate_until(self, requests, disable_tqdm=False):
            prompts.extend(request.args[0] for request in requests)
            return [text for _ in requests]

        def loglikelihood(self, requests):
            raise NotImplementedError

        def loglikelihood_rolling(self, requests):
            raise NotImplementedError

    prompts: list[str] = []
    manager = TaskManager(include_path=str(suites_dir()), include_defaults=False, metadata={"data_dir": str(data)})
    found = lm_eval.simple_evaluate(
        Constant(), tasks=[f"flashmem_{name}"], limit=6, task_manager=manager, bootstrap_iters=0
    )
    suite = load_suite(name, data_dir=data)
    samples = suite.samples()[:6]
    assert prompts == [sample.prompt for sample in samples]
    grades = [suite.grade(sample, text) for sample in samples]
    for metric in grades[0].metrics:
        mean = sum(grade.metrics[metric] for grade in grades) / len(grades)
        assert found["results"][f"flashmem_{name}"][metric] == pytest.approx(mean), metric


@pytest.mark.parametrize("name", UNTRAINED)
@pytest.mark.parametrize("split", ["train", "validation", "calibration"])
def test_a_suite_without_training_data_says_so(name, split, data):
    with pytest.raises(UsageError, match=f"{name} has no data for {split}"):
        load_suite(name, data_dir=data).samples(split)


@pytest.mark.parametrize("name", [name for name in NAMES if name not in ("qmsum", "gpqa", "gpqa-diamond")])
def test_without_a_folder_the_hub_is_asked_for_the_published_dataset(name, data, monkeypatch):
    asked = []
    local = load_suite(name, data_dir=data)
    rows = {
        "HuggingFaceH4/MATH-500": [math_row(n) for n in range(1, 9)],
        "qintongli/GSM-Plus": [gsm_plus_row(n, kind) for n in (1, 2, 4) for kind in KINDS],
        "allenai/ai2_arc": [arc_row(n) for n in range(8)],
        "ccdv/govreport-summarization": [report_row(n) for n in range(8)],
        "kmfoda/booksum": [chapter_row(n) for n in range(8)],
    }
    for module in ("maths", "choice", "summaries"):
        monkeypatch.setattr(
            f"flashmem_bench.sources.{module}.hub_rows",
            lambda repo, config, split: asked.append((repo, config, split)) or rows[repo],
        )
    remote = load_suite(name)
    assert [s.prompt for s in remote.samples()] == [s.prompt for s in local.samples()]
    assert remote.content_hash == local.content_hash and len(asked) == 1


def test_broken_rows_are_named(data):
    write_jsonl(data / "math/math500_test.jsonl", [math_row(1), {**math_row(2), "answer": None, "solution": "none"}])
    with pytest.raises(DataError, match="row 2 is broken: there is neither"):
        load_suite("math", data_dir=data)
    write_jsonl(data / "arc_challenge/test.jsonl", [{**arc_row(1), "answerKey": "Z"}])
    with pytest.raises(DataError, match="'Z' is none of the labels"):
        load_suite("arc_challenge", data_dir=data)
    write_jsonl(data / "gsm_plus/testmini.jsonl", [{**gsm_plus_row(1, KINDS[0]), "answer": "many"}])
    with pytest.raises(DataError, match="neither a number nor a fraction nor None"):
        load_suite("gsm_plus", data_dir=data)
    write_jsonl(data / "qmsum/test.jsonl", [{**meeting_row(1), "meeting_transcripts": []}])
    with pytest.raises(DataError, match="meeting_transcripts"):
        load_suite("qmsum", data_dir=data)


def test_the_grader_and_its_version_are_named(data):
    assert load_suite("qmsum", data_dir=data).grader.startswith(f"rouge-score {version('rouge-score')} / rouge 1")
    assert load_suite("gsm_plus", data_dir=data).grader == "quantities 1"
    assert load_suite("hops").grader == "words 1"
    assert all(info.metadata.get("graded_by") for info in list_suites() if info.name in NAMES)


# Letters


@pytest.mark.parametrize(
    ("text", "said", "chosen"),
    [
        ("The answer is (B).", "B", "B"),
        ("Answer: D", "D", "D"),
        ("the correct answer is option c.", "C", "C"),
        ("**Answer:** **(A)**", "A", "A"),
        (r"so $\boxed{\text{C}}$", "C", "C"),
        ("The answer is A. No, the answer is B.", "B", "B"),
        ("B", None, "B"),
        ("(c)", None, "C"),
        ("B. Because it is", None, "B"),
        ("D) a rope", None, "D"),
        ("(A) is wrong and so I take (D)", None, "D"),
        ("A rope is longer", None, None),
        ("The answer is a rope", None, None),
        ("A-levels", None, None),
        ("The answer is E.", None, None),
        ("The answer is Both", None, None),
        ("", None, None),
    ],
)
def test_letters_are_found_where_they_are_meant(text, said, chosen):
    assert (said_letter(text, "ABCD"), choice_letter(text, "ABCD")) == (said, chosen)


def test_arc_letters_options_anew(data):
    write_jsonl(data / "arc_challenge/test.jsonl", [arc_row(2, "1234"), arc_row(1, "ABC")])
    numbered, three = load_suite("arc_challenge", data_dir=data).samples()
    assert numbered.answer == "C" and "C. It is 4 metres" in numbered.prompt
    assert three.doc["letters"] == "ABC" and three.target == "The answer is (B)."


def test_arc_agrees_with_lm_evals_chat_task_on_letters(data, monkeypatch):
    """lm-eval's arc_challenge_chat asks for the letter right after "The best answer is" and stops at a full stop."""
    import datasets

    rows = datasets.Dataset.from_list([arc_row(n) for n in range(8)])
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: datasets.DatasetDict(train=rows, validation=rows,
                                                                                       test=rows))  # fmt: skip
    ours, theirs = load_suite("arc_challenge", data_dir=data), load_suite("lm-eval/arc_challenge_chat")
    for mine, other in zip(ours.samples(), theirs.samples(), strict=True):
        assert mine.answer == other.target
        wrong = "ABCD"[("ABCD".index(mine.answer) + 1) % 4]
        for text in (
            mine.answer,
            f" ({mine.answer})",
            f"**{mine.answer}**",
            mine.answer.lower(),
            wrong,
            f"({wrong})",
            "",
        ):
            assert ours.grade(mine, text).score == theirs.grade(other, text).score, text
        # A whole sentence is an answer to our prompt, and cannot be one where the sentence has begun already.
        assert ours.grade(mine, mine.target).score == 1.0 and theirs.grade(other, mine.target).score == 0.0


def test_options_of_gpqa_are_shuffled_by_question_and_the_same_in_every_run(data):
    samples = load_suite("gpqa", data_dir=data).samples()
    golds = [sample.answer for sample in samples]
    assert golds == [sample.answer for sample in load_suite("gpqa", data_dir=data).samples()]
    assert set(golds) == set("ABCD") and max(golds.count(letter) for letter in "ABCD") < 20
    for number, sample in enumerate(samples):
        assert f"{sample.answer}. right {number}\n" in sample.prompt
    # Diamond is a part of main, and the order belongs to the question.
    diamond = load_suite("gpqa-diamond", data_dir=data).samples()
    assert [sample.prompt for sample in diamond] == [sample.prompt for sample in samples[:10]]
    assert samples[0].stratum == "Biology" and lettered("q", ["x", "y"], 1)["gold"] == "B"


@pytest.mark.parametrize("name", ["gpqa", "gpqa-diamond"])
def test_gpqa_says_how_to_get_through_the_gate(name, monkeypatch):
    monkeypatch.delenv("FLASHMEM_DATA", raising=False)

    def closed(repo, config, split):
        raise hub.HubError(f"{repo} could not be loaded from the hub: gated")

    monkeypatch.setattr("flashmem_bench.sources.choice.hub_rows", closed)
    step = r"accept its terms on https://huggingface.co/datasets/Idavidrein/gpqa and then run `hf auth login`"
    with pytest.raises(DataError, match=step):
        load_suite(name)


def checkpoint(folder: Path, suites: list[str]) -> Path:
    """A checkpoint's record without weights, which the search never reads."""
    record = {"memory": {"source": "consolidator"}, "metadata": {"suites": suites, "harm": 0.0}}
    write_jsonl(folder / "config.json", [record])
    return folder


@pytest.mark.parametrize("trained", [["gpqa"], ["gsm8k", "gpqa"], ["gpqa-diamond"], ["lm-eval/gpqa_main_zeroshot"]])
@pytest.mark.parametrize("suite", ["gpqa", "gpqa-diamond"])
def test_a_memory_that_saw_gpqa_is_refused_for_gpqa(trained, suite, tmp_path):
    named = checkpoint(tmp_path / "memory", trained)
    with pytest.raises(UsageError, match=f"was trained on .*gpqa.*questions of the test of {suite}"):
        find_checkpoint(tmp_path, "some/model", suite, "flashmem", str(named))
    found = checkpoint(tmp_path / "checkpoints" / "model" / suite / "flashmem" / "seed0", trained)
    assert found.is_dir()
    with pytest.raises(UsageError, match="was trained on"):
        find_checkpoint(tmp_path, "model", suite, "flashmem")


def test_other_memories_serve_gpqa_and_gpqa_memories_serve_others(tmp_path):
    other = checkpoint(tmp_path / "other", ["gsm8k", "arc_challenge"])
    assert find_checkpoint(tmp_path, "some/model", "gpqa-diamond", "flashmem", str(other)).scope == "transfer"
    own = checkpoint(tmp_path / "own", ["gpqa"])
    assert find_checkpoint(tmp_path, "some/model", "gsm8k", "flashmem", str(own)).scope == "transfer"


# GSM-Plus


def test_gsm_plus_keeps_the_unanswerable_apart(data):
    suite = load_suite("gsm_plus", data_dir=data)
    samples = suite.samples()
    assert [sample.stratum for sample in samples[:3]] == KINDS
    assert len({sample.cluster for sample in samples}) == 3 and samples[0].cluster == samples[2].cluster
    none = samples[1]
    assert none.answer == "None"
    assert suite.grade(none, "#### None").score == 1.0 and suite.grade(none, "#### 4").score == 0.0
    said = suite.grade(none, "It cannot be determined.")
    assert said.metrics == {"exact_match,strict-match": 0.0, "exact_match,flexible-extract": 1.0}
    half = next(sample for sample in samples if sample.answer == "1/2")
    assert suite.grade(half, "#### 0.5").score == 1.0 and suite.grade(half, "#### None").score == 0.0


def test_lm_evals_gsm_plus_never_accepts_none(data, monkeypatch):
    import datasets

    rows = [gsm_plus_row(n, kind) for n in (1, 4) for kind in KINDS]
    dataset = datasets.Dataset.from_list(rows)
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: datasets.DatasetDict(testmini=dataset))
    write_jsonl(data / "gsm_plus/testmini.jsonl", rows)
    ours, theirs = load_suite("gsm_plus", data_dir=data), load_suite("lm-eval/gsm_plus_mini")
    for mine, other in zip(ours.samples(), theirs.samples(), strict=True):
        for text in (mine.target, f"#### {mine.answer}", "#### 77", "nothing"):
            same = ours.grade(mine, text).score == theirs.grade(other, text).score
            assert same or (mine.answer == "None" and text.endswith("None")), text


# Summaries


def test_qmsum_asks_every_query_over_its_whole_meeting(data):
    suite = load_suite("qmsum", data_dir=data)
    samples = suite.samples()
    assert len(samples) == sum(2 + n % 3 for n in range(8))
    # Meetings take turns, and their first query differs, so that a small limit covers them and both kinds.
    assert len({sample.cluster for sample in samples[:8]}) == 8
    assert {sample.stratum for sample in samples[:8]} == {"general", "specific"}
    by_id = {sample.sample_id: sample for sample in samples}
    first = by_id["qmsum-test-001-01"]
    assert first.prompt == (
        "Chair: Welcome to meeting 0.\nMember: Agreed.\n\nSummarize the meeting. Answer in one paragraph."
    )
    assert first.cluster == "qmsum-test-001" and first.target == "Meeting 0 agreed on points."
    assert by_id["qmsum-test-003-04"].stratum == "specific"


def test_qmsum_is_on_no_hub_and_says_where_it_is(monkeypatch):
    monkeypatch.delenv("FLASHMEM_DATA", raising=False)
    with pytest.raises(DataError, match=r"Yale-LILY/QMSum.*put qmsum/train.jsonl.*--data-dir or FLASHMEM_DATA$"):
        load_suite("qmsum")


def test_govreport_takes_the_sample_where_the_published_file_is_absent(data):
    assert load_suite("govreport", data_dir=data).samples()[0].sample_id == "govreport-test-00001"
    (data / "govreport/test.jsonl").rename(data / "govreport/leval_sample.jsonl")
    suite = load_suite("govreport", data_dir=data)
    assert suite.samples()[0].sample_id == "govreport-leval_sample-00001"
    (data / "govreport/train.jsonl").unlink()
    with pytest.raises(DataError, match=r"holds neither train\.jsonl"):
        suite.samples("train")


def test_booksum_clusters_by_book_and_scores_by_rouge(data):
    suite = load_suite("booksum", data_dir=data)
    samples = suite.samples()
    assert [sample.cluster for sample in samples[:4]] == ["booksum-10", "booksum-10", "booksum-11", "booksum-11"]
    grade = suite.grade(samples[0], "The ship leaves.")
    assert set(grade.metrics) == {f"{name},whole-text" for name in ("rouge1", "rouge2", "rougeL", "rougeLsum")}
    assert grade.score == grade.metrics["rouge1,whole-text"] == pytest.approx(2 * 3 / (3 + 6))
