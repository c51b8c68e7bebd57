"""A second pass over finished samples that keeps the story of each: `run --trace`.

A traced generation takes longer, so its times must not reach a row. The rows are therefore left alone: after a cell has
run, its first samples are generated once more under a recorder, one at a time and with the seeds of the run, and each
must give the tokens and triggers of its stored row. What the recorder saw becomes one JSON document a sample,
`<cell>/traces/<sample id>.json`, written whole or not at all. A sample that has its trace already is passed over.

A sample of a batch is traced alone too. In float32 its answer is the same; in a narrower type the sums of a batch are
rounded in another order, and where two tokens are too close to call for that, there is no trace.

The text in a trace is what a model wrote: data, never to be trusted as markup or as a path.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flashmem_bench.cell_store import CellStore
from flashmem_bench.durable import make_folder, replace, write_failure
from flashmem_bench.errors import BenchError, StoreError
from flashmem_bench.places import safe_name
from flashmem_bench.samples import sample_seed

if TYPE_CHECKING:
    from flashmem_bench.prepare import Prepared
    from flashmem_bench.runner import CellResult
    from flashmem_bench.session import Session
    from flashmem_bench.tasks import Sample

TRACE_VERSION = 1
DEFAULT_SAMPLES = 8


def trace_cells(
    session: Session, results: Sequence[CellResult], count: int, note: Callable[[str], None] = lambda text: None
) -> list[Path]:
    """Trace the first samples of finished cells.

    Args:
        session: The loaded parts of the run that made the cells.
        results: What `run_grid` returned.
        count: The first so many samples of each cell; those that ended in an error have no story.
        note: Told what takes a while.

    Returns:
        The files of all those samples, old ones included.

    Raises:
        BenchError: A sample no longer gives what its row says, or its method cannot be traced.
    """
    stored = {cell.cell_id: cell for cell in session.store.cells()}
    by_name = {(result.suite, result.method): stored.get(result.cell) for result in results}
    paths: list[Path] = []
    for result in results:
        cell = stored.get(result.cell)
        if cell is not None:
            paths += _Pass(session, result, cell, by_name).run(count, note)
    return paths


def trace_path(cell: Path, sample_id: str) -> Path:
    """Where the trace of a sample lies; no id can lead out of the folder."""
    return cell / "traces" / f"{safe_name(sample_id)}.json"


def read_traces(cell: Path) -> list[dict[str, Any]]:
    """Return the traces of a cell in suite order.

    Raises:
        StoreError: A file that is no trace of this version.
    """
    documents = []
    for path in sorted((cell / "traces").glob("*.json")):
        document = _read(path)
        if document is None:
            raise StoreError(f"{path} is no trace of this version; delete it and run the same command with --trace")
        documents.append(document)
    return sorted(documents, key=lambda document: (document["index"], document["sample_id"]))


class _Pass:
    """The second pass over one cell."""

    def __init__(
        self,
        session: Session,
        result: CellResult,
        cell: CellStore,
        by_name: dict[tuple[str, str], CellStore | None],
    ):
        self.session, self.result, self.cell, self.by_name = session, result, cell, by_name
        self.name = f"{result.suite} x {result.method}"

    def run(self, count: int, note: Callable[[str], None]) -> list[Path]:
        if self.session.suite(self.result.suite).given_answers:
            note(f"{self.name} has no stories: given answers are judged and no text is written")
            return []
        done = [row for row in self.result.rows if row.get("error") is None and row["index"] < count]
        paths = {row["sample_id"]: trace_path(self.cell.path, row["sample_id"]) for row in done}
        missing = {name for name, path in paths.items() if _read(path) is None}
        if missing:
            note(f"tracing {len(missing)} samples of {self.name}")
            self._trace(missing, count)
        return list(paths.values())

    def _trace(self, missing: set[str], count: int) -> None:
        from flashmem_bench.matching import reference_for
        from flashmem_bench.methods.latent import LatentMethod
        from flashmem_bench.prepare import prepare
        from flashmem_bench.registry import get_method

        suite, spec = self.result.suite, get_method(self.result.method)
        matched_to = self.by_name.get((suite, spec.reference)) if spec.reference else None
        reference = reference_for(self.session, suite, spec, matched_to.cell_id if matched_to else None)
        prepared = prepare(self.session, suite, self.result.method, reference)
        if prepared.cell != self.cell.cell_id:
            raise BenchError(f"the settings of {self.name} no longer name its cell; run the same command again")
        method = prepared.spec.make(prepared.context)
        if not isinstance(method, LatentMethod):
            raise BenchError(f"{self.result.method} cannot be traced: it does not decode with the library's loop")
        texts, samples = self.cell.texts(), prepared.suite.samples(self.session.request.split)
        for index in range(min(count, self.session.request.limit or len(samples), len(samples))):
            if samples[index].sample_id in missing:
                self._trace_sample(prepared, method, index, samples[index], texts[samples[index].sample_id])

    def _trace_sample(
        self, prepared: Prepared, method: Any, index: int, sample: Sample, stored: dict[str, Any]
    ) -> None:
        from flashmem.trace import TraceRecorder
        from flashmem_bench.rows import make_prompt, text_record

        context = prepared.context
        budget, truncate = context.generation["max_new_tokens"], self.session.request.truncate
        prompt = make_prompt(context.backbone, sample.prompt, truncate, budget).ids
        recorder, seed = TraceRecorder(), sample_seed(context.seed, sample.sample_id)
        (generation,) = method.generate([prompt], [sample], None, seed, recorder=recorder)
        self._require_same(text_record(sample, generation, context.backbone), stored)
        head = {
            "schema_version": TRACE_VERSION,
            **{key: prepared.common[key] for key in ("cell", "suite", "method", "model")},
            "sample_id": sample.sample_id,
            "index": index,
            "gold": sample.answer,
        }
        (trace,) = recorder.samples
        _write(trace_path(self.cell.path, sample.sample_id), {**head, **trace.to_json()})

    def _require_same(self, again: dict[str, Any], stored: dict[str, Any]) -> None:
        places = [[trigger["text_index"] for trigger in record["triggers"]] for record in (again, stored)]
        if again["tokens"] == stored["tokens"] and places[0] == places[1]:
            return
        pairs = enumerate(zip(again["tokens"], stored["tokens"], strict=False))
        first = next((place for place, (ours, theirs) in pairs if ours != theirs), None)
        where = "the memories" if first is None else f"token {first + 1}"
        together = self.session.request.batch_size
        if together > 1:
            raise BenchError(
                f"sample {stored['sample_id']} of {self.name} does not give alone what it gave in a batch of "
                f"{together} (they part at {where}), so its trace would be of another answer; trace a cell of "
                "--batch-size 1"
            )
        raise BenchError(
            f"sample {stored['sample_id']} of {self.name} no longer gives its stored answer (they part at {where}), so "
            "its trace would be of another answer; its row comes from another machine or version: run it into a new "
            "--results-dir to trace it"
        )


def _read(path: Path) -> dict[str, Any] | None:
    """A trace of this version, else None."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    whole = isinstance(document, dict) and document.get("schema_version") == TRACE_VERSION
    return document if whole and {"sample_id", "index", "steps"} <= document.keys() else None


def _write(path: Path, document: dict[str, Any]) -> None:
    # ASCII alone, because a tokenizer can produce a lone surrogate, which has no UTF-8 form.
    content = json.dumps(document, allow_nan=False).encode("ascii") + b"\n"
    try:
        make_folder(path.parent)
        replace(path, content)
    except OSError as error:
        raise write_failure(path, error, "the rows are safe") from error
