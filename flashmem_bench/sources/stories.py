"""The bAbI tasks: questions about short stories, one by one or story by story."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

from flashmem_bench.data import Doc, Splits, SuiteFiles, text_field
from flashmem_bench.hub import hub_rows

_SPLITS = ("test", "train", "calibration")


Stories = dict[str, list[list[Doc]]]


def babi(*, held_out: float, data_dir=None, skip_bad_rows: bool = False, **_: Any) -> Splits:
    """The bAbI tasks from `babi/en_{train,test}.jsonl[.gz]` or `facebook/babi_qa`, one document a question."""
    return _splits("babi", _round_robin, held_out, data_dir, skip_bad_rows)


def babi_session(*, held_out: float, data_dir=None, skip_bad_rows: bool = False, **_: Any) -> Splits:
    """The stories of bAbI with more than one question, as sessions; see `babi` for the data.

    In most tasks statements come between the questions. What stands before a question is its history, so the history of
    a story grows from question to question and each begins with the one before it.
    """
    return _splits("babi-session", _story_by_story, held_out, data_dir, skip_bad_rows)


def questions_by_task(held_out: float, data_dir=None, skip_bad_rows: bool = False) -> Callable[[str], Mapping]:
    """Return a function from a split (test, calibration or validation) to its questions by task."""
    read = _reader(held_out, data_dir, skip_bad_rows)[0]

    @cache
    def by_task(split: str) -> dict[str, list[Doc]]:
        return {task: list(itertools.chain.from_iterable(stories)) for task, stories in read(split).items()}

    return by_task


def _reader(held_out: float, data_dir, skip_bad_rows: bool) -> tuple[Callable[[str], Stories], SuiteFiles]:
    """Return a function from a split to its stories by task, and the files behind it."""
    files = SuiteFiles(
        "babi", {"train": "en_train", "test": "en_test"}, _babi_story, _babi_from_hub, data_dir, skip_bad_rows
    )

    def read(split: str) -> Stories:
        if split == "test":
            return _stories_by_task(files.rows("test"))
        found = {}
        for task, stories in _stories_by_task(files.rows("train")).items():
            cut = len(stories) - round(len(stories) * held_out)
            found[task] = stories[:cut] if split == "train" else stories[cut:]
        return found

    return read, files


def _splits(
    suite: str, order: Callable[[Stories], list[Doc]], held_out: float, data_dir, skip_bad_rows: bool
) -> Splits:
    read, files = _reader(held_out, data_dir, skip_bad_rows)
    loaders = {split: _later(lambda split: order(read(split)), split) for split in _SPLITS}
    # The same rows, and the same object, so that nobody looks for a difference.
    loaders["validation"] = loaders["calibration"]
    return Splits(suite, loaders, lambda: files.bad_rows)


def _later(function: Callable[[str], list[Doc]], argument: str) -> Callable[[], list[Doc]]:
    return lambda: function(argument)


def _babi_story(row: Doc) -> Doc:
    """Return the story as `{"task", "lines": [(line, type, text, answer)]}`, checked."""
    config, story = text_field(row, "config"), row.get("story")
    columns = ("id", "type", "text", "answer")
    if not isinstance(story, dict):
        raise ValueError("the field 'story' is missing or not an object")
    for name in columns:
        if not isinstance(story.get(name), list):
            raise ValueError(f"the field 'story.{name}' is missing or not a list")
    if len({len(story[name]) for name in columns}) != 1:
        raise ValueError("the lists of 'story' differ in length")
    lines = list(zip(*(story[name] for name in columns), strict=True))
    for number, kind, text, answer in lines:
        _check_line(number, kind, text, answer)
    return {"task": config.removeprefix("en-"), "lines": lines}


def _check_line(number: Any, kind: Any, text: Any, answer: Any) -> None:
    if not (str(number).isdecimal() and kind in (0, 1) and isinstance(text, str) and text.strip()):
        raise ValueError(f"line {number!r} of 'story' lacks a number, a type or its text")
    if kind == 1 and not (isinstance(answer, str) and answer.strip()):
        raise ValueError(f"the question on line {number!r} of 'story' has no answer")


def _stories_by_task(rows: Sequence[tuple[int, Doc]]) -> dict[str, list[list[Doc]]]:
    """Return task -> stories -> questions, tasks in natural order.

    A story's number is its row counted from the first row of its task, so that a row left out renames no
    other.
    """
    by_task: dict[str, list[list[Doc]]] = {}
    first: dict[str, int] = {}
    for row_number, story in rows:
        start = first.setdefault(story["task"], row_number)
        by_task.setdefault(story["task"], []).append(_questions(story, row_number - start + 1))
    return dict(sorted(by_task.items(), key=lambda item: (len(item[0]), item[0])))


def _questions(story: Doc, story_number: int) -> list[Doc]:
    statements: list[str] = []
    questions = []
    for number, kind, text, answer in story["lines"]:
        if kind == 0:
            statements.append(text.strip())
            continue
        questions.append(
            {
                "id": f"{story['task']}-{story_number:04d}-{int(number):02d}",
                "context": list(statements),
                "question": text.strip(),
                "gold": answer.strip(),
                "stratum": story["task"],
                "cluster": f"{story['task']}-{story_number:04d}",
            }
        )
    return questions


def _story_by_story(by_task: Stories) -> list[Doc]:
    """Take one story of each task in turn, all its questions, where it has several."""
    several = [[story for story in stories if len(story) > 1] for stories in by_task.values()]
    rounds = itertools.zip_longest(*several)
    docs = [doc for round_ in rounds for story in round_ if story is not None for doc in story]
    return [
        {**doc, "session_id": doc["cluster"], "history": "".join(f"{line}\n" for line in doc["context"])}
        for doc in docs
    ]


def _round_robin(by_task: Mapping[str, list[list[Doc]]]) -> list[Doc]:
    """Take one question of each task in turn, so that any first n questions cover the tasks evenly."""
    columns = [itertools.chain.from_iterable(stories) for stories in by_task.values()]
    rounds = itertools.zip_longest(*columns)
    return [question for round_ in rounds for question in round_ if question is not None]


def _babi_from_hub(name: str) -> list[Doc]:
    rows = []
    for task in range(1, 21):
        config = f"en-qa{task}"
        rows += [{"config": config, **row} for row in hub_rows("facebook/babi_qa", config, name)]
    return rows
