"""The matrix of methods and suites on the bundled backbone, whole or a share of it.

    make matrix SEED=3f2a9c1 SHARE=0.1

runs three samples of a tenth of the cells. Which ones follows from the seed alone, so the same command runs the same
cells anywhere; with a commit as the seed every commit looks at other ones, and a run of commits at all of them.
"""

from __future__ import annotations

import argparse
import hashlib
import shlex
import tempfile
from collections.abc import Sequence
from pathlib import Path

from flashmem_bench.cli import run as command
from flashmem_bench.registry import METHODS
from flashmem_bench.store import CellStore, ResultStore
from tests.bench_fixtures import SUITES, write_data

SAMPLES = 3
# What encodes positions again, or answers more than once, by design.
_ENCODES_MORE = ("memgen", "cot-sc")
# It has a bundled memory for hops alone, where it was chosen.
_ONLY_ON = {"flashmem-plus": ("hops",)}

Pair = tuple[str, str]


def pairs() -> list[Pair]:
    """Return every (suite, method) that the bundled backbone can run."""
    return [(suite, method) for suite in SUITES for method in METHODS if suite in _ONLY_ON.get(method, SUITES)]


def pick(seed: str, share: float, among: Sequence[Pair] | None = None) -> list[Pair]:
    """Return a share of the pairs, at least one, in the order of the matrix; the seed decides which."""
    every = list(pairs() if among is None else among)
    drawn = sorted(every, key=lambda pair: hashlib.sha256("|".join((seed, *pair)).encode()).digest())
    chosen = set(drawn[: max(1, round(share * len(every)))])
    return [pair for pair in every if pair in chosen]


def run_pairs(chosen: Sequence[Pair], folder: Path) -> None:
    """Run the cells, and those that they are judged by, then check every row of them."""
    data = write_data(folder / "data")
    where = ["--data-dir", str(data), "--results-dir", str(folder / "results"), "--quiet"]
    for suite in dict.fromkeys(suite for suite, _ in chosen):
        methods = dict.fromkeys(["vanilla", *(method for other, method in chosen if other == suite)])
        line = ["run", "--suite", suite, "--method", ",".join(methods), "--limit", str(SAMPLES), *where]
        assert command(line) == 0, f"flashmem-bench {' '.join(line)} failed"
    cells = {(cell.get("suite"), cell.get("method")): cell for cell in ResultStore(folder / "results").cells()}
    for suite, method in chosen:
        check_cell(cells[suite, method], cells[suite, "vanilla"])


def check_cell(cell: CellStore, plain: CellStore) -> None:
    """Every sample has its row, positions add up, and texts equal to vanilla's have their reason."""
    suite, method = cell.get("suite"), cell.get("method")
    rows, texts, others = cell.rows(), cell.texts(), plain.texts()
    assert len(rows) == SAMPLES and not any(row["error"] for row in rows), (suite, method)
    for row in rows:
        once = row["prompt_tokens"] + row["output_tokens"] - 1 + row["latent_tokens"]
        more = method in _ENCODES_MORE and row["positions_encoded"] > once
        assert row["positions_encoded"] == once or more, (suite, method, row["sample_id"])
    same = all(texts[row["sample_id"]]["text"] == others[row["sample_id"]]["text"] for row in rows)
    if same and method != "vanilla":
        assert cell.manifest["summary"]["why_equal"], (suite, method)


def main() -> None:
    """Pick, say what was picked and how to run it again, run it."""
    parser = argparse.ArgumentParser(description="Run a share of the matrix of methods and suites.")
    parser.add_argument("--seed", default="", help="any text, such as a commit; it decides which cells")
    parser.add_argument("--share", type=float, default=1.0, help="of all cells, above 0 up to 1 (1)")
    parser.add_argument("--list", action="store_true", help="say which cells and run none")
    asked = parser.parse_args()
    if not 0 < asked.share <= 1:
        parser.error(f"--share must be above 0 and at most 1, not {asked.share:g}")
    chosen = pick(asked.seed, asked.share)
    print(f"{len(chosen)} of {len(pairs())} cells of the matrix: {', '.join(' x '.join(pair) for pair in chosen)}")
    print(f"the same again: make matrix SEED={shlex.quote(asked.seed)} SHARE={asked.share:g}", flush=True)
    if not asked.list:
        with tempfile.TemporaryDirectory() as folder:
            run_pairs(chosen, Path(folder))
        print(f"all {len(chosen)} cells are as they should be")


if __name__ == "__main__":
    main()
