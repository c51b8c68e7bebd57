"""Methods: each on one suite, every suite on two methods, placebos that cost the same, and reasons for equal texts."""

from __future__ import annotations

import itertools
import random

import pytest

from flashmem_bench.errors import UnknownNameError
from flashmem_bench.methods.base import ReferenceSample
from flashmem_bench.methods.flashmem_matched_fixed import even_positions
from flashmem_bench.methods.flashmem_random_trigger import draw_positions, pooled_rate
from flashmem_bench.registry import get_method, method_names
from flashmem_bench.schema import SAMPLE_COLUMNS, column_names
from flashmem_bench.store import ResultStore
from tests.bench_fixtures import SUITES

PLACEBOS = ["flashmem-random-memory", "flashmem-shuffled-memory", "flashmem-mean-memory", "flashmem-noop-memory"]


@pytest.fixture(scope="module")
def on_hops_list(bench, tmp_path_factory):
    """Every method on one suite, three samples each."""
    results = bench.results(tmp_path_factory.mktemp("methods") / "results")
    found = bench.run(results, "hops-list", ",".join(method_names()), limit=3, settings={"trigger.cooldown": 4})
    return results, {result.method: result for result in found}


@pytest.mark.parametrize("method", method_names())
def test_every_method_runs(on_hops_list, method):
    _, cells = on_hops_list
    result = cells[method]
    assert result.status == "complete", result.error
    assert len(result.rows) == 3
    for row in result.rows:
        assert set(column_names(SAMPLE_COLUMNS)) <= set(row)
        assert row["error"] is None and row["score"] is not None and row["score_valid"] is True
        assert row["trigger_rate"] == pytest.approx(row["triggers"] / (1 + row["output_tokens"]))
        assert row["latent_tokens"] == 4 * row["triggers"]
        fed = row["prompt_tokens"] + (row["drawn_tokens"] or row["output_tokens"]) + row["latent_tokens"]
        unfed = 8 if method == "cot-sc" else 1
        again = row["positions_encoded"] - fed
        # `memgen` encodes the whole sequence again for each memory behind the first.
        assert again > 0 if method == "memgen" and row["triggers"] > 1 else -unfed <= again <= 0
        assert row["e2e_ms"] == pytest.approx(row["prefill_ms"] + row["decode_ms"])
        share = row["monitor_ms"] + row["consolidate_ms"] + row["inject_ms"]
        assert row["overhead_share"] == pytest.approx(share / row["decode_ms"])


def test_methods_do_what_their_names_say(on_hops_list):
    _, cells = on_hops_list
    triggers = {name: [row["triggers"] for row in cell.rows] for name, cell in cells.items()}
    assert triggers["vanilla"] == [0, 0, 0]
    assert triggers["flashmem-prompt-end"] == [1, 1, 1]
    assert sum(triggers["flashmem"]) > 0
    assert triggers["flashmem-random-trigger"] == triggers["flashmem"]
    assert triggers["flashmem-matched-fixed"] == triggers["flashmem"]
    assert all(row["train_seed"] == 7 for row in cells["flashmem"].rows)
    assert cells["vanilla"].rows[0]["threshold"] is None
    assert cells["flashmem"].rows[0]["threshold"] > 0
    assert cells["flashmem"].rows[0]["tau_source"] == "suite"
    assert cells["flashmem"].rows[0]["checkpoint_scope"] == "joint"
    assert len({cell.cell for cell in cells.values()}) == len(cells)
    assert all(row["positions_woven"] >= row["prompt_tokens"] + 4 for row in cells["memgen-cached"].rows)
    assert all(len({f"metric.sc_{n}" for n in range(1, 9)} & set(row)) == 8 for row in cells["cot-sc"].rows)


def test_kept_caches_give_memgens_answers(on_hops_list):
    results, cells = on_hops_list
    texts = {cell.get("method"): cell.texts() for cell in ResultStore(results).cells()}
    assert {name: text["text"] for name, text in texts["memgen"].items()} == {
        name: text["text"] for name, text in texts["memgen-cached"].items()
    }
    assert sum(row["triggers"] for row in cells["memgen"].rows) >= 3


def test_prompts_are_equal_across_methods(on_hops_list):
    _, cells = on_hops_list
    assert len({tuple(row["prompt_sha"] for row in cell.rows) for cell in cells.values()}) == 1


@pytest.mark.parametrize("method", PLACEBOS)
def test_placebos_keep_the_first_moment_and_run_the_real_source(on_hops_list, method):
    """Texts differ after the first memory, so only the first moment must be the same."""
    results, cells = on_hops_list
    texts = {cell.get("method"): cell.texts() for cell in ResultStore(results).cells()}
    for sample, text in texts["flashmem"].items():
        first = [t["text_index"] for t in text["triggers"]][:1]
        assert [t["text_index"] for t in texts[method][sample]["triggers"]][:1] == first
    assert all(row["consolidate_ms"] > 0 for row in cells[method].rows if row["triggers"])


def test_placebos_share_one_bank_of_other_samples(on_hops_list, bench):
    from collections import Counter

    from flashmem.placebo import MemoryBank

    (path,) = (on_hops_list[0] / "banks").iterdir()
    bank = MemoryBank.load(path)
    assert len(bank) - max(Counter(bank.answers).values()) >= 64
    tested = {sample.answer for sample in bench.suites["hops-list"].samples()}
    assert not tested & set(bank.answers), "the bank comes from the calibration split"


@pytest.mark.parametrize("suite", SUITES)
def test_every_suite_runs_on_two_methods(bench, tmp_path, suite):
    results = bench.run(bench.results(tmp_path / "results"), suite, "vanilla,flashmem", limit=3)
    assert [result.status for result in results] == ["complete", "complete"], results[-1].error
    assert [len(result.rows) for result in results] == [3, 3]
    assert results[0].rows[0]["stratum"] == results[1].rows[0]["stratum"]


