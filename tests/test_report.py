"""Tables, figures, page and console table from a made-up results folder."""

from __future__ import annotations

import io
import itertools
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pyarrow.parquet as parquet
import pytest
from PIL import Image
from rich.console import Console

from flashmem_bench import stats
from flashmem_bench.errors import StoreError
from flashmem_bench.report import build_report
from flashmem_bench.report import wording as say
from flashmem_bench.report.cells import load_cells
from flashmem_bench.report.compare import comparison_warnings
from flashmem_bench.report.console import ablation_table, runs_table
from flashmem_bench.report.figures import _spread, file_name
from flashmem_bench.report.tables import build_tables, write_tables
from flashmem_bench.report.traces import pick_sample, printable
from flashmem_bench.schema import SCHEMA_VERSION, TABLES, column_names
from flashmem_bench.store import ResultStore
from tests.synthetic_results import METHODS, add_cell, add_threshold_axis, make_results

VOID = {"meta", "img", "br", "link", "input", "hr"}


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    root = tmp_path_factory.mktemp("full")
    store = make_results(root, n=30)
    add_threshold_axis(store, n=30)
    paths = build_report(root)
    return SimpleNamespace(
        root=root, store=store, paths=paths, tables=build_tables(store), html=paths.html.read_text(encoding="utf-8")
    )


def one_row(frame: pd.DataFrame, **where: object) -> pd.Series:
    for name, value in where.items():
        frame = frame[frame[name] == value]
    assert len(frame) == 1, where
    return frame.iloc[0]


# Tables


def test_columns_are_those_of_the_schema(full: SimpleNamespace) -> None:
    assert set(full.tables) == set(TABLES)
    for name, columns in TABLES.items():
        assert list(full.tables[name].columns) == column_names(columns), name
        read = parquet.read_table(full.root / "tables" / f"{name}.parquet")
        assert read.schema.names == column_names(columns)
        assert read.schema.metadata[b"schema_version"] == str(SCHEMA_VERSION).encode()
        for column in columns:
            metadata = read.schema.field(column.name).metadata
            assert metadata[b"unit"].decode() == column.unit
            assert metadata[b"formula"].decode() == column.formula
        header = (full.root / "tables" / f"{name}.csv").read_text().splitlines()[0]
        assert header.split(",") == column_names(columns)


def test_every_cell_and_row_is_there(full: SimpleNamespace) -> None:
    assert len(full.tables["samples"]) == sum(len(cell.rows()) for cell in full.store.cells())
    assert len(full.tables["runs"]) == len(full.store.cells()) == 2 * len(METHODS) + 6
    assert set(full.tables["metrics"]["metric"]) == {"exact"}


def test_run_numbers_follow_their_formulas(full: SimpleNamespace) -> None:
    run = one_row(full.tables["runs"], suite="hops", method="flashmem")
    rows = full.tables["samples"]
    rows = rows[rows["cell"] == run["cell"]]
    assert run["n"] == run["n_scored"] == len(rows) == 30
    assert run["score"] == pytest.approx(rows["score"].mean())
    low, high = stats.wilson_interval(int(rows["score"].sum()), 30)[1:]
    assert (run["score_low"], run["score_high"]) == pytest.approx((low, high))
    assert run["score_interval"] == "wilson"
    assert run["trigger_rate"] == pytest.approx(rows["triggers"].sum() / (1 + rows["output_tokens"]).sum())
    assert run["ms_per_token"] == pytest.approx(rows["e2e_ms"].sum() / rows["output_tokens"].sum())
    assert run["decode_ms_per_token"] == pytest.approx(rows["decode_ms"].sum() / rows["output_tokens"].sum())
    overhead = rows[["monitor_ms", "consolidate_ms", "inject_ms"]].sum().sum()
    assert run["overhead_share"] == pytest.approx(overhead / (rows["e2e_ms"] - rows["prefill_ms"]).sum())
    parts = ("prefill", "plain", "monitor", "consolidate", "inject")
    assert sum(run[f"{part}_ms_mean"] for part in parts) == pytest.approx(rows["e2e_ms"].mean())
    assert pd.isna(run["e2e_ms_p99"])


def test_difference_from_vanilla_is_paired(full: SimpleNamespace) -> None:
    run = one_row(full.tables["runs"], suite="hops", method="flashmem")
    base = one_row(full.tables["runs"], suite="hops", method="vanilla")
    rows = full.tables["samples"].set_index("sample_id")
    ours, theirs = (rows[rows["cell"] == cell["cell"]] for cell in (run, base))
    theirs = theirs.loc[ours.index]
    expected = stats.paired_bootstrap(ours["score"], theirs["score"])
    assert (run["delta_vanilla"], run["delta_low"], run["delta_high"]) == pytest.approx(expected)
    ratio = np.exp(np.log(ours["e2e_ms"] / theirs["e2e_ms"]).mean())
    assert run["time_ratio"] == pytest.approx(ratio)
    assert pd.isna(base["delta_vanilla"])
    comparison = one_row(full.tables["comparisons"], suite="hops", a="flashmem", kind="baseline")
    assert comparison["fixed"] == (ours["score"] > theirs["score"]).sum()
    assert comparison["p_value"] == pytest.approx(
        stats.mcnemar_exact(int(comparison["fixed"]), int(comparison["broken"]))
    )


