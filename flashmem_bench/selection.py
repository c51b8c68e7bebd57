"""Which samples of a suite a run takes: the first so many, of the first so many sessions, so many of each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from flashmem_bench.errors import UsageError
from flashmem_bench.shards import split

if TYPE_CHECKING:
    from flashmem_bench.samples import Sample
    from flashmem_bench.session import Request


def of_sessions(request: Request) -> bool:
    """Return whether a request counts sessions or their questions."""
    return request.limit_sessions is not None or request.questions_per_session is not None


def chosen(request: Request, sessions: Sequence[str | None], suite: str) -> list[int]:
    """Return the indices of the samples that a request wants, in the suite's order.

    Args:
        request: `limit`, `limit_sessions` and `questions_per_session`; a sample must be within all that are set.
        sessions: The session of each sample of the suite.
        suite: Its name, for the message.

    Raises:
        UsageError: Sessions are counted and the suite has none.
    """
    total = min(request.limit or len(sessions), len(sessions))
    if not of_sessions(request):
        return list(range(total))
    if any(session is None for session in sessions):
        raise UsageError(
            f"{suite} has no sessions, so --limit-sessions and --questions-per-session mean nothing there; use --limit"
        )
    asked: dict[str | None, int] = {}
    indices = []
    for index, session in enumerate(sessions[:total]):
        asked[session] = asked.get(session, 0) + 1
        few = request.limit_sessions is None or len(asked) <= request.limit_sessions
        if few and asked[session] <= (request.questions_per_session or total):
            indices.append(index)
    return indices


def batches_of(request: Request, sessions: Sequence[str | None], suite: str) -> tuple[list[int], list[list[int]]]:
    """Return the indices that a request wants, and the batches of the suite's order that hold them.

    A batch may reach beyond the limit: it has the same members whatever the limit is.
    """
    wanted = chosen(request, sessions, suite)
    if of_sessions(request):
        return wanted, [[index] for index in wanted]
    size = request.batch_size
    return wanted, [list(range(start, min(start + size, len(sessions)))) for start in range(0, len(wanted), size)]


def share_of(
    request: Request, batches: list[list[int]], wanted: Sequence[int], samples: Sequence[Sample]
) -> tuple[list[int], list[list[int]]]:
    """Return the indices and batches of `batches_of` that belong to the request's shard; all of them without one."""
    if request.shard is None:
        return list(wanted), batches
    mine = split(batches, samples, request.shard.count)[request.shard.index]
    inside = {index for batch in mine for index in batch}
    return [index for index in wanted if index in inside], mine
