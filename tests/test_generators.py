"""The generated suites: gold answers recomputed by independent solvers, splits that cannot overlap, stable
rows."""

from __future__ import annotations

import re
import subprocess
import sys
from collections import Counter

import pytest

from flashmem_bench.generators import GENERATORS, generate
from flashmem_bench.generators import recall as recall_suite
from flashmem_bench.generators.base import SPLITS, split_of


def solve_wordmath(prompt: str) -> int:
    """Read the story sentence by sentence and keep one running amount."""
    story, _ = prompt.rsplit(" How many", 1)
    amount = 0
    for sentence in re.findall(r"[^.]+\.", story):
        numbers = [int(x) for x in re.findall(r"\d+", sentence)]
        if "each." in sentence:
            amount = numbers[0] * numbers[1]
        elif re.search(r"has \d+ times as many", sentence):
            amount *= numbers[0]
        elif "equally" in sentence:
            assert amount % numbers[0] == 0
            amount //= numbers[0]
        elif "more." in sentence:
            amount += numbers[0]
        elif " has " in sentence:
            amount = numbers[0]
        else:
            amount -= numbers[0]
    return amount


def facts_of(prompt: str) -> dict[str, str]:
    return dict(line.split(" -> ") for line in prompt.splitlines() if " -> " in line)


def solve_hops(prompt: str) -> str:
    count, start = prompt.splitlines()[-1].split(": ")
    links = facts_of(prompt)
    for _ in range({"One link": 1, "Two links": 2, "Three links": 3, "Four links": 4}[count]):
        start = links[start]
    return start


def solve_hops_list(prompt: str) -> str:
    links, lines = facts_of(prompt), []
    for asked in prompt.split("Names:\n")[1].splitlines():
        value = links[asked.split()[0]]
        lines.append(f"{asked}: {links[value] if asked.endswith(' twice') else value}")
    return "\n".join(lines)


def solve_recall(prompt: str) -> str:
    return facts_of(prompt)[prompt.splitlines()[-1].removeprefix("Key: ")]


SOLVERS = {"wordmath": solve_wordmath, "hops": solve_hops, "hops-list": solve_hops_list, "recall": solve_recall}


@pytest.mark.parametrize("name", GENERATORS)
def test_an_independent_solver_agrees(name):
    for row in generate(name, "test", 300):
        assert str(SOLVERS[name](row["prompt"])) == row["answer"]


@pytest.mark.parametrize("name", GENERATORS)
def test_splits_share_no_prompt_whatever_the_seed(name):
    prompts = {
        split: {row["prompt"] for seed in (0, 1) for row in generate(name, split, 300, seed)} for split in SPLITS
    }
    for split, found in prompts.items():
        assert {split_of(prompt) for prompt in found} == {split}
    assert len(set().union(*prompts.values())) == sum(map(len, prompts.values()))


@pytest.mark.parametrize("name", GENERATORS)
def test_rows_are_stable_and_a_larger_limit_only_appends(name):
    first = generate(name, "test", 40)
    assert generate(name, "test", 60)[:40] == first
    assert [row["id"] for row in first[:2]] == [f"{name}-test-00000", f"{name}-test-00001"]
    assert generate(name, "test", 40, seed=1) != first
    assert len({row["prompt"] for row in first}) == 40


def test_rows_do_not_depend_on_the_hash_seed():
    code = "from flashmem_bench.generators import generate; print(generate('hops-list', 'test', 5))"
    runs = [
        subprocess.run(
            [sys.executable, "-c", code], env={"PYTHONHASHSEED": seed, "PYTHONPATH": "."}, capture_output=True
        )
        for seed in ("1", "2")
    ]
    assert runs[0].stdout and runs[0].stdout == runs[1].stdout


def test_wordmath_targets_are_valid_equations():
    for row in generate("wordmath", "test", 300):
        *lines, last = row["target"].splitlines()
        assert len(lines) == row["steps"] and last == f"#### {row['answer']}"
        for line in lines:
            left, right = line.split(" = ")
            assert eval(left) == int(right)


def test_hops_cannot_be_answered_by_counting_names():
    for row in generate("hops", "test", 200):
        counts = Counter(re.findall(r"[A-Z][a-z]+", row["prompt"].split("\n", 1)[1].rsplit("\n", 1)[0]))
        assert set(counts.values()) == {2} and len(counts) == row["facts"]


def test_hops_strata_come_in_turn():
    rows = generate("hops", "test", 8)
    assert [row["stratum"] for row in rows] == ["k=1", "k=2", "k=3", "k=4"] * 2


def test_hops_list_moments_stand_right_before_two_link_values():
    shares = []
    for row in generate("hops-list", "test", 200):
        lines = row["target"].splitlines()
        assert 8 <= len(lines) <= 16 and len(set(row["echoes"])) == len(lines)
        for line, echo, value in zip(lines, row["echoes"], row["values"], strict=True):
            assert line == f"{echo} {value}" and row["target"].count(line) == 1
        assert row["moments"] == [echo for echo in row["echoes"] if echo.endswith(" twice:")]
        shares.append(len(row["moments"]) / len(lines))
    assert abs(sum(shares) / len(shares) - 0.25) < 0.02


def test_recall_reaches_long_contexts():
    for tokens in (64, 512, 4096, 65536):
        pairs = recall_suite.pairs_for_tokens(tokens)
        row = generate("recall", "test", 1, pairs=pairs)[0]
        assert len(facts_of(row["prompt"])) == pairs and row["stratum"] == f"n={pairs}"
        words = recall_suite.words_per_key(pairs)
        assert abs(pairs * (2 + 2 * words) / tokens - 1) < 0.1 or pairs in (48, 3000)


@pytest.mark.parametrize(
    ("name", "settings", "text"),
    [
        ("hops", {"k": (5,)}, "1..4"),
        ("hops", {"facts": 1}, "two facts"),
        ("hops-list", {"facts": 6}, "more than 6 facts"),
        ("recall", {"pairs": 1}, "2.."),
        ("wordmath", {"steps": (0,)}, "at least 1"),
    ],
)
def test_settings_out_of_range_are_refused(name, settings, text):
    with pytest.raises(ValueError, match=re.escape(text)):
        generate(name, "test", 1, **settings)


def test_an_unknown_split_is_refused():
    with pytest.raises(ValueError, match="train, validation, calibration, test"):
        generate("hops", "dev", 1)


def test_hops_takes_numbers_of_facts_in_turn_for_every_number_of_links():
    rows = generate("hops", "train", 48, facts=(5, 8), k=(1, 2))
    seen = {(row["k"], row["facts"], row["prompt"].count(" -> ")) for row in rows}
    assert seen == {(k, facts, facts) for k in (1, 2) for facts in (5, 8)}
    with pytest.raises(ValueError, match="two facts"):
        generate("hops", "train", 1, facts=(1, 5))
