"""Fixtures that several test modules share."""

from __future__ import annotations

from tests.bench_fixtures import bench

__all__ = ["bench"]
