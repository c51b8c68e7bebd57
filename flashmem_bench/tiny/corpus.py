"""The training mixture: generated tasks and, when a data folder is given, the real bAbI and GSM8K train
splits.

A batch depends only on the seed, the step and the curriculum's state, never on what was drawn before it:
training can stop and go on at any step. The bundled model must stay unable to follow two links alone, or a memory
would have nothing to do: such answers weigh nothing in the loss, or come after a hint that leaves one look-up to do, or
are guesses (half of them the first link).

Test rows are never trained on: generated prompts carry their split in their hash, and real training prompts
are checked against the hashes of the test prompts.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

from flashmem_bench.generators import GENERATORS, generate, hops, hops_list, recall, wordmath
from flashmem_bench.generators.base import Row, follow, row_at, split_of

GSM8K_SUFFIX = '\nReason step by step, then end with "#### " and the number.'
# Share of GSM8K train that is kept out of training: the calibration and validation split.
GSM8K_HELD_OUT = 0.05
# Loss weight of answers that need more than one link.
COMPOSED_WEIGHT = 0.0
# Test rows of each generated suite that no training row may equal.
TEST_ROWS = 2000
# Look-ups asked after the first one about the same facts.
MOST_TURNS = 5
# Rows with hints and guesses come from streams of their own: offsets of the seed.
HINTED, GUESSED = 1000, 2000


@dataclass(frozen=True)
class Text:
    """One training conversation.

    Attributes:
        quiet: (start, end) character spans of the target that weigh `COMPOSED_WEIGHT`.
        hints: (start, name): a name that a pause before this character of the target says.
        turns: further (question, answer) turns of the same conversation.
    """

    task: str
    prompt: str
    target: str
    quiet: tuple[tuple[int, int], ...] = ()
    turns: tuple[tuple[str, str], ...] = ()
    hints: tuple[tuple[int, str], ...] = ()

    def prompts(self) -> Iterator[str]:
        """Every prompt that the conversation amounts to: each later question stands for the first one's last line."""
        yield self.prompt
        context = self.prompt.rpartition("\n")[0]
        for question, _ in self.turns:
            yield f"{context}\n{question}"


def read_jsonl(path: Path) -> Iterator[dict]:
    """Rows of a .jsonl or .jsonl.gz file."""
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rt", encoding="utf-8") as lines:
        for line in lines:
            yield json.loads(line)


def babi_texts(path: Path) -> list[Text]:
    """Every question of a bAbI file, with the statements before it one a line."""
    texts = []
    for row in read_jsonl(path):
        story, said = row["story"], []
        for kind, line, answer in zip(story["type"], story["text"], story["answer"], strict=True):
            if kind == 0:
                said.append(line)
            else:
                texts.append(Text("babi", "\n".join([*said, line]), answer))
    return texts


def gsm8k_texts(path: Path) -> list[Text]:
    """Every row of a GSM8K file, calculator annotations removed."""
    return [
        Text("gsm8k", row["question"] + GSM8K_SUFFIX, re.sub(r"<<[^>]*>>", "", row["answer"]))
        for row in read_jsonl(path)
    ]


def _find(data_dir: Path, stem: str) -> Path | None:
    return next((p for p in (data_dir / f"{stem}.jsonl", data_dir / f"{stem}.jsonl.gz") if p.exists()), None)


def real_texts(data_dir: Path | None) -> dict[str, list[Text]]:
    """Training rows of bAbI and GSM8K found under `data_dir`; a file that is not there is left out."""
    found: dict[str, list[Text]] = {}
    if data_dir is None:
        return found
    babi, gsm8k = _find(data_dir, "babi/en_train"), _find(data_dir, "gsm8k/train")
    if babi:
        found["babi"] = babi_texts(babi)
    if gsm8k:
        texts = gsm8k_texts(gsm8k)
        found["gsm8k"] = texts[: len(texts) - round(len(texts) * GSM8K_HELD_OUT)]
    return {task: without_test_rows(texts, data_dir) for task, texts in found.items()}


def _digest(prompt: str) -> bytes:
    return hashlib.blake2b(prompt.encode(), digest_size=16).digest()


def without_test_rows(texts: list[Text], data_dir: Path) -> list[Text]:
    """`texts` less those whose prompt is also a test prompt (bAbI's own splits share a few short stories)."""
    test: set[bytes] = set()
    for stem, read in (("babi/en_test", babi_texts), ("gsm8k/test", gsm8k_texts)):
        path = _find(data_dir, stem)
        if path:
            test.update(_digest(text.prompt) for text in read(path))
    return [text for text in texts if _digest(text.prompt) not in test]


@lru_cache(maxsize=8)
def _order(task: str, seed: int, epoch: int, rows: int) -> list[int]:
    """The order in which an epoch visits the rows."""
    return random.Random(f"{task}/{seed}/{epoch}").sample(range(rows), rows)


def _quiet_spans(target: str, moments: list[str]) -> tuple[tuple[int, int], ...]:
    """Character spans of the values that follow the echo prefixes in `moments`."""
    spans = []
    for moment in moments:
        start = target.index(moment) + len(moment)
        spans.append((start, (target + "\n").index("\n", start)))
    return tuple(spans)


def _more_questions(row: Row) -> tuple[tuple[str, str], ...]:
    """Further look-ups among the pairs of a prompt, asked turn by turn as its last line asks the first one.

    One answer a prompt is too little to learn from. A question is left out where prompt and question together would
    be a prompt of another split.
    """
    *context, asked = row["prompt"].split("\n")
    opening, key = asked.rsplit(": ", 1)
    pairs = list(_links(row).items())
    random.Random(row["prompt"]).shuffle(pairs)
    turns = [(f"{opening}: {other}", value) for other, value in pairs if other != key]
    return tuple(turn for turn in turns if split_of("\n".join([*context, turn[0]])) == "train")[:MOST_TURNS]


