"""The suites of sessions and of wanted lengths: what their rows say, what is cut, and how answers are graded."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from flashmem_bench.errors import DataError, UsageError
from flashmem_bench.grading.dialogue import list_f1, locomo_results, stems, word_f1
from flashmem_bench.sources.histories import newest_lines, whole_number
from flashmem_bench.sources.lengths import length_name
from flashmem_bench.suites import find_suite, suites_dir
from flashmem_bench.tasks import load_suite
from tests.long_rows import conversation, write_long_data
from tests.test_suites import write_jsonl

SESSIONS = ("babi-session", "qmsum-session", "locomo", "locomo-adversarial")
LENGTHS = ("babi-long", "recall-long", "hops-long")
SHORT = {"tokens": [256, 1024], "rows": 6}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_long_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def suite(data):
    """Load a suite over the made-up rows, once for the same settings."""
    loaded: dict = {}

    def load(name: str, **settings):
        key = (name, repr(settings))
        if key not in loaded:
            loaded[key] = load_suite(name, data_dir=data, settings=settings)
        return loaded[key]

    return load


@pytest.mark.parametrize("name", SESSIONS)
def test_the_samples_of_a_session_follow_each_other_and_begin_with_its_history(name, suite) -> None:
    samples = suite(name).samples()
    runs = [session for session, _ in itertools.groupby(samples.sessions())]
    assert len(runs) == len(set(runs)) >= 2 and None not in runs
    for sample in samples:
        assert sample.prefix and sample.prompt.startswith(sample.prefix) and sample.prompt != sample.prefix
        assert sample.cluster == sample.session_id
    assert find_suite(name).metadata["prefix_field"] == "history"


@pytest.mark.parametrize("name", [*SESSIONS, *LENGTHS])
def test_lm_eval_gives_the_same_prompts_and_scores(name, suite, data) -> None:
    from lm_eval.api.instance import Instance
    from lm_eval.tasks import TaskManager

    settings = SHORT if name in LENGTHS else {}
    metadata = {"data_dir": str(data), "settings": settings}
    manager = TaskManager(include_path=str(suites_dir()), include_defaults=False, metadata=metadata)
    task = manager.load(f"flashmem_{name}")["tasks"][f"flashmem_{name}"]
    ours = suite(name, **settings)
    assert len(task.eval_docs) == len(ours.samples()) > 1
    for sample, doc in zip(ours.samples()[:3], task.eval_docs, strict=False):
        assert sample.prompt == task.fewshot_context(doc, 0)
        for text in (sample.target, "", "nothing here", "Not mentioned in it, and more"):
            grade, instance = (
                ours.grade(sample, text),
                Instance("generate_until", doc, (sample.prompt, {}), 0, resps=[text]),
            )
            (ensemble,) = task._filters
            ensemble.apply([instance])
            found = task.process_results(doc, [instance.filtered_resps[ensemble.name]])
            assert grade.metrics == {f"{key},{ensemble.name}": value for key, value in found.items()}
        # Of an open-domain answer the reason behind the semicolon does not count.
        assert ours.grade(sample, sample.target).score == pytest.approx(1.0) or sample.stratum == "open-domain"


def test_a_story_with_statements_between_its_questions_grows(suite) -> None:
    plain = {sample.sample_id: sample.prompt for sample in suite("babi").samples()}
    samples = list(suite("babi-session").samples())
    assert all(plain[sample.sample_id] == sample.prompt for sample in samples)
    assert {sample.stratum for sample in samples} == {"qa1", "qa2", "qa4", "qa5"}, "one question makes no session"
    for _, story in itertools.groupby(samples, key=lambda sample: sample.session_id):
        histories = [sample.prefix for sample in story]
        assert all(later.startswith(earlier) for earlier, later in itertools.pairwise(histories))
    told = [sample for sample in samples if sample.stratum == "qa2"]
    assert len({sample.prefix for sample in told}) == 1 and len(told) == 3


def test_a_conversation_is_told_with_dates_speakers_and_photos(suite) -> None:
    samples = list(suite("locomo").samples())
    assert [sample.stratum for sample in samples[:4]] == ["multi-hop", "temporal", "open-domain", "single-hop"]
    history = samples[0].prefix
    assert history.startswith(
        "A conversation between Ana and Bo, on several days.\n\nDate: 1:01 pm on 1 May, 2023\nAna: "
    )
    assert "Bo: On day 1 I bought 1 green kites. [shares a photo: a photo of a kite]" in history
    assert history.count("Date: ") == 3
    assert samples[1].answer == "2023" and "Work the date out" in samples[1].prompt
    assert "Work the date out" not in samples[0].prompt
    adversarial = list(suite("locomo-adversarial").samples())
    assert {sample.stratum for sample in adversarial} == {"adversarial"}
    assert adversarial[0].prefix == history and not {s.sample_id for s in samples} & {s.sample_id for s in adversarial}


def test_a_meeting_keeps_its_speakers_and_both_kinds_of_queries(suite) -> None:
    samples = list(suite("qmsum-session").samples())
    assert [sample.stratum for sample in samples[:3]] == ["general", "specific", "specific"]
    assert "Speaker 1: I propose 1 remotes in plan 0.\n" in samples[0].prefix
    assert samples[0].session_id == "test-001" and samples[3].session_id == "test-002"
    assert len(suite("qmsum-session").samples("calibration")) == 3


def test_a_history_is_cut_to_its_newest_words_for_all_questions_alike(suite) -> None:
    cut, whole = suite("locomo", history_words=30).samples(), suite("locomo").samples()
    assert cut[0].prefix == cut[3].prefix != whole[0].prefix
    assert "Date: 1:03 pm on 3 May, 2023\nBo: On day 3 I bought 1 green kites." in cut[0].prefix
    assert "Date: 1:01 pm" not in cut[0].prefix
    lines = [("one", "a b"), ("one", "c d"), ("two", "e f"), ("two", "g h i")]
    assert newest_lines(lines, None) == "one\na b\nc d\n\ntwo\ne f\ng h i"
    assert newest_lines(lines, 7) == "one\nc d\n\ntwo\ne f\ng h i"
    assert newest_lines(lines, 1) == "two\ng h i", "one line is always kept"
    assert newest_lines([(None, "a"), (None, "b")], 1) == "b"


@pytest.mark.parametrize("value", [0, -1, True, "many", 1.5])
def test_a_setting_that_is_no_count_is_refused(value) -> None:
    with pytest.raises(UsageError, match=r"suite.history_words must be a whole number"):
        whole_number({"history_words": value}, "history_words", None)


@pytest.mark.parametrize("name", LENGTHS)
def test_lengths_are_kept_and_have_their_own_strata(name, suite) -> None:
    samples = list(suite(name, **SHORT).samples())
    assert len(samples) == 12
    for sample in samples:
        wanted = 256 if sample.stratum.endswith("256") else 1024
        # Twelve facts of hops and the shortest story fit into the shorter length.
        assert abs(len(sample.prompt) / 4 - wanted) < 40, (sample.sample_id, len(sample.prompt))
    assert len({sample.prompt for sample in samples}) == 12
    assert suite(name, **SHORT).content_hash != suite(name, tokens=[256], rows=6).content_hash
    assert suite(name, **SHORT).calibrate_by == "stratum"
    prompts = {sample.prompt for split in ("calibration", "test") for sample in suite(name, **SHORT).samples(split)}
    assert len(prompts) == 24


def test_names_of_lengths() -> None:
    assert [length_name(tokens) for tokens in (0, 1000, 1024, 131072)] == ["0", "1000", "1k", "128k"]


def test_the_questions_of_babi_long_are_the_same_at_every_length(suite) -> None:
    samples = list(suite("babi-long", tokens=[0, 512, 2048], rows=5).samples())
    for number in range(5):
        same = samples[3 * number : 3 * number + 3]
        assert len({(sample.answer, sample.doc["question"], sample.cluster) for sample in same}) == 1
        facts = same[0].prompt.split("\n")[:-1]
        for sample in same[1:]:
            lines = sample.prompt.split("\n")
            assert [line for line in lines[:-1] if line in facts] == facts
            assert all(line in facts or line.startswith("Whale") for line in lines[:-1])
    assert [sample.doc["task"] for sample in samples[::3]] == ["qa1", "qa2", "qa3", "qa4", "qa5"]


@pytest.mark.parametrize(("position", "share"), [("start", 0.0), ("middle", 0.5), ("end", 1.0)])
def test_statements_stand_where_they_are_wanted(suite, position: str, share: float) -> None:
    for sample in suite("babi-long", tokens=[2048], rows=4, position=position).samples():
        lines = sample.prompt.split("\n")[:-1]
        places = [place for place, line in enumerate(lines) if not line.startswith("Whale")]
        assert places == list(range(places[0], places[0] + len(places)))
        assert places[0] / (len(lines) - len(places)) == pytest.approx(share, abs=0.02)


def test_the_text_around_calibration_is_of_another_book(suite) -> None:
    settings = {"tokens": [512], "rows": 6}
    test = "".join(sample.prompt for sample in suite("babi-long", **settings).samples())
    calibration = "".join(sample.prompt for sample in suite("babi-long", **settings).samples("calibration"))
    assert "Whale 2 " in calibration and "Whale 2 " not in test
    assert "Whale 0 " in test and "Whale 0 " not in calibration


@pytest.mark.parametrize(
    ("name", "settings", "said"),
    [
        ("babi-long", {"tokens": [-1]}, "suite.tokens must be whole numbers from 0 to 131072"),
        ("babi-long", {"tokens": "long"}, "suite.tokens must be"),
        ("babi-long", {"position": "left"}, "suite.position must be one of spread, start"),
        ("babi-long", {"tasks": ["qa99"]}, "suite.tasks must be bAbI tasks"),
        ("babi-long", {"depth": 1}, "its data settings are tokens, rows"),
        ("hops-long", {"depth": 1}, "no setting suite.depth"),
        ("recall-long", {"rows": 0}, "suite.rows must be a whole number"),
        ("gsm8k", {"rows": 1}, "it has no data settings"),
    ],
)
def test_refused_settings_name_what_is_allowed(data, name: str, settings: dict, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        load_suite(name, data_dir=data, settings=settings).samples()


def test_hops_keep_their_facts_at_every_length(suite) -> None:
    samples = list(suite("hops-long", tokens=[256, 1024], rows=4).samples())
    assert [sample.stratum for sample in samples[:4]] == ["k=1, 256", "k=1, 1k", "k=2, 256", "k=2, 1k"]
    for short, long in zip(samples[::2], samples[1::2], strict=True):
        facts = [line for line in short.prompt.split("\n") if line[0].isupper() and " -> " in line]
        assert len(facts) == 12 and short.answer == long.answer and short.cluster == long.cluster
        assert [line for line in long.prompt.split("\n") if line in facts] == facts


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"qa": [{"question": "Who?", "answer": "", "category": 4}]}, "has no answer"),
        ({"qa": [{"question": "Who?", "answer": "Bo", "category": 9}]}, "category from 1 to 5"),
        ({"conversation": {"speaker_a": "Ana", "speaker_b": "Bo"}}, "has no turns"),
        ({"qa": None}, "'conversation' or 'qa' is missing"),
    ],
)
def test_a_broken_conversation_is_named_by_its_row(tmp_path, change: dict, reason: str) -> None:
    write_jsonl(tmp_path / "locomo/locomo10.jsonl", [conversation(), {**conversation("two"), **change}])
    with pytest.raises(DataError, match=rf"row 2 is broken: .*{reason}"):
        load_suite("locomo", data_dir=tmp_path)
    assert load_suite("locomo", data_dir=tmp_path, skip_bad_rows=True).bad_rows == 1


def test_data_that_is_nowhere_says_where_it_comes_from(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "empty").mkdir()
    for name, said in (("locomo", "snap-research/LoCoMo"), ("qmsum-session", "Yale-LILY/QMSum")):
        with pytest.raises(DataError, match=said):
            load_suite(name, data_dir=tmp_path / "empty")


def test_f1_is_that_of_the_conversations_authors() -> None:
    assert stems("The Dogs, and a running cat!") == ["dog", "run", "cat"]
    assert word_f1("two running dogs", "the dog runs") == pytest.approx(2 * 2 / (3 + 2))
    assert word_f1("", "dog") == 0.0
    # Parts of a list take their best partner each: 1 for the dogs, 2/3 for the cats.
    assert list_f1("black cat, dogs", "dog, cat") == pytest.approx((1 + 2 / 3) / 2)
    doc = {"category": "open-domain", "gold": "yes; she has kites"}
    assert locomo_results(doc, ["Yes."]) == {"f1": 1.0}
    assert locomo_results({"category": "temporal", "gold": "2023"}, ["[invalid]"]) == {"f1": 0.0}
    for text, right in (("It is Not Mentioned.", 1.0), ("No information available", 1.0), ("Bo", 0.0)):
        assert locomo_results({"category": "adversarial", "gold": "Bo"}, [text]) == {"abstained": right}
