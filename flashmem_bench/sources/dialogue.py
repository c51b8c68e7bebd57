"""LoCoMo (Maharana et al., 2024): questions about very long conversations of two people.

The data is CC BY-NC and never comes with this package. A conversation is written out day by day, as in its authors'
evaluation: each day begins with its date and time, each line with its speaker, and a photo is told by its caption.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from flashmem_bench.data import Doc, Splits, SuiteFiles, text_field
from flashmem_bench.errors import UsageError
from flashmem_bench.hub import HubError
from flashmem_bench.sources.histories import newest_lines, whole_number

# The numbers in the data, named as the paper's tables name them.
CATEGORIES = {1: "multi-hop", 2: "temporal", 3: "open-domain", 4: "single-hop", 5: "adversarial"}


def locomo(
    *,
    categories: Sequence[str],
    data_dir=None,
    skip_bad_rows: bool = False,
    settings: Mapping[str, Any] | None = None,
    **_: Any,
) -> Splits:
    """LoCoMo from `locomo/locomo10.jsonl[.gz]`, one document a question, conversation after conversation.

    Args:
        categories: Names of the categories to take.
        data_dir: The data folder.
        skip_bad_rows: Leave broken rows out.
        settings: `history_words`: only the newest so many words of each conversation.
    """
    unknown = sorted(set(categories) - set(CATEGORIES.values()))
    if unknown:
        raise UsageError(f"locomo has no category {unknown[0]!r}; use {', '.join(CATEGORIES.values())}")
    words = whole_number(settings, "history_words", None)
    files = SuiteFiles("locomo", {"test": "locomo10"}, _conversation, _not_on_the_hub, data_dir, skip_bad_rows)

    def docs() -> list[Doc]:
        return [doc for _, row in files.rows("test") for doc in _questions(row, categories, words)]

    return Splits("locomo", {"test": docs}, lambda: files.bad_rows)


def _not_on_the_hub(name: str) -> list[Doc]:
    raise HubError(
        "its authors publish no data set on the hub; write the JSON array data/locomo10.json of "
        "github.com/snap-research/LoCoMo one conversation a line"
    )


def _conversation(row: Doc) -> Doc:
    """Return `{"id", "speakers", "lines", "questions"}`, checked."""
    talk = row.get("conversation")
    if not isinstance(talk, dict) or not isinstance(row.get("qa"), list):
        raise ValueError("the field 'conversation' or 'qa' is missing")
    speakers = [text_field(talk, "speaker_a"), text_field(talk, "speaker_b")]
    numbers = sorted(int(key[8:]) for key in talk if key.startswith("session_") and key[8:].isdecimal())
    lines: list[tuple[str, str]] = []
    for number in numbers:
        date = text_field(talk, f"session_{number}_date_time")
        lines += [(f"Date: {date}", _line(turn)) for turn in talk[f"session_{number}"]]
    if not lines:
        raise ValueError("the conversation has no turns")
    questions = [_question(item) for item in row["qa"]]
    return {"id": text_field(row, "sample_id"), "speakers": speakers, "lines": lines, "questions": questions}


def _line(turn: Any) -> str:
    if not isinstance(turn, dict):
        raise ValueError("a turn of the conversation is not an object")
    said = " ".join(str(turn.get("text") or "").split())
    photo = f" [shares a photo: {turn['blip_caption']}]" if turn.get("blip_caption") else ""
    return f"{text_field(turn, 'speaker')}: {said}{photo}"


def _question(item: Any) -> Doc:
    if not isinstance(item, dict) or item.get("category") not in CATEGORIES:
        raise ValueError("a question lacks a category from 1 to 5")
    category = CATEGORIES[item["category"]]
    answer = item.get("answer") if category != "adversarial" else item.get("adversarial_answer", item.get("answer"))
    if answer is None or not str(answer).strip():
        raise ValueError(f"the question {item.get('question')!r} has no answer")
    # Numbers are answers too.
    return {"question": text_field(item, "question"), "category": category, "gold": str(answer).strip()}


def _questions(row: Doc, categories: Sequence[str], words: int | None) -> list[Doc]:
    first, second = row["speakers"]
    head = f"A conversation between {first} and {second}, on several days.\n\n"
    history = f"{head}{newest_lines(row['lines'], words)}\n"
    return [
        {
            "id": f"{row['id']}-{number:03d}",
            "session_id": row["id"],
            "cluster": row["id"],
            "history": history,
            "stratum": item["category"],
            **item,
        }
        for number, item in enumerate(row["questions"], start=1)
        if item["category"] in categories
    ]
