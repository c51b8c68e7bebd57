"""Where the bundled suites' documents come from: the functions that suite files name as `custom_dataset`.

lm-eval calls such a function with the suite's `metadata` and `dataset_kwargs` as keywords. Our adapter adds
`data_dir`, `skip_bad_rows`, `seed` and `settings`; `lm_eval --metadata '{"data_dir": ...}'` gives the same.
Every document has `id`, `gold` (the right answer, for grading) and `stratum`, `cluster` where it shares a text with
others, and keeps the fields of its
source. The order of a split is fixed, so that a larger limit only adds samples.

Held out: calibration and validation are the same rows, the last `held_out` share of a real suite's training
file. The threshold reads no answers from them and the choice among checkpoints reads no threshold, so
nothing leaks between the two.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from flashmem_bench.data import Doc, Splits, SuiteFiles, text_field
from flashmem_bench.errors import UsageError
from flashmem_bench.grading.extract import marked_number
from flashmem_bench.grading.match import normal_number
from flashmem_bench.hub import hub_rows

Loaders = Mapping[str, Callable[[], Sequence[Doc]]]


def generated(
    *,
    flashmem: Mapping[str, Any],
    sizes: Mapping[str, int],
    generator: Mapping[str, Any] | None = None,
    training: Mapping[str, Any] | Sequence[Mapping[str, Any]] | None = None,
    settings: Mapping[str, Any] | None = None,
    seed: int = 0,
    **_: Any,
) -> Splits:
    """Rows from the generator named like the suite.

    Args:
        flashmem: The suite's `metadata.flashmem`; `alias` names the generator.
        sizes: Rows of each split.
        generator: The generator's settings, such as `pairs` of `recall`, from the suite file.
        training: Settings of the training split alone, where it should be easier or more varied than the others. A list
            makes lessons: equal parts of the split, whose rows say in `lesson` which one they belong to.
        settings: More of them, which win.
        seed: Seed of the generator's streams.
    """
    name = flashmem["alias"]
    chosen = {**(generator or {}), **(settings or {})}
    lessons = [training or {}] if training is None or isinstance(training, Mapping) else training

    def rows(split: str, count: int, wanted: Mapping[str, Any]) -> list[Doc]:
        from flashmem_bench.generators import generate

        try:
            found = generate(name, split, count, seed, **wanted)
        except (TypeError, ValueError) as error:
            raise UsageError(f"the generator of {name} refuses {wanted or 'its settings'}: {error}") from error
        return [{**row, "gold": row["answer"]} for row in found]

    def split_rows(split: str) -> list[Doc]:
        if split != "train":
            return rows(split, sizes[split], chosen)
        parts = [rows(split, sizes[split] // len(lessons), {**lesson, **chosen}) for lesson in lessons]
        if len(parts) == 1:
            return parts[0]
        return [{**row, "id": f"{row['id']}-{i}", "lesson": i} for i, part in enumerate(parts) for row in part]

    return Splits(name, {split: _later(split_rows, split) for split in sizes})


def gsm8k(*, held_out: float, data_dir=None, skip_bad_rows: bool = False, **_: Any) -> Splits:
    """GSM8K from `gsm8k/{train,test}.jsonl[.gz]` or `openai/gsm8k`."""
    files = SuiteFiles(
        "gsm8k",
        {"train": "train", "test": "test"},
        _gsm8k_doc,
        lambda name: hub_rows("openai/gsm8k", "main", name),
        data_dir,
        skip_bad_rows,
    )

    def docs(name: str) -> list[Doc]:
        return [{"id": f"gsm8k-{name}-{number:05d}", **doc} for number, doc in files.rows(name)]

    return Splits("gsm8k", _held_out_loaders(docs, held_out), lambda: files.bad_rows)


def _gsm8k_doc(row: Doc) -> Doc:
    question, answer = text_field(row, "question"), text_field(row, "answer")
    gold = normal_number(marked_number(answer) or "")
    if gold is None:
        raise ValueError("the field 'answer' has no '#### <number>'")
    return {"question": question, "answer": answer, "gold": gold, "stratum": None}


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


def _held_out_loaders(docs: Callable[[str], list[Doc]], held_out: float) -> Loaders:
    """Return the loaders of a suite that has a training and a test file."""

    def cut() -> int:
        return len(docs("train")) - round(len(docs("train")) * held_out)

    return {
        "test": lambda: docs("test"),
        "train": lambda: docs("train")[: cut()],
        "calibration": lambda: docs("train")[cut() :],
        "validation": lambda: docs("train")[cut() :],
    }


def _later(function: Callable[[str], list[Doc]], argument: str) -> Callable[[], list[Doc]]:
    return lambda: function(argument)
