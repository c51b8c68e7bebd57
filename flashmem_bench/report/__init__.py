"""Tables, figures and one self-contained page from a results folder.

``build_report`` reads the cells and writes ``tables/``, ``figures/``, ``stories/`` and ``report.html`` beside them. It
needs no model and no accelerator, changes no result, and gives the same files for the same cells. The heavy imports
wait until a report is built.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from flashmem_bench.errors import StoreError
from flashmem_bench.store import ResultStore

__all__ = ["ReportPaths", "build_report"]


@dataclass(frozen=True)
class ReportPaths:
    """What a report consists of.

    Attributes:
        html: the page.
        tables: parquet, csv, Markdown and LaTeX files.
        figures: png and svg files.
        stories: pages of single samples.
        warnings: what a reader must know before comparing, also on the page.
    """

    html: Path
    tables: list[Path]
    figures: list[Path]
    stories: list[Path]
    warnings: list[str]


def build_report(results_dir: Path, *, unequal: bool = False) -> ReportPaths:
    """Build the report of a results folder, replacing an older one.

    Args:
        results_dir: the folder.
        unequal: compare cells whose prompts, token budget, attention, dtype or other conditions differ, and say so.

    Raises:
        StoreError: the folder holds no results, cannot be written, or has another schema.
    """
    root = Path(results_dir)
    nothing = f"no results in {root} yet; make some with flashmem-bench run --suite wordmath --method flashmem"
    if not (root / "runs").is_dir():
        raise StoreError(nothing)
    from flashmem_bench.claims import pinned
    from flashmem_bench.latency import read_rows
    from flashmem_bench.report.benefit_figures import draw_benefit
    from flashmem_bench.report.cells import load_cells
    from flashmem_bench.report.compare import comparison_warnings
    from flashmem_bench.report.cost_figures import draw_latency
    from flashmem_bench.report.exports import write_exports
    from flashmem_bench.report.figures import draw_all
    from flashmem_bench.report.html import render
    from flashmem_bench.report.outcome_figures import draw_outcomes
    from flashmem_bench.report.stories import write_stories
    from flashmem_bench.report.tables import tables_of, write_tables
    from flashmem_bench.report.traces import draw_traces
    from flashmem_bench.report.training import draw_training, training_records

    left_out: list[str] = []
    cells = load_cells(ResultStore(root), problems=left_out)
    if not cells:
        raise StoreError(left_out[0] if left_out else nothing)
    training = training_records(cells, root)
    tables = tables_of(cells, read_rows(root), training, unequal=unequal, margins=pinned(root))
    warnings = left_out + comparison_warnings(cells)
    drawings = [*draw_all(tables, root / "figures"), *draw_traces(cells, root / "figures")]
    drawings += draw_outcomes(cells, root / "figures")
    drawings += draw_benefit(tables["comparisons"], tables["runs"], root / "figures")
    drawings += draw_training(tables["training"], root / "figures") + draw_latency(tables["latency"], root / "figures")
    stories = write_stories(cells, root)
    page = root / "report.html"
    temporary = page.with_suffix(".html.tmp")
    temporary.write_text(render(cells, tables, drawings, warnings, stories), encoding="utf-8")
    temporary.replace(page)
    figures = [path for drawing in drawings for path in (drawing.svg.with_suffix(".png"), drawing.svg)]
    pages = [story.path for story in stories]
    written = write_tables(tables, root / "tables") + write_exports(tables, root / "tables")
    return ReportPaths(page, written, figures, pages, warnings)