def test_why_equal_names_the_reason(bench, tmp_path):
    results = bench.results(tmp_path / "results")
    cells = bench.run(results, "hops", "vanilla,flashmem", limit=3, settings={"trigger.threshold": 1e6})
    assert "no decision step exceeded the threshold of 1e+06" in cells[1].summary["why_equal"]
    assert cells[0].summary["why_equal"] is None
    one_token = {suite: bench.suites[suite] for suite in ("recall",)}
    import dataclasses

    suite = one_token["recall"]
    before = suite.generation
    suite.generation = dataclasses.replace(before, max_new_tokens=1)
    try:
        cells = bench.run(results, "recall", "vanilla,flashmem-literal", limit=3, settings={"trigger.threshold": 0.0})
    finally:
        suite.generation = before
    assert all(row["triggers"] == 1 for row in cells[1].rows)
    assert "logits before each injection" in cells[1].summary["why_equal"]


def test_why_equal_speaks_of_one_batch_size(bench, tmp_path):
    results = bench.results(tmp_path / "results")
    more = {"limit": 3, "settings": {"eviction.budget": 2000}}
    bench.run(results, "hops", "vanilla", limit=3)
    (apart,) = bench.run(results, "hops", "snapkv", batch_size=2, **more)
    assert apart.summary["why_equal"] is None
    bench.run(results, "hops", "vanilla", limit=3, batch_size=2)
    (beside,) = bench.run(results, "hops", "snapkv", batch_size=2, **{**more, "limit": 4})
    assert beside.summary["why_equal"] is None, "the fourth sample has nothing beside it"
    bench.run(results, "hops", "vanilla", limit=5, batch_size=2)
    (beside,) = bench.run(results, "hops", "snapkv", batch_size=2, **{**more, "limit": 5})
    assert "nothing that the method changes reached a token" in beside.summary["why_equal"]


def test_pooled_matching_uses_one_rate(bench, tmp_path):
    cells = bench.run(
        bench.results(tmp_path / "results"), "hops-list", "flashmem-random-trigger", limit=3, match="pooled"
    )
    assert [cell.method for cell in cells] == ["flashmem", "flashmem-random-trigger"]
    assert cells[1].status == "complete"


def test_untrained_memory_has_no_score(bench, tmp_path):
    cells = bench.run(
        bench.results(tmp_path / "results"), "hops", "flashmem", limit=2, settings={"memory.checkpoint": "untrained"}
    )
    assert all(row["score"] is None and row["score_valid"] is False for row in cells[0].rows)
    assert not [key for row in cells[0].rows for key in row if key.startswith("metric.")]


def test_draws_keep_count_and_cooldown_and_are_uniform():
    seen: dict[int, int] = {}
    for trial in range(4000):
        positions = draw_positions(2, 6, 3, str(trial))
        assert len(positions) == 2 and positions[1] - positions[0] >= 3 and 0 <= positions[0] and positions[1] < 6
        seen[positions] = seen.get(positions, 0) + 1
    assert len(seen) == 6
    assert max(seen.values()) < 1.3 * min(seen.values())
    assert draw_positions(2, 6, 3, "7") == draw_positions(2, 6, 3, "7")
    assert draw_positions(0, 6, 3, "x") == ()
    assert draw_positions(3, 4, 3, "x") == (0, 3)


def test_even_moments_keep_count_and_cooldown():
    for steps, cooldown, count in ((1, 32, 1), (40, 32, 2), (100, 32, 2), (97, 1, 5), (9, 0, 9)):
        found = even_positions(count, steps, cooldown)
        gaps = [b - a for a, b in itertools.pairwise(found)]
        assert len(found) == count and found[0] == 0 and found[-1] < steps
        assert all(gap >= max(1, cooldown) for gap in gaps) and len(set(gaps)) <= 1
    assert even_positions(0, 9, 32) == ()


def test_matched_output_entropy_fires_at_the_rate_of_the_reference(bench, tmp_path):
    results = bench.results(tmp_path / "results")
    cells = bench.run(results, "hops-list", "flashmem-matched-output", limit=3)
    assert [cell.method for cell in cells] == ["flashmem", "flashmem-matched-output"]
    stored = {cell.get("method"): cell for cell in ResultStore(results).cells()}
    texts = stored["flashmem"].texts()
    reference = {
        name: ReferenceSample(tuple(t["text_index"] for t in text["triggers"]), len(text["entropies"]))
        for name, text in texts.items()
    }
    trigger = stored["flashmem-matched-output"].get("settings")["trigger"]
    rate = pooled_rate(reference, trigger["cooldown"], trigger["max_injections"])
    assert trigger["kind"] == "output-entropy" and trigger["percentile"] == round(100 * (1 - rate), 3)


def test_pooled_rate_reproduces_the_number_of_memories():
    """A gate with the rate fires as often, in the mean, as the reference did over its eligible steps."""
    reference = {str(i): ReferenceSample((0, 40), 100) for i in range(50)}
    rate = pooled_rate(reference, cooldown=32, cap=8)
    # Two memories with a cooldown of 32 leave 100 - 2 * 31 eligible steps.
    assert rate == pytest.approx(2 / 38)
    rng, fired = random.Random(0), 0
    for _ in range(2000):
        step = 0
        while step < 100:
            hit = rng.random() < rate
            fired, step = fired + hit, step + (32 if hit else 1)
    assert 1.4 < fired / 2000 < 2.6


def test_registry_names_near_misses():
    with pytest.raises(UnknownNameError, match="did you mean flashmem-literal"):
        get_method("flashmem-litteral")
