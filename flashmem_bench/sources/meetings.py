"""QMSum (Zhong et al., 2021) as sessions: one meeting, its general and its specific queries.

Each query is put to the whole transcript, so that the queries of a meeting share it; the passages that the data marks
as relevant to a specific query are not used.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flashmem_bench.data import Doc, Splits, SuiteFiles, text_field
from flashmem_bench.hub import HubError
from flashmem_bench.sources.histories import newest_lines, whole_number

_KINDS = {"general": "general_query_list", "specific": "specific_query_list"}


def qmsum_session(
    *, data_dir=None, skip_bad_rows: bool = False, settings: Mapping[str, Any] | None = None, **_: Any
) -> Splits:
    """QMSum from `qmsum/{test,validation}.jsonl[.gz]`, one document a query, meeting after meeting.

    Args:
        data_dir: The data folder.
        skip_bad_rows: Leave broken rows out.
        settings: `history_words`: only the newest so many words of each transcript.
    """
    words = whole_number(settings, "history_words", None)
    names = {"test": "test", "validation": "validation"}
    files = SuiteFiles("qmsum", names, _meeting, _not_on_the_hub, data_dir, skip_bad_rows)

    def docs(name: str) -> list[Doc]:
        return [doc for number, row in files.rows(name) for doc in _queries(row, f"{name}-{number:03d}", words)]

    loaders = {"test": lambda: docs("test"), "validation": lambda: docs("validation")}
    return Splits("qmsum-session", {**loaders, "calibration": loaders["validation"]}, lambda: files.bad_rows)


def _not_on_the_hub(name: str) -> list[Doc]:
    raise HubError(
        "its authors publish no data set on the hub; take data/ALL/jsonl/test.jsonl and val.jsonl (as "
        "validation.jsonl) of github.com/Yale-LILY/QMSum"
    )


def _meeting(row: Doc) -> Doc:
    """Return `{"lines", "queries": [{"kind", "question", "gold"}]}`, checked."""
    turns = row.get("meeting_transcripts")
    if not isinstance(turns, list) or not turns:
        raise ValueError("the field 'meeting_transcripts' is missing or empty")
    lines = [
        (None, f"{text_field(turn, 'speaker')}: {' '.join(str(turn.get('content', '')).split())}") for turn in turns
    ]
    queries = []
    for kind, name in _KINDS.items():
        if not isinstance(row.get(name), list):
            raise ValueError(f"the field {name!r} is missing or not a list")
        for item in row[name]:
            queries.append({"kind": kind, "question": text_field(item, "query"), "gold": text_field(item, "answer")})
    return {"lines": lines, "queries": queries}


def _queries(row: Doc, meeting: str, words: int | None) -> list[Doc]:
    history = f"The transcript of a meeting.\n\n{newest_lines(row['lines'], words)}\n"
    return [
        {
            "id": f"{meeting}-{number:02d}",
            "session_id": meeting,
            "cluster": meeting,
            "history": history,
            "stratum": query["kind"],
            **query,
        }
        for number, query in enumerate(row["queries"], start=1)
    ]