def _links(row: Row) -> dict[str, str]:
    """The facts of a prompt."""
    return dict(line.split(" -> ") for line in row["prompt"].split("\n") if " -> " in line)


@dataclass
class Corpus:
    """Draws rows of the mixture.

    Args:
        data_dir: folder with `babi/` and `gsm8k/`, or None to train on generated text alone.
        seed: of every random stream.
    """

    data_dir: Path | None = None
    seed: int = 0
    real: dict[str, list[Text]] = field(init=False)
    held_out: set[bytes] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self.real = real_texts(self.data_dir)
        self.held_out = {_digest(row["prompt"]) for name in GENERATORS for row in generate(name, "test", TEST_ROWS)}

    def text(self, task: str, index: int, facts: int, steps: int) -> Text:
        """Row `index` of `task`'s stream at a curriculum of `facts` facts or pairs and up to `steps`
        reasoning steps.

        Raises:
            ValueError: the row is also a test row of a bundled suite, which the split by hash must have prevented.
        """
        if task in self.real:
            rows = self.real[task]
            epoch, place = divmod(index, len(rows))
            return rows[_order(task, self.seed, epoch, len(rows))[place]]
        return self._unseen(getattr(self, f"_{task.replace('-', '_')}")(index, facts, steps), index)

    def hinted(self, task: str, index: int, facts: int) -> Text:
        """A row of `hops` or `hops-list` whose composed answers are told their last link but one.

        See `text`, which this extends; the answer is one look-up from the hint, so it is learned.
        """
        draw = {"hops": self._hinted_hops, "hops-list": self._hinted_hops_list}[task]
        return self._unseen(draw(index, facts), index)

    def guessed(self, task: str, index: int, facts: int) -> Text:
        """A row of `hops` that needs more than one link, answered half of the time with the first link.

        So the model says the first link and is unsure of it: it has noticed what was asked, as a larger one would.
        """
        return self._unseen({"hops": self._guessed_hops}[task](index, facts), index)

    def _unseen(self, text: Text, index: int) -> Text:
        if any(_digest(prompt) in self.held_out for prompt in text.prompts()):
            raise ValueError(
                f"training row {index} of {text.task} is also a test row; the splits of its generator overlap"
            )
        return text

    def _hinted_hops(self, index: int, facts: int) -> Text:
        row = row_at("hops", hops.draw, "train", index, self.seed + HINTED, facts=facts)
        start = row["prompt"].rpartition(": ")[2]
        return Text("hints", row["prompt"], row["target"], hints=((0, follow(_links(row), start, row["k"] - 1)),))

    def _guessed_hops(self, index: int, facts: int) -> Text:
        row = row_at("hops", hops.draw, "train", index, self.seed + GUESSED, facts=facts, k=(2, 3, 4))
        first = _links(row)[row["prompt"].rpartition(": ")[2]]
        return Text("guesses", row["prompt"], row["target"] if index % 2 else first)

    def _hinted_hops_list(self, index: int, facts: int) -> Text:
        row = row_at("hops-list", hops_list.draw, "train", index, self.seed + HINTED, facts=facts)
        links, hints = _links(row), []
        for echo in row["moments"]:
            start = row["target"].index(f"{echo} ") + len(f"{echo} ")
            hints.append((start, links[echo.removesuffix(" twice:")]))
        return Text("hints", row["prompt"], row["target"], hints=tuple(hints))

    def _hops(self, index: int, facts: int, steps: int) -> Text:
        facts = max(2, facts - index % 4 // 2 * (facts // 3))
        row = row_at("hops", hops.draw, "train", index, self.seed, facts=facts, k=(1,))
        return Text("hops", row["prompt"], row["target"], turns=_more_questions(row))

    def _hops_list(self, index: int, facts: int, steps: int) -> Text:
        plain = facts < 5 or index % 3 == 0
        cyclic = not plain or facts >= 8 or index % 2 == 0
        high = min(16, facts if plain else facts * 4 // 3)
        share = 0.0 if plain else 0.25
        settings = {"facts": facts, "items": (max(2, high // 2), high), "two_link_share": share, "cyclic": cyclic}
        row = row_at("hops-list", hops_list.draw, "train", index, self.seed, **settings)
        return Text("hops-list", row["prompt"], row["target"], _quiet_spans(row["target"], row["moments"]))

    def _recall(self, index: int, facts: int, steps: int) -> Text:
        pairs = max(2, (facts, facts // 2, facts, 32 if facts >= 12 else facts)[index % 4])
        row = row_at("recall", recall.draw, "train", index, self.seed, pairs=pairs)
        return Text("recall", row["prompt"], row["target"], turns=_more_questions(row))

    def _wordmath(self, index: int, facts: int, steps: int) -> Text:
        row = row_at("wordmath", wordmath.draw, "train", index, self.seed, steps=tuple(range(1, steps + 1)))
        return Text("wordmath", row["prompt"], row["target"])

    def tokenizer_texts(self, rows: int = 3000) -> Iterator[str]:
        """Text to train the tokenizer on."""
        for task in ("hops", "wordmath"):
            for index in range(rows // 10):
                text = self.text(task, index, facts=8, steps=3)
                yield text.prompt + "\n" + text.target
        for task in self.real:
            for text in self.real[task][:: max(1, len(self.real[task]) // rows)]:
                yield text.prompt + "\n" + text.target
