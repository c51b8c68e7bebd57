"""bAbI facts in book text (after Kuratov et al., 2024): the same questions at growing lengths.

The statements of a bAbI story stand, in their order, among the sentences of a public-domain book, and its question
follows. The questions are the same at every length, so that length is all that changes; with length 0 a prompt is that
of `babi`. Where the statements stand is a setting: spread at random over the text, or together at its start, middle or
end.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from flashmem_bench.data import Doc, Splits, SuiteFiles, text_field
from flashmem_bench.errors import UsageError
from flashmem_bench.hub import HubError
from flashmem_bench.sources.histories import whole_number
from flashmem_bench.sources.lengths import CHARACTERS, in_turn, refuse_unknown, wanted_lengths
from flashmem_bench.sources.stories import questions_by_task

PLACES = ("spread", "start", "middle", "end")
_SETTINGS = ("tokens", "rows", "position", "tasks")
_SENTENCE = re.compile(r"(?<=[.!?])[\"')\u2019\u201d]*\s+(?=[\"'(\u2018\u201cA-Z])")


def babi_long(
    *,
    tokens: Sequence[int],
    rows: int,
    tasks: Sequence[str],
    position: str,
    held_out: float,
    data_dir=None,
    skip_bad_rows: bool = False,
    settings: Mapping[str, Any] | None = None,
    seed: int = 0,
    **_: Any,
) -> Splits:
    """Questions of bAbI, from `babi/` with book text from `haystack/public_domain_books.jsonl[.gz]`.

    Args:
        tokens: Lengths in nominal tokens (see `lengths`), 0 for no book text.
        rows: Questions, each at every length.
        tasks: bAbI tasks, taken in turn.
        position: Where the statements stand: spread, start, middle or end.
        held_out: Share of the training stories that calibration draws from.
        data_dir: The data folder.
        skip_bad_rows: Leave broken rows out.
        settings: The first four, which win.
        seed: Seed of the choice of questions, sentences and places.
    """
    refuse_unknown("babi-long", settings, _SETTINGS)
    asked = dict(settings or {})
    place, names = asked.get("position", position), asked.get("tasks", list(tasks))
    if place not in PLACES:
        raise UsageError(f"suite.position must be one of {', '.join(PLACES)}, not {place!r}")
    count = whole_number(asked, "rows", rows) or rows
    shelf = _Shelf(data_dir, skip_bad_rows)
    stories = questions_by_task(held_out, data_dir, skip_bad_rows)

    def draw(split: str, length: int, number: int) -> Doc:
        question = _question(stories(split), names, f"{split}/{seed}", number)
        rng = random.Random(f"babi-long/{split}/{seed}/{number}/{length}")
        lines = _among(rng, question["context"], shelf.sentences(rng, split, length, question["context"]), place)
        return {"task": question["stratum"], **{key: question[key] for key in ("question", "gold", "cluster")}} | {
            "context": "\n".join(lines)
        }

    return in_turn("babi-long", wanted_lengths(asked, tokens), count, draw)


def _question(by_task: Mapping[str, Sequence[Doc]], names: Any, key: str, number: int) -> Doc:
    """Return the question of a row: tasks take turns, and each gives its questions in one shuffled order."""
    unknown = [name for name in names if name not in by_task]
    if unknown or not names:
        raise UsageError(f'suite.tasks must be bAbI tasks such as ["qa1","qa2"]; {unknown} are not in the data')
    task = names[number % len(names)]
    order = list(range(len(by_task[task])))
    random.Random(f"babi-long/{key}/{task}").shuffle(order)
    return by_task[task][order[number // len(names) % len(order)]]


def _among(rng: random.Random, facts: Sequence[str], sentences: Sequence[str], place: str) -> list[str]:
    """Return facts and sentences in one list, each in its own order."""
    total = len(facts) + len(sentences)
    if place == "spread":
        spots = set(rng.sample(range(total), len(facts)))
    else:
        first = {"start": 0, "middle": len(sentences) // 2, "end": len(sentences)}[place]
        spots = set(range(first, first + len(facts)))
    ours, theirs = iter(facts), iter(sentences)
    return [next(ours) if spot in spots else next(theirs) for spot in range(total)]


class _Shelf:
    """The books: the last one, where there are several, is for calibration alone."""

    def __init__(self, data_dir: Any, skip_bad_rows: bool):
        self._files = SuiteFiles(
            "haystack", {"books": "public_domain_books"}, _book, _not_on_the_hub, data_dir, skip_bad_rows
        )
        self._books: list[list[str]] = []

    def sentences(self, rng: random.Random, split: str, tokens: int, facts: Sequence[str]) -> list[str]:
        """Return sentences that follow each other, as many as the length leaves room for beside the facts."""
        room = tokens * CHARACTERS - sum(len(fact) + 1 for fact in facts)
        found: list[str] = []
        if room <= 0:
            return found
        for sentence in self._from(rng, split):
            room -= len(sentence) + 1
            if room < 0:
                return found
            found.append(sentence)
        return found

    def _from(self, rng: random.Random, split: str) -> Iterator[str]:
        """Yield the sentences from a random place on; a book that ends is followed by the next one."""
        if not self._books:
            self._books = [row["sentences"] for _, row in self._files.rows("books")]
        apart = len(self._books) > 1
        books = self._books[:-1] if apart and split == "test" else self._books[-1:]
        number = rng.randrange(len(books))
        start = rng.randrange(len(books[number]))
        while True:
            yield from books[number][start:]
            number, start = (number + 1) % len(books), 0


def _book(row: Doc) -> Doc:
    """Return a book as sentences without line breaks."""
    paragraphs = [" ".join(part.split()) for part in text_field(row, "text").split("\n\n")]
    sentences = [sentence for part in paragraphs for sentence in _SENTENCE.split(part) if sentence]
    return {"sentences": sentences}


def _not_on_the_hub(name: str) -> list[Doc]:
    raise HubError("the books are rows with a field 'text' that you bring yourself, such as books of Project Gutenberg")
