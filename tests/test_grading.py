"""Extraction and comparison: what counts as an answer and when two answers are the same."""

from __future__ import annotations

import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flashmem_bench.grading.extract import EXTRACTORS, echoed_lines, first_line, last_number, marked_number
from flashmem_bench.grading.hooks import (
    NO_ANSWER,
    filter_echoed_lines,
    filter_first_line,
    filter_marked_number,
    list_results,
    number_results,
    words_results,
)
from flashmem_bench.grading.match import item_shares, normal_number, normal_words, same_number, same_words

INTEGERS = st.integers(min_value=-(10**30), max_value=10**30)
# Text that cannot itself hold a number or a mark.
WORDY = st.text(alphabet="abc xyz.\n", max_size=30)


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("so 3 + 4 = 7\n#### 7", "7"),
        ("#### 1,234.50 dollars", "1,234.50"),
        ("####$18.", "$18"),
        ("#### -5", "-5"),
        ("#### \u22125", "-5"),
        ("#### $-5", "$-5"),
        ("#### .5", ".5"),
        ("#### 7\n\nNext problem\n#### 9", "7"),
        ("#### 12,\n", "12"),
        ("the answer is 7", None),
        ("#### seven", None),
        ("####\n7", None),
        ("### 7", None),
        ("", None),
    ],
)
def test_marked_number(text, number):
    assert marked_number(text) == number


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("10 - 3 = 7.", "7"),
        ("costs $1,234.50.", "$1,234.50"),
        ("10-3", "3"),
        ("it is -3", "-3"),
        ("items 2,3", "3"),
        ("no numbers", None),
        ("", None),
    ],
)
def test_last_number(text, number):
    assert last_number(text) == number


@given(INTEGERS, WORDY, WORDY)
def test_marked_number_is_found_and_survives_its_spelling(number, before, after):
    for spelling in (str(number), f"{number:,}", f"${number}", f"{number}.00"):
        found = marked_number(f"{before}#### {spelling} {after}")
        assert found is not None and normal_number(found) == str(number)


@given(INTEGERS, WORDY)
def test_last_number_is_the_last(number, before):
    found = last_number(f"1 then 2 {before} {number:,}.")
    assert found is not None and normal_number(found) == str(number)


@given(st.text())
def test_extractors_never_fail_and_return_part_of_the_text(text):
    for extract in EXTRACTORS.values():
        found = extract(text)
        assert found is None or (found and found in text.replace("\u2212", "-"))


@given(st.text())
def test_number_spelling_is_stable(text):
    once = normal_number(text)
    assert once is None or normal_number(once) == once


@pytest.mark.parametrize(
    ("text", "spelling"),
    [
        ("18", "18"),
        ("18.00", "18"),
        ("$1,000.", "1000"),
        ("+7", "7"),
        ("007", "7"),
        (".50", "0.5"),
        ("5%", "5"),
        ("-0", "0"),
        ("-0.10", "-0.1"),
        ("100", "100"),
        ("12345678901234567890123456789012345678901", "12345678901234567890123456789012345678901"),
        ("", None),
        (".", None),
        ("-", None),
        ("1e5", None),
        ("three", None),
        (NO_ANSWER, None),
    ],
)
def test_normal_number(text, spelling):
    assert normal_number(text) == spelling


@given(INTEGERS, INTEGERS)
def test_numbers_match_by_value_only(a, b):
    assert same_number(str(a), f"{b:,}.0") == (a == b)


def test_nothing_is_not_a_number_that_matches_nothing():
    assert not same_number(NO_ANSWER, NO_ANSWER)


@pytest.mark.parametrize(
    ("answer", "gold", "same"),
    [
        ("Kitchen.", "kitchen", True),
        ("the kitchen", "kitchen", True),
        ("milk, football", "milk,football", True),
        ("football,milk", "milk,football", False),
        ("milk", "milk,football", False),
        ("**Bob**", "Bob", True),
        ("Bobby", "Bob", False),
        ("", "Bob", False),
    ],
)
def test_same_words(answer, gold, same):
    assert same_words(answer, gold) is same


@given(st.text())
def test_words_match_themselves_in_any_case_of_ascii(text):
    assert same_words(text, text)
    assert normal_words(text) == normal_words(f"  {text}  ")


def test_first_line_passes_over_blank_lines():
    assert first_line("\n  \n Seth \nand more") == "Seth"
    assert first_line(" \n\t") is None


ECHOES = ["Ana:", "Bob twice:", "Cy:"]
DOC = {"echoes": ECHOES, "values": ["Dan", "Eve", "Fay"], "moments": ["Bob twice:"], "gold": "unused"}


def test_echoed_lines_take_the_first_line_of_each_echo_in_any_order():
    text = "Bob twice: Eve\nAna: Dan\nAna: Eve\nCy:"
    assert echoed_lines(text, ECHOES) == ["Dan", "Eve", None]


def test_a_one_link_line_does_not_answer_a_two_link_item():
    assert echoed_lines("Bob: Eve", ["Bob twice:"]) == [None]


def test_list_shares_tell_links_apart():
    [[kept]] = filter_echoed_lines([["Ana: Dan\nBob twice: Gus\nCy: Fay\nnoise"]], [DOC])
    assert kept == "Ana: Dan\nBob twice: Gus\nCy: Fay"
    shares = list_results(DOC, [kept])
    assert shares == {"items_right": pytest.approx(2 / 3), "all_right": 0.0, "one_link": 1.0, "two_link": 0.0}


def test_list_without_two_link_items_has_no_two_link_share():
    assert set(item_shares(["a"], ["a"], ["x:"], [])) == {"items_right", "all_right", "one_link"}


def test_filters_say_that_there_is_no_answer():
    assert filter_marked_number([["nothing"], ["#### 4"]], [DOC, DOC]) == [[NO_ANSWER], ["4"]]
    assert filter_first_line([[" "]], [DOC]) == [[NO_ANSWER]]
    assert filter_echoed_lines([["nothing"]], [DOC]) == [[NO_ANSWER]]
    assert list_results(DOC, [NO_ANSWER])["items_right"] == 0.0


def test_results_are_plain_floats():
    assert number_results({"gold": "1000"}, ["$1,000"]) == {"exact_match": 1.0}
    assert words_results({"gold": "invalid"}, [NO_ANSWER]) == {"exact_match": 0.0}


def test_grading_needs_neither_torch_nor_lm_eval():
    import subprocess

    code = "import sys, flashmem_bench.grading.hooks; print({'torch', 'lm_eval', 'numpy'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
