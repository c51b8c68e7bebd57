"""Tasks whose data lies on this machine: lm-eval's own, and suite files of one's own.

A task file names a data set of the hub, or files beside it. Here the file's content becomes the keys that replace some
of its own before lm-eval sees it, so that the rows come from JSON lines on disk:

* a task that reads the hub takes `<data folder>/<task>/<split>.jsonl[.gz]`, as our own suites do; the last part of the
  hub id serves as the folder's name too where the data set has one configuration (`gsm8k` of `openai/gsm8k`);
* a file of one's own that reads `json` takes its `data_files` from beside the file, then from the working directory, as
  lm-eval itself would.

A split whose file is absent is left out where nothing needs it (training rows without few-shot examples); an absent
test file is an error. Rows become Arrow tables, as `datasets` would make them, because tasks process them as such.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from flashmem_bench.data import find_file, read_jsonl, suite_folder
from flashmem_bench.errors import DataError

_SPLIT_KEYS = ("training_split", "validation_split", "test_split", "fewshot_split")
_ENDINGS = (".jsonl", ".jsonl.gz")
# Names under which `datasets` reads files instead of a data set of the hub.
_FILES = ("json", "csv", "parquet", "text", "arrow")
# Names that data sets give to their only configuration.
_ONLY = (None, "main", "default")


class LocalSplits(Mapping[str, Any]):
    """Splits read from JSON lines when they are first looked at.

    Args:
        name: Of the suite, for messages.
        files: Split name -> files, read one after the other.
        skip_bad_rows: Leave rows out that are not JSON objects, and count them.
    """

    def __init__(self, name: str, files: Mapping[str, Sequence[Path]], skip_bad_rows: bool):
        self._name, self._files, self._skip = name, dict(files), skip_bad_rows
        self._built: dict[str, Any] = {}
        self.bad_rows = 0

    def __contains__(self, split: object) -> bool:
        return split in self._files

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, split: str) -> Any:
        if split not in self._files:
            raise DataError(f"{self._name} has no data for its split {split!r}; it has {', '.join(self._files)}")
        if split not in self._built:
            rows = [row for path in self._files[split] for row in self._rows(path)]
            if not rows:
                raise DataError(f"the split {split!r} of {self._name} is empty; check its data file")
            self._built[split] = _table(self._name, split, rows)
        return self._built[split]

    def _rows(self, path: Path) -> Iterator[dict[str, Any]]:
        for number, row in read_jsonl(path):
            if not isinstance(row, ValueError):
                yield row
            elif self._skip:
                self.bad_rows += 1
            else:
                raise DataError(
                    f"{path}: row {number} is broken: {row}; mend it, or leave it out with --skip-bad-rows"
                ) from row


def from_folder(
    name: str, content: Mapping[str, Any], data_dir: Path | None, skip_bad_rows: bool
) -> dict[str, Any] | None:
    """Return the keys that let a task of the hub read the data folder; None where that has nothing for it.

    Args:
        name: `lm-eval/<task>`, or the name of a file of one's own.
        content: The task file.
        data_dir: The data folder; without one `FLASHMEM_DATA` is used.
        skip_bad_rows: Go on without broken rows.

    Raises:
        DataError: The folder is there and lacks a file that the task needs.
    """
    folders = [suite_folder(folder, data_dir) for folder in folder_names(name, content)]
    folder = next((folder for folder in folders if folder is not None), None)
    if folder is None:
        return None
    named = {key: str(content[key]) for key in _SPLIT_KEYS if content.get(key)}
    files: dict[str, list[Path]] = {}
    absent: dict[str, Any] = {}
    for key, split in named.items():
        if not _needed(key, content) and not any((folder / (split + ending)).is_file() for ending in _ENDINGS):
            absent[key] = None
        else:
            files[split] = [find_file(folder, split)]
    return {**_replacing(LocalSplits(name, files, skip_bad_rows)), **absent}


def folder_names(name: str, content: Mapping[str, Any]) -> list[str]:
    """Return the folders of a data folder that may hold the rows of a task, the task's own name first."""
    folders = [name.rpartition("/")[2]]
    source = content.get("dataset_path")
    if content.get("dataset_name") in _ONLY and source and source not in _FILES:
        folders.append(str(source).rpartition("/")[2])
    return list(dict.fromkeys(folders))


def needed_splits(content: Mapping[str, Any]) -> list[str]:
    """Return the splits of a task without which it does not run."""
    return list(dict.fromkeys(str(content[key]) for key in _SPLIT_KEYS if content.get(key) and _needed(key, content)))


def from_files(name: str, path: Path, content: Mapping[str, Any], skip_bad_rows: bool) -> dict[str, Any] | None:
    """Return the keys that let a suite file read the files that it names; None where it names none.

    Raises:
        DataError: A file is not there.
    """
    arguments = dict(content.get("dataset_kwargs") or {})
    if content.get("dataset_path") not in _FILES or "data_files" not in arguments:
        return None
    named = arguments["data_files"]
    splits = named if isinstance(named, Mapping) else {"train": named}
    files = {str(split): [_beside(path, str(file)) for file in _several(entry)] for split, entry in splits.items()}
    every = [file for entries in files.values() for file in entries]
    if set(arguments) == {"data_files"} and all(str(file).endswith(_ENDINGS) for file in every):
        local = {split: [Path(file) for file in entries] for split, entries in files.items()}
        return _replacing(LocalSplits(name, local, skip_bad_rows))
    return {"dataset_kwargs": {**arguments, "data_files": files}}


def _needed(key: str, content: Mapping[str, Any]) -> bool:
    """Say whether a task cannot run without a split: the one it tests on, and the one its examples come from."""
    if key == "test_split":
        return True
    if key == "validation_split":
        return not content.get("test_split")
    examples = bool(content.get("num_fewshot"))
    return examples and (key == "fewshot_split" or not content.get("fewshot_split"))


def _replacing(splits: LocalSplits) -> dict[str, Any]:
    return {"custom_dataset": lambda **_: splits, "dataset_kwargs": {}}


def _several(entry: Any) -> list[Any]:
    return list(entry) if isinstance(entry, (list, tuple)) else [entry]


def _beside(path: Path, file: str) -> str:
    """Return where a file that a suite names is: beside the suite, else where the command runs."""
    if "://" in file or any(mark in file for mark in "*?["):
        return file
    wanted = Path(file).expanduser()
    for place in (path.parent / wanted, wanted):
        if place.is_file():
            return str(place.resolve())
    raise DataError(f"{path} names the data file {file}, which is neither beside it nor here; put it beside the file")


def _table(name: str, split: str, rows: Sequence[dict[str, Any]]) -> Any:
    import datasets

    columns = dict.fromkeys(key for row in rows for key in row)
    try:
        return datasets.Dataset.from_dict({column: [row.get(column) for row in rows] for column in columns})
    except (TypeError, ValueError, OverflowError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise DataError(
            f"the rows of the split {split!r} of {name} do not agree in type: {reason}; give each field one type"
        ) from error
