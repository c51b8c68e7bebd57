"""Ranking of decision steps: the statistics against slow definitions, the kinds of positions, the command."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats as scipy_stats

from flashmem_bench import moments as m
from flashmem_bench.cli import run as cli
from flashmem_bench.stats import auroc, precision_at_count, ranking_intervals

pairs = st.lists(st.tuples(st.integers(0, 5), st.booleans()), min_size=2, max_size=40)


@given(pairs)
def test_auroc_counts_pairs_and_ties_half(drawn):
    values, marked = np.array([v for v, _ in drawn]), np.array([p for _, p in drawn])
    high, low = values[marked], values[~marked]
    if not len(high) or not len(low):
        assert np.isnan(auroc(values, marked))
        return
    wins = (high[:, None] > low).mean() + 0.5 * (high[:, None] == low).mean()
    assert auroc(values, marked) == pytest.approx(wins)
    u = scipy_stats.mannwhitneyu(high, low).statistic
    assert auroc(values, marked) == pytest.approx(u / (len(high) * len(low)))


@given(pairs, st.randoms(use_true_random=False))
def test_precision_at_count_does_not_depend_on_the_order_of_ties(drawn, chance):
    values, marked = [v for v, _ in drawn], [p for _, p in drawn]
    if not any(marked):
        return
    expected = precision_at_count(values, marked)
    shuffled = chance.sample(drawn, len(drawn))
    assert precision_at_count([v for v, _ in shuffled], [p for _, p in shuffled]) == pytest.approx(expected)
    assert 0 <= expected <= 1


def test_precision_at_count_of_a_perfect_and_of_a_constant_signal():
    marked = [True, False, True, False]
    assert precision_at_count([4, 1, 3, 2], marked) == 1
    assert precision_at_count([7, 7, 7, 7], marked) == 0.5


def test_the_interval_draws_whole_samples():
    # Within a sample every step is alike: two samples are two independent facts, however many steps they have.
    values = np.array([1.0] * 50 + [0.0] * 50)
    marked = np.array([True, False] * 50)
    few, _ = ranking_intervals(values, marked, np.repeat([0, 1], 50))
    assert few.estimate == few.low == few.high == 0.5
    rng = np.random.default_rng(0)
    signal, truth = rng.normal(size=400), rng.random(400) < 0.5
    signal[truth] += 1
    alone = ranking_intervals(signal, truth, np.arange(400))
    together = ranking_intervals(np.tile(signal, 4), np.tile(truth, 4), np.tile(np.arange(400), 4))
    for one, four in zip(alone, together, strict=True):
        assert one.low < one.estimate < one.high
        assert (four.low, four.high) == pytest.approx((one.low, one.high), abs=1e-9)


@given(pairs, st.integers(0, 9))
def test_a_replicate_weighs_groups_as_if_their_steps_were_repeated(drawn, seed):
    values, marked = np.array([v for v, _ in drawn]), np.array([p for _, p in drawn])
    groups = np.arange(len(drawn)) // 3
    draws = np.random.default_rng(seed).multinomial(groups[-1] + 1, [1 / (groups[-1] + 1)] * (groups[-1] + 1))
    repeated = np.repeat(np.arange(len(drawn)), draws[groups])
    area, share = ranking_intervals(values, marked, groups, seed=seed, resamples=1)
    expected = auroc(values[repeated], marked[repeated]) if len(repeated) else np.nan
    if np.isnan(expected):
        assert np.isnan(area.low)
    else:
        assert area.low == pytest.approx(expected)
        assert share.low == pytest.approx(precision_at_count(values[repeated], marked[repeated]))


@pytest.mark.parametrize(
    ("written", "first", "kind"),
    [("", True, "prompt-end"), ("Ana: ", False, "value"), ("Ana: Bob\nCleo twice: ", False, "value"),
     ("Ana: Bob", False, "later"), ("Ana: Bob\n", False, "later")],
)  # fmt: skip
def test_kinds_of_positions(written, first, kind):
    assert m.kind_of(written, first) == kind


def test_a_signal_that_knows_ranks_perfectly_and_records_have_every_column():
    steps = [m.Step(i // 3, "value" if i % 3 else "prompt-end", i % 3 == 2) for i in range(60)]
    due = np.array([step.due for step in steps], dtype=float)
    found = m.Moments(steps, {"layer0": due, "layer1": -due, "random": np.zeros(60)}, "layer1")
    records = m.rank(found, "s", "m", marked=True)
    assert [set(record) for record in records] == [set(m.COLUMNS)] * 6
    areas = {(r["positions"], r["signal"], r["layer"]): r["auroc"] for r in records}
    assert areas["all", "attention-entropy", 0] == 1 and areas["value", "attention-entropy", 1] == 0
    assert areas["value", "random", None] == 0.5
    assert {r["positions"]: r["base_rate"] for r in records} == {"all": pytest.approx(1 / 3), "value": 0.5}


def test_the_command_ranks_hops_list_and_stores_table_and_figure(tmp_path, capsys):
    code = cli(["moments", "--suite", "hops-list", "--limit", "3", "--results-dir", str(tmp_path), "--json", "--quiet"])
    assert code == 0
    answer = json.loads(capsys.readouterr().out.splitlines()[-1])
    monitored = [row for row in answer["rows"] if row["monitored"]]
    assert {row["positions"] for row in monitored} == {"all", "value"}
    assert all(0 <= row["auroc"] <= 1 for row in answer["rows"])
    assert (tmp_path / "tables" / "moments.csv").exists()
    assert (tmp_path / "figures" / "moments-hops-list.svg").exists()


def test_a_suite_that_cannot_say_where_help_is_due_is_refused(tmp_path, capsys):
    code = cli(["moments", "--suite", "recall", "--limit", "2", "--results-dir", str(tmp_path)])
    assert code == 2
    assert "use hops-list or hops" in capsys.readouterr().err


def test_the_monitored_layer_shows_what_the_monitor_saw_while_generating():
    from flashmem_bench.session import Request, Session

    session = Session(Request(suites=("hops-list",), methods=(), limit=3))
    suite = session.suite("hops-list")
    found = m.collect(session, suite, 3, lambda done, total: None)
    prompts = [session.backbone.encode_chat(suite.samples("test")[i].prompt) for i in range(3)]
    answers = m._answers(session, suite, prompts)
    seen = [value for answer in answers for value in answer.entropies[: len(answer.token_ids)]]
    assert found.signals[found.monitored] == pytest.approx(seen, abs=1e-4)
    assert len({len(values) for values in found.signals.values()} | {len(found.steps)}) == 1
    due = [step for step in found.steps if step.due]
    assert all(step.kind == "value" for step in due)