def test_strata_add_up_to_the_run(full: SimpleNamespace) -> None:
    run = one_row(full.tables["runs"], suite="wordmath", method="vanilla")
    strata = full.tables["strata"]
    strata = strata[strata["cell"] == run["cell"]]
    assert list(strata["stratum"]) == ["steps=1", "steps=2", "steps=3"]
    assert strata["n"].sum() == run["n"]
    assert (strata["score"] * strata["n"]).sum() / run["n"] == pytest.approx(run["score"])


def test_ablation_points_have_one_reference_and_stay_out_of_the_headline(full: SimpleNamespace) -> None:
    points = full.tables["ablations"]
    assert list(points["value"]) == ["0.5", "1.0", "1.5", "2.0", "2.4", "3.0", "4.0"]
    assert list(points[points["reference"]]["value"]) == ["2.4"]
    reference = points[points["reference"]].iloc[0]
    assert set(points["reference_cell"]) == {reference["cell"]}
    assert points["delta_reference"].notna().sum() == 6
    runs = full.tables["runs"].set_index("cell")["role"]
    assert {runs[cell] for cell in points[~points["reference"]]["cell"]} == {"ablation"}
    assert runs[reference["cell"]] == "main"


def test_percentiles_and_missing_values_are_ordered(tmp_path: Path) -> None:
    store = ResultStore(tmp_path)
    for value in ("p99", "none", "p50", "p85", "4.5"):
        mark = {"axis": "monitor-threshold", "value": value, "reference": value == "p85"}
        add_cell(store, n=3, settings={"value": value}, ablation=[mark])
    assert list(build_tables(store)["ablations"]["value"]) == ["4.5", "p50", "p85", "p99", "none"]


def test_cells_of_other_conditions_are_never_compared(tmp_path: Path) -> None:
    store = ResultStore(tmp_path)
    add_cell(store, method="vanilla", n=5)
    add_cell(store, method="flashmem", n=5, dtype="bfloat16")
    tables = build_tables(store)
    assert tables["comparisons"].empty
    assert tables["runs"]["delta_vanilla"].isna().all()
    warnings = comparison_warnings(load_cells(store))
    assert any("different conditions" in sentence and "bfloat16" in sentence for sentence in warnings)
    assert any("flashmem: not compared with vanilla" in sentence for sentence in warnings)


@pytest.mark.parametrize(
    ("changes", "why"),
    [({"prompt_sha": "other"}, "different prompts"), ({"settings": {"max": 2}}, None), ({"batch_size": 4}, "batch 4")],
)
def test_refusals(tmp_path: Path, changes: dict, why: str | None) -> None:
    store = ResultStore(tmp_path)
    add_cell(store, method="vanilla", n=5)
    add_cell(store, method="flashmem", n=5, **changes)
    warnings = " ".join(comparison_warnings(load_cells(store)))
    assert build_tables(store)["comparisons"].empty == (why is not None)
    assert (why or "") in warnings
    assert ("not compared" in warnings) == (why is not None)


def test_partner_has_the_same_seed(tmp_path: Path) -> None:
    store = ResultStore(tmp_path)
    for seed in (0, 1):
        add_cell(store, method="vanilla", n=5, seed=seed)
        add_cell(store, method="flashmem", n=5, seed=seed)
    seeds = build_tables(store)["runs"].set_index("cell")["seed"]
    comparisons = build_tables(store)["comparisons"]
    assert len(comparisons) == 2
    assert (comparisons["cell_a"].map(seeds) == comparisons["cell_b"].map(seeds)).all()


def test_several_cells_show_the_settings_in_which_they_differ(tmp_path: Path) -> None:
    store = ResultStore(tmp_path)
    add_cell(store, n=3)
    add_cell(store, n=3, settings={"trigger.cooldown": 8})
    add_cell(store, n=3, settings={"trigger.cooldown": 64}, ablation=[{"axis": "cooldown", "value": 64}])
    runs = build_tables(store)["runs"]
    main = runs[runs["role"] == "main"]
    assert sorted(main["settings"]) == ["trigger.cooldown=8", "trigger.cooldown=none"]


