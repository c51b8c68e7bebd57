"""Tables for print: every value of them stands in the csv files too, and odd letters survive."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from flashmem_bench.report.exports import latex, markdown, write_exports
from flashmem_bench.report.tables import build_tables
from tests.synthetic_results import make_results


def test_scores_are_those_of_the_runs_table(tmp_path: Path) -> None:
    store = make_results(tmp_path / "r", suites=["hops"], methods=["vanilla", "flashmem", "flashmem-noop-memory"], n=40)
    tables = build_tables(store)
    paths = {path.name for path in write_exports(tables, tmp_path / "t")}
    assert paths == {f"{name}.{kind}" for name in ("scores", "comparisons", "claims") for kind in ("md", "tex")}
    lines = (tmp_path / "t/scores.md").read_text().splitlines()
    rows = pd.DataFrame([[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]])
    runs = tables["runs"][tables["runs"]["role"] == "main"]
    assert list(rows[1]) == list(runs["method"])
    assert [float(text.split()[0]) for text in rows[4]] == [round(100 * score, 1) for score in runs["score"]]
    assert len((tmp_path / "t/claims.md").read_text().splitlines()) == 2 + len(tables["claims"])


def test_letters_that_mean_something_are_escaped() -> None:
    head, line = ["a_b", "c"], ["50 % & $x$", "p | q < r"]
    assert markdown(head, [line]).splitlines()[2] == r"| 50 % & $x$ | p \| q < r |"
    made = latex(head, [line])
    assert r"a\_b & c \\" in made and r"50 \% \& \$x\$ & p | q \textless{} r \\" in made
    assert made.count(r"\\") == 2 and made.startswith(r"\begin{tabular}{ll}")
