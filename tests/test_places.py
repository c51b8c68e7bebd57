"""No name and no link leads out of a results folder, whatever it holds."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from flashmem_bench.checkpoints import checkpoint_folder
from flashmem_bench.cli import run as command
from flashmem_bench.errors import StoreError
from flashmem_bench.places import file_stem, folder_name, require_own, safe_name
from flashmem_bench.store import ResultStore
from flashmem_bench.thresholds import threshold_folder
from flashmem_bench.tracing import trace_path
from tests.synthetic_results import make_results

NASTY = ["..", ".", "", "/", "../../up", "/etc/passwd", "a/b", "a\\b", "C:\\x", "\x00", "a\nb", "~", "~root", "-rf",
         "x" * 400, "\u00fc\u202e?*", "lm-eval/..", "$(id)", "`id`", "\ud800", ".hidden", "a" * 80 + "b"]  # fmt: skip
NAME = st.one_of(st.sampled_from(NASTY), st.text(st.characters(codec=None), max_size=120),
                 st.text("./\\~ab\x00", max_size=20))  # fmt: skip
# Nothing can be written below a file of the system.
ROOT = Path("/dev/null/results")


def one_plain_part(name: str) -> bool:
    """Whether a name is a single component that any file system takes."""
    plain = all(letter.isascii() and (letter.isalnum() or letter in "._-") for letter in name)
    return bool(name) and plain and not name.startswith(".") and len(name) <= 200


@given(NAME)
def test_every_name_becomes_one_plain_part(name: str) -> None:
    for made in (safe_name(name), folder_name(name), file_stem(name, name, name), trace_path(ROOT, name).stem):
        assert one_plain_part(made), made


@given(NAME, NAME, NAME)
@example("..", "..", "flashmem")
def test_folders_of_models_suites_and_methods_stay_below_the_results(model: str, suite: str, method: str) -> None:
    # The model is the name of a folder that is not there: one that is gives its own last part.
    for path, depth in (
        (checkpoint_folder(ROOT, f"none/{model}", suite, method, 0), 5),
        (threshold_folder(ROOT, f"none/{model}", suite), 3),
    ):
        parts = path.relative_to(ROOT).parts
        assert len(parts) == depth and all(one_plain_part(part) for part in parts), path


@given(st.lists(NAME, min_size=3, max_size=3), st.lists(NAME, min_size=3, max_size=3))
def test_long_names_that_differ_stay_apart(one: list[str], other: list[str]) -> None:
    # A dash may stand for the border between two names; what is cut must not make two of one.
    assert "-".join(map(safe_name, one)) == "-".join(map(safe_name, other)) or file_stem(*one) != file_stem(*other)


@given(NAME, NAME)
def test_cells_lie_where_cells_lie(suite: str, method: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("flashmem_bench.cell_store.CellStore.describe", lambda *_: None)
        patch.setattr("flashmem_bench.store.ResultStore.__init__", lambda self, root: setattr(self, "root", root))
        if suite and method:
            cell = ResultStore(ROOT).open_cell({"suite": suite}, {"suite": suite, "method": method})
            assert cell.path.relative_to(ROOT / "runs").parts[2] == cell.cell_id
            assert all(one_plain_part(part) for part in cell.path.relative_to(ROOT).parts)


def test_figures_and_stories_of_nasty_names_stay_in_the_report(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from flashmem_bench.report import build_report

    root = tmp_path / "inner" / "results"
    names = ["../../../up", "/etc/x", "y" * 300, "..", "a\\b"]
    make_results(root, suites=names, methods=("vanilla", "flashmem"), n=3)
    build_report(root)
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert written and all(root in path.parents for path in written)
    assert len([path for path in written if path.name.startswith("score-latency-")]) == 2 * len(names)


def _link(folder: Path, name: str, target: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).symlink_to(target)


@pytest.mark.parametrize(
    "where", ["runs", "runs/hops", "runs/hops/vanilla/0123", "runs/hops/vanilla/0123/samples.jsonl", "tables",
              "latency/runs.jsonl", "banks/x.safetensors", "report.html.tmp", "SCHEMA.json", "self-answers"],
)  # fmt: skip
def test_a_link_out_of_the_results_is_refused_before_anything_is_written(where: str, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    target = outside / "file" if "." in Path(where).name else outside
    if target != outside:
        target.write_text("mine")
    root = tmp_path / "results"
    _link((root / where).parent, Path(where).name, target)
    with pytest.raises(StoreError, match=r"leads out of the results folder, to .*outside"):
        ResultStore(root)
    assert [path.name for path in outside.iterdir()] in ([], ["file"])
    assert target == outside or target.read_text() == "mine"


def test_links_that_stay_inside_and_a_linked_results_folder_are_fine(tmp_path: Path) -> None:
    real = tmp_path / "disk"
    make_results(real, suites=("hops",), methods=("vanilla",), n=1)
    (real / "latest").symlink_to(real / "runs")
    (tmp_path / "results").symlink_to(real)
    assert len(ResultStore(tmp_path / "results").cells()) == 1


def test_lent_memories_are_read_and_never_trained_into(bench, tmp_path: Path, capsys) -> None:
    results = bench.results(tmp_path / "results")
    for part in ("checkpoints", "thresholds"):
        os.rename(results / part, tmp_path / part)
        (results / part).symlink_to(tmp_path / part)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    (cell,) = bench.run(results, "hops", "flashmem", limit=1)
    assert cell.status == "complete"
    more = ["--suite", "hops", "--model", str(bench.model), "--results-dir", str(results), "--quiet"]
    for line in (["train", "--method", "flashmem", "--steps", "1", *more], ["calibrate", "--limit", "1", *more]):
        assert command(line) == 1
        assert "leads out of the results folder" in capsys.readouterr().err
    assert {
        path: path.stat().st_mtime_ns for path in before if results not in (path, *path.parents)
    }.items() <= before.items()


def test_a_link_in_the_folder_of_a_memory_is_found_there(tmp_path: Path) -> None:
    folder, outside = tmp_path / "results/checkpoints/m/hops/flashmem/seed0", tmp_path / "mine"
    outside.write_text("mine")
    _link(folder, "config.json.partial", outside)
    with pytest.raises(StoreError, match="partial leads out"):
        require_own(tmp_path / "results", folder)
    require_own(tmp_path / "other", folder)


def test_a_suite_file_of_dots_names_no_parent(tmp_path: Path) -> None:
    from flashmem_bench.suites import find_suite

    path = tmp_path / "...yaml"
    path.write_text("task: x\n")
    name = find_suite(str(path)).name
    assert name == ".." and checkpoint_folder(ROOT, "m/n", name, "flashmem", 0).parts[-3] not in (".", "..")
