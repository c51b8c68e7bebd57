"""One cell out of several copies of parts of it: which rows, which texts, which attempts.

Every sample counts once. A good row wins over an error; of several good rows, which must have one answer, the earliest
counts, and of several errors the latest. So the outcome is the same in whatever order, and however often, copies are
joined. An attempt keeps its clock: it is one attempt of the joined cell too, under a number that no other has, and
numbers that were given once stay.

Nothing is read or written here.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

Record = dict[str, Any]


@dataclass(frozen=True)
class Copy:
    """What one folder has of a cell.

    Attributes:
        name: The folder, as it is told to the user.
        attempts: As the manifest has them.
        rows: Sample rows.
        texts: Texts by sample id.
    """

    name: str
    attempts: Sequence[Record] = ()
    rows: Sequence[Record] = ()
    texts: Mapping[str, Record] = field(default_factory=dict)


@dataclass(frozen=True)
class Conflict:
    """A sample with different answers in two folders."""

    sample: str
    first: str
    second: str


@dataclass(frozen=True)
class Additions:
    """What the cell lacks of the union.

    Attributes:
        attempts: All attempts of the cell from now on, numbered; those that it has keep their numbers.
        samples: Rows and texts that are new, or better than those that it has.
    """

    attempts: list[Record]
    samples: list[tuple[Record, Record]]


@dataclass(frozen=True)
class _Entry:
    """One row: where it is, and which attempt made it."""

    row: Record
    text: Record
    attempt: str
    name: str

    @property
    def good(self) -> bool:
        return self.row.get("error") is None

    @property
    def age(self) -> tuple[str, str]:
        return str(self.row.get("started_at") or ""), self.attempt


def conflicts(copies: Sequence[Copy]) -> list[Conflict]:
    """Return the samples whose good rows do not have one answer, each once."""
    found: list[Conflict] = []
    for sample, entries in _by_sample(copies).items():
        good = [entry for entry in entries if entry.good]
        answers = [answer(entry.row, entry.text) for entry in good]
        other = next((entry for entry, given in zip(good, answers, strict=True) if given != answers[0]), None)
        if other is not None:
            found.append(Conflict(sample, good[0].name, other.name))
    return found


def additions(into: Copy, copies: Sequence[Copy]) -> Additions:
    """Return what `into` lacks of the union of itself and others, which must not be in conflict."""
    attempts, numbers = _joined_attempts(into, copies)
    chosen = [_best(entries) for entries in _by_sample([into, *copies]).values()]
    new = [entry for entry in chosen if entry.name != into.name]
    samples = [({**entry.row, "attempt": numbers[entry.attempt]}, entry.text) for entry in new]
    return Additions(attempts, sorted(samples, key=lambda pair: (pair[0].get("index") or 0, pair[0]["sample_id"])))


def answer(row: Mapping[str, Any], text: Mapping[str, Any]) -> str:
    """Return what a sample was asked and what came of it, grade and times left out: equal texts, equal answers."""
    moments = [trigger.get("text_index") for trigger in text.get("triggers") or ()]
    parts = [row.get("prompt_sha"), text.get("text"), text.get("tokens"), moments, text.get("candidates")]
    return json.dumps(parts, sort_keys=True, ensure_ascii=False)


def attempt_key(attempt: Mapping[str, Any]) -> str:
    """Return what tells an attempt from all others, whatever its number: its token, else how it began."""
    if attempt.get("token"):
        return str(attempt["token"])
    # A record that was lost has neither time nor command, so its number has to do.
    began = {key: attempt.get(key) for key in ("started_at", "command", "shard")}
    began["number"] = None if attempt.get("started_at") else attempt.get("lost")
    return hashlib.sha256(json.dumps(began, sort_keys=True, default=str).encode()).hexdigest()[:16]


def _by_sample(copies: Sequence[Copy]) -> dict[str, list[_Entry]]:
    found: dict[str, list[_Entry]] = {}
    for copy in copies:
        keys = {attempt.get("attempt"): attempt_key(attempt) for attempt in _attempts(copy)}
        for row in copy.rows:
            sample = row["sample_id"]
            entry = _Entry(row, copy.texts[sample], keys[row.get("attempt")], copy.name)
            found.setdefault(sample, []).append(entry)
    return found


def _best(entries: Sequence[_Entry]) -> _Entry:
    # The first of equals, so that a row that is there already stays.
    good = [entry for entry in entries if entry.good]
    return min(good, key=lambda entry: entry.age) if good else max(entries, key=lambda entry: entry.age)


def _attempts(copy: Copy) -> list[Record]:
    """Return the attempts of a copy, with one for each number that its rows have and its manifest has not."""
    known = {attempt.get("attempt") for attempt in copy.attempts}
    lost = sorted({row.get("attempt") for row in copy.rows} - known, key=str)
    return [*copy.attempts, *({"attempt": number, "lost": f"{copy.name} {number}"} for number in lost)]


def _joined_attempts(into: Copy, copies: Sequence[Copy]) -> tuple[list[Record], dict[str, int]]:
    """Return all attempts, those of `into` first, and the number of each by its key."""
    joined = {attempt_key(attempt): attempt for attempt in _attempts(into)}
    numbers = {key: attempt["attempt"] for key, attempt in joined.items()}
    new: dict[str, Record] = {}
    for attempt in (attempt for copy in copies for attempt in _attempts(copy)):
        key = attempt_key(attempt)
        if key in joined:
            # Meanwhile it may have ended.
            joined[key] = _fuller(joined[key], {**attempt, "attempt": joined[key]["attempt"]})
        else:
            new[key] = _fuller(new[key], attempt) if key in new else attempt
    following = max((number for number in numbers.values() if isinstance(number, int)), default=0) + 1
    began = sorted(new.items(), key=lambda pair: (str(pair[1].get("started_at") or ""), pair[0]))
    for number, (key, attempt) in enumerate(began, start=following):
        joined[key], numbers[key] = {**attempt, "attempt": number}, number
    return list(joined.values()), numbers


def _fuller(old: Record, new: Record) -> Record:
    return new if str(new.get("finished_at") or "") > str(old.get("finished_at") or "") else old