def test_invalid_scores_never_reach_the_headline(tmp_path: Path) -> None:
    store = ResultStore(tmp_path)
    add_cell(store, n=6, score_valid=False)
    run = build_tables(store)["runs"].iloc[0]
    assert (run["n"], run["n_scored"]) == (6, 0)
    assert pd.isna(run["score"])
    assert run["ms_per_token"] > 0
    assert any("left out" in sentence for sentence in comparison_warnings(load_cells(store)))


def test_weak_cells_are_named_among_the_warnings(tmp_path: Path) -> None:
    store = ResultStore(tmp_path)
    add_cell(store, method="vanilla", n=6, truncated=True)
    add_cell(store, method="flashmem", n=4, finish=False, error="out of memory", score=None)
    warnings = " ".join(comparison_warnings(load_cells(store)))
    assert "vanilla: 100 % of the answers were cut" in warnings
    assert "4 samples against 6 of vanilla" in warnings
    assert "was stopped; 4 samples so far" in warnings
    assert "100 % of the samples failed" in warnings


def test_tables_of_one_sample_claim_nothing(tmp_path: Path) -> None:
    store = make_results(tmp_path, suites=["hops"], methods=["vanilla", "flashmem"], n=1)
    comparison = build_tables(store)["comparisons"].iloc[0]
    assert comparison["verdict"] == "cannot tell"
    assert pd.isna(comparison["time_ratio_low"])


def test_empty_tables_keep_their_columns(tmp_path: Path) -> None:
    tables = build_tables(ResultStore(tmp_path / "empty"))
    paths = write_tables(tables, tmp_path / "tables")
    assert len(paths) == 2 * len(TABLES)
    assert all(list(tables[name].columns) == column_names(columns) for name, columns in TABLES.items())


# Figures


def test_figures_exist_and_show_something(full: SimpleNamespace) -> None:
    names = {path.name for path in full.paths.figures}
    for stem in (
        "score-latency-wordmath",
        "score-latency-hops",
        "phases-wordmath",
        "ablation-monitor-threshold-wordmath-flashmem",
        "entropy-trace-wordmath",
    ):
        assert {f"{stem}.png", f"{stem}.svg"} <= names
    for path in full.paths.figures:
        if path.suffix == ".png":
            pixels = np.asarray(Image.open(path).convert("L"))
            assert min(pixels.shape) > 300, path
            assert 0.005 < (pixels < 200).mean() < 0.5, path
        else:
            assert "</svg>" in path.read_text()


def test_same_cells_give_the_same_files(full: SimpleNamespace) -> None:
    before = {path: path.read_bytes() for path in [full.paths.html, *full.paths.figures, *full.paths.tables]}
    build_report(full.root)
    assert [path.name for path, data in before.items() if path.read_bytes() != data] == []


def test_labels_keep_their_distance() -> None:
    placed = _spread([0.9, 0.9, 0.89, 0.5, 0.01, 0.0, 0.0], 0.1)
    assert placed == sorted(placed, reverse=True)
    assert min(a - b for a, b in itertools.pairwise(placed)) > 0.0999
    assert 0 < placed[-1] and placed[0] < 1


def test_trace_picks_a_sample_with_triggers(full: SimpleNamespace) -> None:
    cell = next(cell for cell in load_cells(full.store) if cell.method == "flashmem")
    picked = pick_sample(cell)
    assert picked is not None
    assert cell.texts[picked]["triggers"]
    assert pick_sample(cell) == picked


def test_tokens_become_printable() -> None:
    assert printable(" a\n") == "\u00b7a\u21b5"
    assert printable("\u4f60\x07") == "\u25a1\u25a1"
    assert len(printable("x" * 99)) < 20


def test_file_names_are_plain() -> None:
    assert file_name("../lm-eval/arc easy") == "_lm-eval_arc_easy"


# Page


