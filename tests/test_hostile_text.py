"""A model, a data set and a suite that write hostile text: a run, its report and every command that shows it."""

from __future__ import annotations

import dataclasses
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flashmem_bench.cli import run as command
from flashmem_bench.report import build_report
from flashmem_bench.report.exports import guarded, latex, markdown
from flashmem_bench.report.tables import build_tables
from flashmem_bench.runner import run_grid
from flashmem_bench.session import Session
from flashmem_bench.store import ResultStore
from tests.hostile import FORMULA, MARKUP, PAGE, TERMINAL, TEXTS, obeyed
from tests.synthetic_results import add_cell, add_threshold_axis
from tests.test_story import made_trace, page_of

ALL = TERMINAL + MARKUP + PAGE + FORMULA + "$x_{$ "


class Page(HTMLParser):
    """What a browser would run or load."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.wild: list[tuple[str, str | None]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        loads = {"href", "src", "action", "formaction", "xlink:href"}
        self.wild += [
            (name, value)
            for name, value in attrs
            if name.startswith("on")
            or (name in loads and not str(value).startswith(("#", "data:image/", "stories/", "../")))
        ]


def assert_harmless(html: str) -> None:
    page = Page()
    page.feed(html)
    assert not {"script", "iframe", "object", "embed", "base", "form"} & set(page.tags) and not page.wild
    assert not obeyed(html)


def results_of_a_hostile_model(root: Path) -> ResultStore:
    """Cells whose every text is hostile: names, settings, ids, prompts, answers, errors."""
    store, suite = ResultStore(root), f"s{ALL}"
    common: dict[str, Any] = {"model": f"m{ALL}", "answer_extracted": FORMULA, "stratum": None}
    for method in ("vanilla", "flashmem", "flashmem-noop-memory", f"own {ALL}"):
        add_cell(store, suite, method, 30, text=ALL, settings={"memory.checkpoint": ALL}, **common)
    add_cell(store, suite, "flashmem-literal", 3, error=f"ValueError: {ALL}", score=None, **common)
    add_threshold_axis(store, suite, 12)
    return store


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("hostile")
    results_of_a_hostile_model(root)
    build_report(root)
    return root


def test_the_page_runs_and_loads_nothing(hostile: Path) -> None:
    html = (hostile / "report.html").read_text(encoding="utf-8")
    assert_harmless(html)
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in html and "49" not in html.partition("{{7*7}}")[0][-20:]


def test_figures_are_well_formed_and_hold_no_code(hostile: Path) -> None:
    figures = list(hostile.glob("figures/*.svg"))
    assert figures
    for path in figures:
        tree = ElementTree.parse(path)
        tags = {element.tag.rpartition("}")[2] for element in tree.iter()}
        assert not tags & {"script", "foreignObject", "image", "a"}, path


def test_no_spreadsheet_finds_a_formula(hostile: Path) -> None:
    tables = list(hostile.glob("tables/*.csv"))
    assert tables
    seen = False
    for path in tables:
        for cell in pd.read_csv(path, dtype=str, keep_default_na=False).to_numpy().flatten():
            plain = cell.lstrip()
            numeric = plain.strip("+-.0123456789e%") == ""
            assert numeric or not plain.startswith(("=", "+", "-", "@")), (path, cell)
            seen = seen or cell.startswith("'=")
    assert seen, "a formula was there, and is marked"
    kept = pd.read_parquet(hostile / "tables" / "samples.parquet")
    assert FORMULA in set(kept["answer_extracted"]), "parquet has every text as it was"


@pytest.mark.parametrize(
    "line", ["report", "report --json", "list runs", "list runs --json", "verify", "compare flashmem vanilla",
             "compare flashmem vanilla --json", "regrade"],
)  # fmt: skip
def test_no_command_lets_it_steer_the_terminal(line: str, hostile: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command([*line.split(), "--results-dir", str(hostile)]) in (0, 1, 2, 3)
    captured = capsys.readouterr()
    assert captured.out + captured.err and not obeyed(captured.out + captured.err)
    assert "unexpected" not in captured.err


def test_a_run_of_a_hostile_model_shows_it_as_text(bench, tmp_path: Path, capsys, monkeypatch) -> None:
    from flashmem_bench.cli.run import conclude
    from flashmem_bench.methods.latent import LatentMethod
    from flashmem_bench.progress import Bar

    whole = LatentMethod.generate

    def generate(self: Any, *arguments: Any, **more: Any) -> Any:
        (made,) = whole(self, *arguments, **more)
        if arguments[1][0].sample_id.endswith("1"):
            raise ValueError(ALL)
        return [dataclasses.replace(made, text=ALL)]

    monkeypatch.setattr(LatentMethod, "generate", generate)
    results = bench.results(tmp_path / "results")
    request = bench.request(results, "hops", "vanilla,flashmem", limit=2)
    found = run_grid(request, progress=Bar(), session=Session(request, bench.backbone, bench.suites))
    for json in (False, True):
        assert conclude(request, found, json=json, quiet=False) == 3
    assert command(["report", "--results-dir", str(results)]) == 0
    captured = capsys.readouterr()
    assert "alert(1)" in captured.err and not obeyed(captured.out + captured.err)
    assert_harmless((results / "report.html").read_text(encoding="utf-8"))


@pytest.mark.parametrize("text", TEXTS)
def test_a_story_of_hostile_tokens_is_harmless(text: str, tmp_path: Path) -> None:
    trace = made_trace(text, [text, "a", text])
    trace.update(gold=text, model=text)
    assert_harmless(page_of(tmp_path, trace))


@given(st.text(st.characters(codec=None), max_size=30))
def test_print_tables_have_one_line_a_row(text: str) -> None:
    made = markdown(["a"], [[text]]), latex(["a"], [[text]])
    assert [len(form.splitlines()) for form in made] == [3, 7]
    assert "<script" not in markdown(["a"], [[f"{text}<script>"]])


@given(st.lists(st.one_of(st.none(), st.text(max_size=8), st.floats(allow_nan=False).map(str)), min_size=1))
def test_guarding_marks_formulas_and_leaves_all_else(texts: list[str | None]) -> None:
    table = pd.DataFrame({"text": pd.Series(texts, dtype="string"), "number": 1.5})
    made = guarded(table)
    for before, after in zip(texts, made["text"], strict=True):
        if before is None:
            assert pd.isna(after)
        else:
            assert after in (before, f"'{before}") and not after.startswith(("=", "@"))
    assert made["number"].equals(table["number"])


def test_tables_of_hostile_cells_are_made(hostile: Path) -> None:
    assert len(build_tables(ResultStore(hostile))["runs"]) >= 5
