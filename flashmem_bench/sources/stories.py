"""The bAbI tasks: questions about short stories."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from flashmem_bench.data import Doc, Splits, SuiteFiles, text_field
from flashmem_bench.hub import hub_rows


def babi(*, held_out: float, data_dir=None, skip_bad_rows: bool = False, **_: Any) -> Splits:
    """The bAbI tasks from `babi/en_{train,test}.jsonl[.gz]` or `facebook/babi_qa`, one document a question."""
    files = SuiteFiles(
        "babi", {"train": "en_train", "test": "en_test"}, _babi_story, _babi_from_hub, data_dir, skip_bad_rows
    )

    def stories(name: str) -> dict[str, list[list[Doc]]]:
        return _stories_by_task(files.rows(name))

    def part(name: str, keep: Callable[[list[list[Doc]]], list[list[Doc]]]) -> list[Doc]:
        return _round_robin({task: keep(of_task) for task, of_task in stories(name).items()})

    def cut(of_task: list) -> int:
        return len(of_task) - round(len(of_task) * held_out)

    loaders: dict[str, Callable[[], list[Doc]]] = {
        "test": lambda: part("test", lambda of_task: of_task),
        "train": lambda: part("train", lambda of_task: of_task[: cut(of_task)]),
        "calibration": lambda: part("train", lambda of_task: of_task[cut(of_task) :]),
    }
    loaders["validation"] = loaders["calibration"]
    return Splits("babi", loaders, lambda: files.bad_rows)


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
