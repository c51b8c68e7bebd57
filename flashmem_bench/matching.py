"""Which cell a method is matched to, when the samples are all here and when they are a shard.

A match within each sample needs what the reference did in that sample alone, so a shard runs it itself. A match over
all samples needs all of them: a shard then takes the reference from the results folder into which shards are merged.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from flashmem_bench.errors import BenchError
from flashmem_bench.prepare import Reference, read_reference
from flashmem_bench.selection import chosen
from flashmem_bench.settings import Settings
from flashmem_bench.store import ResultStore

if TYPE_CHECKING:
    from flashmem_bench.methods.base import MethodSpec
    from flashmem_bench.session import Session
    from flashmem_bench.store import CellStore


def needs_all(spec: MethodSpec, how: str) -> bool:
    """Return whether a method is matched to its reference over all samples under `--match how`."""
    return spec.match is not None and bool(spec.match(how, Settings(), {}))


def reference_for(session: Session, suite: str, spec: MethodSpec, cell: str | None) -> Reference | None:
    """Return what a method is matched to; None where it is matched to nothing.

    Args:
        session: The loaded parts.
        suite: Name of the suite.
        spec: The method.
        cell: Id of the reference's cell.

    Raises:
        BenchError: The samples are a shard, the match is over all of them, and not all are merged yet.
    """
    if cell is None:
        return None
    request = session.request
    whole = request.shard is not None and needs_all(spec, request.match)
    store = ResultStore(request.results_dir) if whole else session.store
    found = next((entry for entry in store.cells() if entry.cell_id == cell), None)
    if whole:
        _require_all(session, suite, spec, found)
    return read_reference(session, suite, found) if found is not None else None


def _require_all(session: Session, suite: str, spec: MethodSpec, found: CellStore | None) -> None:
    samples = session.suite(suite).samples(session.request.split)
    wanted = {samples[index].sample_id for index in chosen(session.request, samples.sessions(), suite)}
    there = len(wanted & found.done()) if found is not None else 0
    if there < len(wanted):
        folder = session.request.results_dir
        raise BenchError(
            f"{spec.name} is matched to all samples of {suite} x {spec.reference}, and {folder} has {there} of "
            f"{len(wanted)}; when every shard has come this far, run flashmem-bench merge --results-dir {folder} and "
            "then this command again"
        )
