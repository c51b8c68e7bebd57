"""Fixtures that several test modules share, and the tally of injected faults (`--faults FILE`)."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.bench_fixtures import bench

__all__ = ["bench"]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--faults", default=None, metavar="FILE", help="append what each fault test injected and lost")


@pytest.fixture
def tally(request: pytest.FixtureRequest) -> Callable[..., None]:
    """Says how many faults of a kind a test injected, how many finished rows were lost and how many rows are wrong."""
    path = request.config.getoption("--faults")

    def count(kind: str, runs: int, lost: int = 0, wrong: int = 0) -> None:
        record = {"kind": kind, "runs": runs, "rows_lost": lost, "rows_wrong": wrong, "test": request.node.nodeid}
        if path is not None:
            with Path(path).open("a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
        assert (lost, wrong) == (0, 0), record

    return count
