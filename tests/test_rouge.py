"""ROUGE: against the package called plainly, against lm-eval's use of it, and our sentence splitter."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flashmem_bench.grading.hooks import NO_ANSWER, rouge_results
from flashmem_bench.grading.rouge import MEASURES, rouge, sentences

SUMMARIES = [
    ("The council voted to close the old bridge.", "The bridge was closed by the council."),
    ("Costs rose. Nobody knew why! Was it the weather?", "Costs rose quickly. The weather was blamed."),
    ("One line\nanother line", "another line\nOne line"),
    ("same words here", "same words here"),
    ("nothing shared", "entirely different"),
    ("", "a reference"),
    ("Mr Ash paid 3.50 dollars. He left.", "He paid 3.50 dollars."),
]
TEXT = st.lists(st.sampled_from(["cats", "ran", "running", "home", "Dogs", "They", ".", "!", "\n"]), max_size=25).map(
    " ".join
)


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("It rained. We left.", ["It rained.", "We left."]),
        ('She said "Go." Then she went.', ['She said "Go."', "Then she went."]),
        ("Is it so? (Yes.) 3 came", ["Is it so?", "(Yes.)", "3 came"]),
        ("it costs 3.50 now. and so on", ["it costs 3.50 now. and so on"]),
        ("a\n\nb", ["a", "b"]),
        # The splitter knows no abbreviations.
        ("The U.S. Army came.", ["The U.S.", "Army came."]),
        ("", []),
    ],
)
def test_sentences(text, parts):
    assert sentences(text) == parts


@given(TEXT)
def test_splitting_loses_no_word(text):
    assert " ".join(sentences(text)).split() == text.split()


@pytest.mark.parametrize(("summary", "reference"), SUMMARIES)
def test_rouge_is_the_packages_own_on_split_texts(summary, reference):
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=True)
    plain = scorer.score(reference, summary)
    ours = rouge(summary, reference)
    assert {name: ours[name] for name in plain} == {name: score.fmeasure for name, score in plain.items()}
    by_line = RougeScorer(["rougeLsum"], use_stemmer=True)
    split = by_line.score("\n".join(sentences(reference)), "\n".join(sentences(summary)))
    assert ours["rougeLsum"] == split["rougeLsum"].fmeasure


@given(TEXT, TEXT)
def test_rouge_is_a_share_and_symmetric_where_f1_is(one, other):
    there, back = rouge(one, other), rouge(other, one)
    assert all(0.0 <= value <= 1.0 and type(value) is float for value in there.values())
    # The union of subsequences in ROUGE-Lsum runs over the reference's sentences, so it alone has a direction.
    for name in ("rouge1", "rouge2", "rougeL"):
        assert there[name] == pytest.approx(back[name])


def test_the_stemmer_is_on():
    assert rouge("they were running", "they were run")["rouge1"] == 1.0


def test_no_text_scores_nothing():
    assert rouge_results({"gold": "a reference"}, [NO_ANSWER]) == dict.fromkeys(MEASURES, 0.0)


@pytest.mark.parametrize(("summary", "reference"), SUMMARIES)
def test_rouge_is_that_of_lm_evals_cnn_dailymail(summary, reference, capsys):
    from lm_eval.tasks.cnn_dailymail.utils import calculate_rouge_scores

    theirs = calculate_rouge_scores([summary], [reference])
    assert {name: rouge(summary, reference)[name] for name in theirs} == theirs


def test_lm_evals_truthfulqa_leaves_the_stemmer_off():
    """The difference from the T5-style ROUGE of lm-eval's truthfulqa is the stemmer, on texts of one sentence."""
    utils = pytest.importorskip("lm_eval.tasks.truthfulqa.utils")
    for one, other in (("the cat sat", "a cat sat down"), ("we run home", "we ran home")):
        theirs = utils.rouge([other], [one])
        assert {name: rouge(one, other)[name] * 100 for name in theirs} == pytest.approx(theirs)
    assert utils.rouge(["running home"], ["run home"])["rouge1"] == pytest.approx(50)
    assert rouge("run home", "running home")["rouge1"] == 1.0
