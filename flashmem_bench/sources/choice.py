"""Multiple-choice questions that are answered in words: every option has a letter, the right one is `gold`.

Options are lettered anew from A on, whatever the source calls them (ARC has digits too), so that one instruction and
one extractor serve all. Where the source names the right answer apart from the wrong ones (GPQA), their order is drawn
for each question by a seed that depends on the question alone: it is the same in every run, and no position is more
often right than chance makes it.
"""

from __future__ import annotations

import random
import string
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from flashmem_bench.data import Doc, Splits, SuiteFiles, text_field
from flashmem_bench.hub import HubError, hub_rows

_GPQA = "Idavidrein/gpqa"
_ORDER_SEED = 0


def arc_challenge(*, data_dir=None, skip_bad_rows: bool = False, **_: Any) -> Splits:
    """ARC-Challenge from `arc_challenge/{train,validation,test}.jsonl[.gz]` or `allenai/ai2_arc`.

    Calibration and validation are the validation split. A training file is read only for training.
    """
    names = ("train", "validation", "test")
    files = SuiteFiles(
        "arc_challenge",
        {name: name for name in names},
        _arc_doc,
        lambda name: hub_rows("allenai/ai2_arc", "ARC-Challenge", name),
        data_dir,
        skip_bad_rows,
    )

    def loader(name: str) -> Callable[[], list[Doc]]:
        return lambda: [{**doc, "id": f"arc_challenge-{name}-{number:05d}"} for number, doc in files.rows(name)]

    loaders = {name: loader(name) for name in names}
    return Splits("arc_challenge", {**loaders, "calibration": loaders["validation"]}, lambda: files.bad_rows)


def _arc_doc(row: Doc) -> Doc:
    choices, key = row.get("choices"), text_field(row, "answerKey")
    if not isinstance(choices, Mapping) or not {"text", "label"} <= choices.keys():
        raise ValueError("the field 'choices' has no lists 'text' and 'label'")
    texts, labels = list(choices["text"]), list(choices["label"])
    if len(texts) != len(labels) or key not in labels:
        raise ValueError(f"the answer {key!r} is none of the labels of 'choices'")
    return lettered(text_field(row, "question"), texts, labels.index(key))


def gpqa(*, part: str, data_dir=None, skip_bad_rows: bool = False, **_: Any) -> Splits:
    """GPQA from `gpqa/gpqa_<part>.jsonl[.gz]` or the gated `Idavidrein/gpqa`; all of it is test data.

    Args:
        part: `main` (448 questions) or `diamond` (198 of them).
    """
    files = SuiteFiles(
        "gpqa",
        {"test": f"gpqa_{part}"},
        _gpqa_doc,
        lambda name: _gpqa_from_hub(f"gpqa_{part}"),
        data_dir,
        skip_bad_rows,
    )

    def docs() -> list[Doc]:
        return [{**doc, "id": f"gpqa-{part}-{number:05d}"} for number, doc in files.rows("test")]

    return Splits(f"gpqa-{part}", {"test": docs}, lambda: files.bad_rows)


def _gpqa_doc(row: Doc) -> Doc:
    question, right = text_field(row, "Question").strip(), text_field(row, "Correct Answer").strip()
    options = [right, *(text_field(row, f"Incorrect Answer {n}").strip() for n in (1, 2, 3))]
    key = row.get("Record ID") or question
    order = random.Random(f"{_ORDER_SEED}/{key}").sample(range(4), 4)
    doc = lettered(question, [options[place] for place in order], order.index(0))
    return {**doc, "stratum": row.get("High-level domain") or None}


def _gpqa_from_hub(config: str) -> list[Doc]:
    try:
        return hub_rows(_GPQA, config, "train")
    except HubError as error:
        raise HubError(
            f"{error}; it is gated, so accept its terms on https://huggingface.co/datasets/{_GPQA} and then run "
            "`hf auth login`"
        ) from error


def lettered(question: str, options: Sequence[str], right: int) -> Doc:
    """Return a document: the options with their letters, `letters` and the right letter as `gold`."""
    letters = string.ascii_uppercase[: len(options)]
    lines = [f"{letter}. {option}" for letter, option in zip(letters, options, strict=True)]
    return {"question": question, "options": lines, "letters": letters, "gold": letters[right], "stratum": None}