class Structure(HTMLParser):
    """Collects what the page loads, and whether its tags close."""

    def __init__(self) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.tags: set[str] = set()
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.loads += [value or "" for name, value in attrs if name in ("src", "href", "data", "srcset")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_page_is_self_contained_and_well_formed(full: SimpleNamespace) -> None:
    page = Structure()
    page.feed(full.html)
    assert page.open == []
    assert page.tags.isdisjoint({"script", "link", "iframe", "object"})
    assert page.loads and all(source.startswith("data:image/svg+xml;base64,") for source in page.loads)
    assert not re.search(r"https?://|@import|url\(", full.html)


def test_page_escapes_what_models_and_data_wrote(full: SimpleNamespace) -> None:
    assert "&lt;script&gt;alert(" in full.html
    assert "<script" not in full.html
    assert "<b> $5" not in full.html


def test_page_says_what_it_must(full: SimpleNamespace) -> None:
    text = " ".join(full.html.split())
    assert text.count("CPU timing, not comparable with GPU") >= 5
    assert "flashmem-tiny is a very small model" in text
    assert "flashmem beats vanilla" in text
    assert "How to read" in text and "sum(e2e_ms) / sum(output_tokens)" in text
    assert "flashmem-shuffled-memory" in text
    assert "(reference)" in text


def test_page_says_where_flashmem_loses(tmp_path: Path) -> None:
    store = ResultStore(tmp_path)
    add_cell(store, method="vanilla", n=60, chance=0.8)
    add_cell(store, method="flashmem", n=60, chance=0.3)
    add_cell(store, method="flashmem-mean-memory", n=60, chance=0.8)
    add_cell(store, method="flashmem-noop-memory", n=60, chance=0.3)
    html = build_report(tmp_path).html.read_text()
    assert "flashmem loses to vanilla: -" in html
    assert "flashmem loses to its placebo, in points: flashmem-mean-memory -" in html
    assert "Cannot tell flashmem from its placebo" in html


def test_page_says_why_texts_are_vanillas(tmp_path: Path) -> None:
    store = ResultStore(tmp_path)
    add_cell(store, method="vanilla", n=4, text="same")
    add_cell(store, method="flashmem-noop-memory", n=4, text="same")
    add_cell(store, method="flashmem", n=4, text="same", triggers=0)
    html = build_report(tmp_path).html.read_text()
    assert html.count("all: no trigger") == 2


def test_page_shows_the_latency_protocol(tmp_path: Path) -> None:
    from flashmem_bench.latency.files import append

    make_results(tmp_path, suites=["hops"], methods=["vanilla"], n=2)
    common = {"model": "m", "device": "cpu", "dtype": "float32", "batch_size": 1, "exec": "eager", "protocol": "paper"}
    rows = [
        {
            **common,
            "method": method,
            "context": 512,
            "run": run,
            "e2e_ms": e2e,
            "decode_ms": e2e - 1.0,
            "output_tokens": 5,
        }
        for run in range(6)
        for method, e2e in (("vanilla", 10.0), ("flashmem", 12.5))
    ]
    append(tmp_path, rows)
    paths = build_report(tmp_path)
    assert len(build_tables(ResultStore(tmp_path))["latency"]) == 12
    assert "1.25 [1.25, 1.25]" in paths.html.read_text()


def test_report_without_results_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="no results in"):
        build_report(tmp_path / "absent")
    assert not (tmp_path / "absent").exists()
    (tmp_path / "runs").mkdir()
    with pytest.raises(StoreError, match="no results in"):
        build_report(tmp_path)


# Console


def printed(table: object, width: int) -> str:
    stream = io.StringIO()
    Console(file=stream, width=width).print(table)
    return stream.getvalue()


def test_console_table_shows_scores_with_intervals(full: SimpleNamespace) -> None:
    text = printed(runs_table(full.tables["runs"]), 200)
    run = one_row(full.tables["runs"], suite="hops", method="flashmem")
    assert say.percent_interval(run["score"], run["score_low"], run["score_high"]) in text
    assert "CPU timing" in text
    assert text.count("flashmem-mean-memory") == 2


@pytest.mark.parametrize("width", [80, 100, 140])
def test_console_table_fits_its_terminal(full: SimpleNamespace, width: int) -> None:
    text = printed(runs_table(full.tables["runs"], width=width), width)
    assert "\u2026" not in text
    assert "flashmem-separate-encoder" in text
    assert ("vs vanilla" in text.splitlines()[3]) == (width >= 100)
    assert "2.4 *" in printed(ablation_table(full.tables["ablations"], width=width), width)


def test_numbers_are_worded_without_false_zeros() -> None:
    assert say.percent_interval(None, None, None) == say.number(float("nan")) == say.points(pd.NA) == "-"
    assert say.points(-0.0001) == "0.0"
    assert say.number(0.000123) == "0.000123"
    assert say.number(1234.5) == "1234"
    assert say.share(0.004) == "0.4 %"
    assert say.p_value(1e-9) == "< 0.001"


def test_importing_the_report_package_is_cheap() -> None:
    code = (
        "import sys, flashmem_bench.report\n"
        "print([m for m in ('torch', 'pandas', 'matplotlib', 'jinja2') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_unequal_cells_are_compared_only_when_asked_for_and_then_marked(tmp_path: Path) -> None:
    store = ResultStore(tmp_path)
    add_cell(store, "wordmath", "vanilla", n=6)
    add_cell(store, "wordmath", "flashmem", n=6, dtype="bfloat16")
    assert build_tables(store)["comparisons"].empty
    build_report(tmp_path, unequal=True)
    told = pd.read_csv(tmp_path / "tables/comparisons.csv")
    assert list(told["b"]) == ["vanilla"]
    assert "bfloat16" in told["unequal"][0] and "float32" in told["unequal"][0]
