"""Many questions about one history: the history is encoded once and forked for each question.

The samples of a session follow each other in the suite, and each says with which text its prompt begins (`prefix`).
How many tokens of a prompt that text is cannot be read off the text, since a tokenizer may join the last letters of the
history with the first of the question, and a template puts its own tokens around both. So it is proved: the history
alone and the whole prompt go through the chat template, and what both begin with in common is the prefix. It may fall
short of the history by the template's end marks and a few tokens at the border, which are then encoded with the
question. Where it is less than half of either, the whole prompt is encoded as if there were no session.

The first question of a session pays for the prefix inside its own clock; each later one goes on from a fork of what is
kept and encodes the rest. A prefix that grows (a story that is told on between two questions) is continued, and the
question that first needs the new part pays for it. So every position of a session is in exactly one row. A run that
continues in the middle of a session first encodes, outside any clock, what the row before had left.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from flashmem.token_ids import common_length

if TYPE_CHECKING:
    from flashmem.generation import Generation
    from flashmem.state import DecodeState
    from flashmem_bench.rows import Prompt
    from flashmem_bench.samples import Sample
    from flashmem_bench.session import Request


@dataclass
class _Kept:
    """The prefix in the cache: its session, its ids, and a state with exactly these."""

    session: str
    ids: list[int]
    state: DecodeState


class PrefixKeeper:
    """Keeps the prefix of one session at a time.

    Args:
        method: Answers; says whether it can go on from a cache (`reuses_prefix`).
        request: Says whether it should.

    Attributes:
        why_not: Why nothing is reused at all; None where it is.
        unproven: Prompts that did not begin with their session's history.
    """

    def __init__(self, method: Any, request: Request):
        self.method, self.why_not, self.unproven = method, _why_not(method, request), 0
        self._kept: _Kept | None = None
        self._proved: dict[str, int | None] = {}
        self._head: tuple[str, list[int]] = ("", [])

    def arguments(
        self, group: Sequence[tuple[int, Sample]], prompt: Callable[[Sample], Prompt], before: Sample | None
    ) -> dict[str, Any]:
        """Return what `generate` is called with besides; runs outside the clock.

        Args:
            group: The sample, with its index; groups of several are not reused.
            prompt: Encodes the prompt of a sample.
            before: The sample before it in the suite; None at the beginning.
        """
        (_, sample), ids = group[0], prompt(group[0][1]).ids
        if self.why_not is not None or sample.session_id is None:
            return {}
        length = self._prove(sample, ids)
        if length is None:
            self.unproven += 1
            return {}
        missing = self._kept is None or self._kept.session != sample.session_id
        if missing and before is not None and before.session_id == sample.session_id:
            earlier = prompt(before).ids
            kept = self._prove(before, earlier)
            if kept is not None:
                self._keep(sample.session_id, earlier[:kept])
        return {"prefill": partial(self._prefill, sample.session_id, length)}

    def forget(self) -> None:
        """Let go of the prefix; the next question encodes it again, outside its clock where it is not the first."""
        self._kept = None

    def columns(self, sample: Sample, generation: Generation | None) -> dict[str, Any]:
        """Return the columns of a sample that belongs to a session."""
        if sample.session_id is None:
            return {}
        known = {"session_id": sample.session_id, "prefix_tokens": self._proved.get(sample.sample_id)}
        return known if generation is None else {**known, "prefix_reused": generation.positions_reused > 0}

    def summary(self) -> str | None:
        """Return why prefixes were not reused, in a sentence; None where all were."""
        if self.why_not is None and self.unproven:
            return f"{self.unproven} prompts do not begin with the tokens of their session's history"
        return self.why_not

    def _prove(self, sample: Sample, ids: list[int]) -> int | None:
        """Return how many tokens of the prompt are its session's history; None where that is not proved."""
        if sample.prefix is None:
            return None
        if self._head[0] != sample.prefix:
            self._head = sample.prefix, self.method.backbone.encode_chat(sample.prefix)
        head = self._head[1]
        length = common_length(head, ids[:-1])
        proved = length if 2 * length + 1 >= min(len(head), len(ids)) else None
        self._proved[sample.sample_id] = proved
        return proved

    def _prefill(self, session: str, length: int, prompts: list[list[int]]) -> DecodeState:
        """Encode what of a prompt is not kept yet, keep its prefix, and return a state of the whole prompt."""
        ids = prompts[0]
        held = self._keep(session, ids[:length])
        assert self._kept is not None
        backbone = self.method.backbone
        state = self._kept.state.fork()
        if len(self._kept.ids) > length:
            state.crop([length])
        state.encoded, state.reused = [length - held], [held]
        backbone.append(state, [ids[length:]])
        return state

    def _keep(self, session: str, prefix: list[int]) -> int:
        """Have a prefix in the cache; returns how much of it was there."""
        backbone, kept = self.method.backbone, self._kept
        held = common_length(kept.ids, prefix) if kept is not None and kept.session == session else 0
        if held == len(prefix):
            return held
        # Should encoding fail, nothing half-done is left.
        self._kept = None
        if kept is None or not held:
            memory = getattr(self.method, "memory", None)
            state = backbone.prefill([prefix], keep_inputs=memory is not None and memory.needs_history)
        else:
            state = kept.state
            if held < len(kept.ids):
                state.crop([held])
            backbone.append(state, [prefix[held:]])
        self._kept = _Kept(session, prefix, state)
        return held


def _why_not(method: Any, request: Request) -> str | None:
    if not request.prefix_reuse:
        return "--no-prefix-reuse: every prompt was encoded whole"
    if request.batch_size > 1:
        return "prefixes are reused at batch size 1 alone"
    if not getattr(method, "reuses_prefix", False):
        return "the method drops or evicts the cache, or does not go on from one: every prompt was encoded whole"
    return None
