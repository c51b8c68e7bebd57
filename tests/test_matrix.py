"""The matrix on the bundled backbone: every method on every suite that it knows, three samples each."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flashmem_bench.registry import METHODS
from tests.matrix import SUITES, pairs, pick, run_pairs


@pytest.mark.slow
def test_every_method_runs_on_every_suite(tmp_path: Path) -> None:
    run_pairs(pairs(), tmp_path)


def test_the_matrix_leaves_no_method_and_no_suite_out() -> None:
    assert {method for _, method in pairs()} == set(METHODS) and {suite for suite, _ in pairs()} == set(SUITES)


@given(st.text(max_size=40), st.floats(min_value=0.001, max_value=1.0))
def test_a_seed_picks_the_same_share_every_time(seed: str, share: float) -> None:
    chosen, every = pick(seed, share), pairs()
    assert chosen == pick(seed, share) and len(chosen) == max(1, round(share * len(every)))
    assert chosen == [pair for pair in every if pair in set(chosen)]


def test_commits_together_look_at_the_whole_matrix() -> None:
    seen = {pair for commit in range(100) for pair in pick(f"{commit:040x}", 0.1)}
    assert seen == set(pairs())
