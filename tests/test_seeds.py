"""Training seeds in the report: what is grouped, the two spreads, the joint interval."""

from __future__ import annotations

import numpy as np
import pytest

from flashmem_bench import stats
from flashmem_bench.report import build_report
from flashmem_bench.report.tables import build_tables
from flashmem_bench.store import ResultStore
from tests.synthetic_results import add_cell


def test_the_joint_interval_has_both_sources_of_doubt():
    rng = np.random.default_rng(0)
    samples = rng.random((1, 400)) < 0.5
    alike = np.repeat(samples, 3, axis=0).astype(float)
    only_samples = stats.seeds_and_samples(alike)
    expected = 1.96 * alike[0].std() / 20
    assert only_samples.high - only_samples.estimate == pytest.approx(expected, rel=0.15)
    only_seeds = stats.seeds_and_samples(np.array([[0.2] * 50, [0.5] * 50, [0.8] * 50]))
    assert only_seeds.estimate == pytest.approx(0.5)
    assert only_seeds.low == pytest.approx(0.2) and only_seeds.high == pytest.approx(0.8)


def test_clusters_are_drawn_as_a_whole() -> None:
    """Twenty documents of five equal questions each say no more than twenty questions."""
    documents = np.random.default_rng(0).integers(0, 2, size=20).astype(float)
    scores, labels = np.repeat(documents, 5)[None].repeat(3, axis=0), np.repeat(np.arange(20), 5)
    narrow = stats.seeds_and_samples(scores)
    wide = stats.seeds_and_samples(scores, labels.tolist())
    alone = stats.seeds_and_samples(documents[None].repeat(3, axis=0))
    assert wide.high - wide.low == pytest.approx(alone.high - alone.low, rel=0.1)
    assert wide.high - wide.low > 1.8 * (narrow.high - narrow.low)


def test_the_joint_interval_draws_the_same_samples_for_every_seed():
    # Two runs whose differences cancel sample by sample: their mean is certain only if samples are drawn together.
    half = np.array([0.0, 1.0] * 50)
    together = stats.seeds_and_samples(np.stack([half, 1 - half]), resamples=500)
    assert together.estimate == 0.5
    assert together.high - together.low < 0.25


def test_runs_that_differ_in_the_training_seed_become_one_record(tmp_path):
    store = ResultStore(tmp_path)
    plain = add_cell(store, "hops", "vanilla", n=40)
    for seed in range(3):
        add_cell(store, "hops", "flashmem", n=40, train_seed=seed)
    table = build_tables(store)["seeds"]
    assert list(table["train_seeds"]) == ["0,1,2"] and list(table["n"]) == [40]
    runs = build_tables(store)["runs"]
    means = runs[runs["method"] == "flashmem"]["score"].tolist()
    row = table.iloc[0]
    assert row["score"] == pytest.approx(np.mean(means))
    assert row["between_seed_sd"] == pytest.approx(np.std(means, ddof=1))
    vanilla = runs[runs["cell"] == plain.cell_id]["score"].item()
    assert row["delta_vanilla"] == pytest.approx(np.mean(means) - vanilla)
    assert "Training seeds" in build_report(tmp_path).html.read_text(encoding="utf-8")


def test_runs_of_other_seeds_are_told_apart_by_their_seed(tmp_path):
    store = ResultStore(tmp_path)
    for seed in range(2):
        add_cell(store, "hops", "flashmem", n=10, train_seed=seed)
    assert sorted(build_tables(store)["runs"]["settings"]) == ["memory=joint seed 0", "memory=joint seed 1"]


def test_one_seed_or_other_settings_make_no_record(tmp_path):
    store = ResultStore(tmp_path)
    add_cell(store, "hops", "flashmem", n=10, train_seed=0)
    add_cell(store, "hops", "flashmem", n=10, train_seed=1, settings={"trigger": {"threshold": 2.0}})
    assert build_tables(store)["seeds"].empty


def test_a_point_of_an_ablation_is_compared_with_the_reference_of_its_own_seed(tmp_path):
    store = ResultStore(tmp_path)
    references = {}
    for seed in (0, 1, 2):
        for value in ("inherited", "random"):
            mark = {"axis": "init", "value": value, "reference": value == "inherited"}
            settings = {"memory": {"init": value}}
            cell = add_cell(store, "hops", "flashmem", n=20, train_seed=seed, ablation=[mark], settings=settings)
            if value == "inherited":
                references[seed] = cell.cell_id
    sheet = build_tables(store)["ablations"]
    points = sheet[~sheet["reference"]]
    runs = build_tables(store)["runs"].set_index("cell")["train_seed"]
    assert {int(runs[row.cell]): row.reference_cell for row in points.itertuples()} == references
