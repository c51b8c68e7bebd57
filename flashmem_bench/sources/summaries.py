"""Summaries of long texts: reports, chapters, meetings. `gold` is the reference summary."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from flashmem_bench.data import Doc, Splits, SuiteFiles, suite_folder, text_field
from flashmem_bench.hub import NotOnHubError, hub_rows


def govreport(*, data_dir=None, skip_bad_rows: bool = False, **_: Any) -> Splits:
    """GovReport from `govreport/{train,validation,test}.jsonl[.gz]` or `ccdv/govreport-summarization`.

    A folder without the published test file may hold `leval_sample` in its place, 13 reports of the test split; the
    ids of the samples name the file that they come from.
    """
    folder = suite_folder("govreport", data_dir)
    whole = folder is None or any((folder / f"test{ending}").is_file() for ending in (".jsonl", ".jsonl.gz"))
    stems = {"train": "train", "validation": "validation", "test": "test" if whole else "leval_sample"}
    files = SuiteFiles(
        "govreport",
        stems,
        _govreport_doc,
        lambda name: hub_rows("ccdv/govreport-summarization", "document", name),
        data_dir,
        skip_bad_rows,
    )
    return _splits("govreport", files, stems)


def _govreport_doc(row: Doc) -> Doc:
    return {"report": text_field(row, "report"), "gold": text_field(row, "summary").strip(), "stratum": None}


def booksum(*, data_dir=None, skip_bad_rows: bool = False, **_: Any) -> Splits:
    """BookSum's chapters from `booksum/{train,validation,test}.jsonl[.gz]` or `kmfoda/booksum`."""
    stems = {name: name for name in ("train", "validation", "test")}
    files = SuiteFiles(
        "booksum", stems, _booksum_doc, lambda name: hub_rows("kmfoda/booksum", None, name), data_dir, skip_bad_rows
    )
    return _splits("booksum", files, stems)


def _booksum_doc(row: Doc) -> Doc:
    book = row.get("bid") or row.get("book_id")
    return {
        "chapter": text_field(row, "chapter"),
        "gold": text_field(row, "summary_text").strip(),
        # One chapter may have summaries of several sites, and chapters of one book share their story.
        "cluster": f"booksum-{book}" if book is not None else None,
        "stratum": row.get("source") if isinstance(row.get("source"), str) else None,
    }


def _splits(suite: str, files: SuiteFiles, stems: Mapping[str, str]) -> Splits:
    """Three files as splits; calibration is the validation file."""

    def loader(name: str) -> Callable[[], list[Doc]]:
        return lambda: [{**doc, "id": f"{suite}-{stems[name]}-{number:05d}"} for number, doc in files.rows(name)]

    loaders = {name: loader(name) for name in stems}
    return Splits(suite, {**loaders, "calibration": loaders["validation"]}, lambda: files.bad_rows)


def qmsum(*, data_dir=None, skip_bad_rows: bool = False, **_: Any) -> Splits:
    """QMSum from `qmsum/{train,validation,test}.jsonl[.gz]`, the authors' files: one document a query.

    Every query has its whole meeting before it, and the queries of a meeting are a cluster. Samples go round the
    meetings, so that any first n cover them evenly.
    """
    stems = {name: name for name in ("train", "validation", "test")}
    files = SuiteFiles("qmsum", stems, _qmsum_meeting, _qmsum_from_hub, data_dir, skip_bad_rows)

    def loader(name: str) -> Callable[[], list[Doc]]:
        return lambda: _in_turn([_queries(f"qmsum-{name}-{number:03d}", meeting, number)
                                 for number, meeting in files.rows(name)])  # fmt: skip

    loaders = {name: loader(name) for name in stems}
    return Splits("qmsum", {**loaders, "calibration": loaders["validation"]}, lambda: files.bad_rows)


def _queries(meeting_id: str, meeting: Doc, first: int) -> list[Doc]:
    """Return the documents of a meeting, from its query `first` on and round, so that not all begin with a general."""
    docs = [
        {**query, "id": f"{meeting_id}-{turn:02d}", "meeting": meeting["meeting"], "cluster": meeting_id}
        for turn, query in enumerate(meeting["queries"], start=1)
    ]
    start = first % len(docs)
    return docs[start:] + docs[:start]


def _in_turn(groups: Sequence[Sequence[Doc]]) -> list[Doc]:
    return [doc for round_ in itertools.zip_longest(*groups) for doc in round_ if doc is not None]


def _qmsum_meeting(row: Doc) -> Doc:
    """Return the transcript, one line a turn, and the queries, general ones first."""
    turns = row.get("meeting_transcripts")
    if not isinstance(turns, list) or not turns:
        raise ValueError("the field 'meeting_transcripts' is missing or not a list of turns")
    lines = [f"{text_field(turn, 'speaker').strip()}: {str(turn.get('content', '')).strip()}" for turn in turns]
    queries = [
        {"query": text_field(query, "query").strip(), "gold": text_field(query, "answer").strip(), "stratum": kind}
        for kind in ("general", "specific")
        for query in row.get(f"{kind}_query_list") or []
    ]
    if not queries:
        raise ValueError("the meeting has no query")
    return {"meeting": "\n".join(lines), "queries": queries}


def _qmsum_from_hub(name: str) -> list[Doc]:
    raise NotOnHubError(
        "its authors publish it on GitHub alone, as data/ALL/jsonl of Yale-LILY/QMSum (val is validation)"
    )
