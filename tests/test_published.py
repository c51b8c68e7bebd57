"""What the paper reports, and how answers ended: beside what is measured."""

from __future__ import annotations

from pathlib import Path

import pytest

from flashmem_bench.latency.files import append
from flashmem_bench.published import published_cost, published_score, published_scores
from flashmem_bench.report import build_report
from flashmem_bench.report.outcome_figures import STATES, shares, why_lost
from flashmem_bench.report.tables import build_tables
from flashmem_bench.store import ResultStore
from tests.synthetic_results import add_cell, make_results


def test_published_numbers_are_complete_and_of_sound_size() -> None:
    scores = published_scores()
    suites = {row.suite for row in scores}
    assert len({(r.backbone, r.suite, r.method) for r in scores}) == len(scores) == 4 * 5 * len(suites)
    assert "gsm8k" in suites and all(0 < row.value < 1 for row in scores)
    cost = published_cost("random-qwen2.5-1.5b")
    assert {context for context, _ in cost} == {2**k for k in range(12, 17)}
    # 256 text tokens by the throughput are the seconds that the table calls latency: 5.05 times at 64k.
    assert cost[65536, "flashmem"]["text_tok_s"] / cost[65536, "memgen"]["text_tok_s"] == pytest.approx(5.05, abs=0.01)


def test_a_published_score_belongs_to_one_backbone() -> None:
    assert published_score("gsm8k", "vanilla", "Qwen/Qwen2.5-1.5B-Instruct") == pytest.approx(0.6512)
    assert published_score("gsm8k", "vanilla", "flashmem-tiny") is None
    assert published_score("hops", "vanilla", "Qwen/Qwen2.5-1.5B-Instruct") is None
    assert published_cost("flashmem-tiny") == {}


def test_the_page_puts_published_values_beside_measured_ones(tmp_path: Path) -> None:
    store = ResultStore(tmp_path)
    for method in ("vanilla", "flashmem"):
        add_cell(store, "gsm8k", method, 30, model="Qwen/Qwen2.5-1.5B-Instruct", device="cuda")
    common = {"model": "random-qwen2.5-1.5b", "device": "cuda", "dtype": "bfloat16", "exec": "eager",
              "protocol": "paper", "context": 65536, "output_tokens": 256}  # fmt: skip
    rows = [{**common, "method": m, "run": run, "e2e_ms": t, "decode_ms": t - 500.0}
            for run in range(5) for m, t in (("vanilla", 2560.0), ("flashmem", 3072.0))]  # fmt: skip
    append(tmp_path, rows)
    page = build_report(tmp_path).html.read_text()
    runs = build_tables(ResultStore(tmp_path))["runs"].set_index("method")
    assert runs["published_score"].to_dict() == pytest.approx({"vanilla": 0.6512, "flashmem": 0.7009})
    assert "published %" in page and "<td>65.1</td>" in page and "Llama-3.1-8B-Instruct: vanilla" in page
    assert "published ratio" in page and "<td>1.23</td>" in page, "25.67 over 20.86 tokens a second"


def test_no_published_column_where_nothing_was_published(tmp_path: Path) -> None:
    make_results(tmp_path, suites=["hops"], methods=["vanilla", "flashmem"], n=8)
    assert "published" not in build_report(tmp_path).html.read_text()


@pytest.mark.parametrize(
    ("row", "state"),
    [
        ({"parse_status": "ok"}, "wrong"),
        ({"parse_status": "no_answer"}, "no answer found"),
        ({"parse_status": "no_answer", "truncated": True}, "cut at the budget"),
        ({"parse_status": "timeout"}, "not graded in time"),
        ({"parse_status": "error"}, "grader failed"),
        ({"error": "out of memory", "truncated": True}, "failed"),
    ],
)
def test_lost_points_have_one_reason(row: dict, state: str) -> None:
    assert why_lost(row) == state and state in STATES


def test_points_add_up() -> None:
    rows = [
        {"score": 1.0, "truncated": True, "parse_status": "ok"},
        {"score": 0.25, "parse_status": "ok"},
        {"score": 0.0, "parse_status": "no_answer"},
        {"score": None, "parse_status": "timeout"},
    ]
    found = shares(rows)
    assert sum(found.values()) == pytest.approx(1.0)
    assert found["right"] == pytest.approx(1.25 / 4) and found["wrong"] == pytest.approx(0.75 / 4)
    assert found["cut at the budget"] == 0 and found["no answer found"] == found["not graded in time"] == 0.25


def test_outcomes_are_drawn_for_every_suite(tmp_path: Path) -> None:
    make_results(tmp_path, suites=["hops", "wordmath"], methods=["vanilla", "flashmem"], n=40)
    names = {path.name for path in build_report(tmp_path).figures}
    assert {"outcomes-hops.svg", "outcomes-wordmath.png"} <= names


def test_the_page_says_what_a_kept_history_spared(tmp_path: Path) -> None:
    store = ResultStore(tmp_path)
    add_cell(store, "hops", "vanilla", 12, session_id="one", positions_reused=60, positions_encoded=20)
    page = build_report(tmp_path).html.read_text()
    assert "<th>positions / reused</th>" in page and "<td>20.0 / 75 %</td>" in page
    assert "No claim has its cells here yet." in page
