"""Rows of a suite, from a data folder, read strictly and only when asked for.

A data folder (`--data-dir` or `FLASHMEM_DATA`) holds `<suite>/<file>.jsonl[.gz]`. A row that is not a JSON
object, or that lacks a field the suite needs, is an error with the file and the row's number (the first row
is 1); with `skip_bad_rows` reading goes on without it and it is counted. A suite whose folder is absent may
come from the hub instead; a folder that exists but lacks a file is an error, since half a data set is
nobody's intention.

The containers are what lm-eval expects of a data set (`dataset[split]`, `features`, indexing) without
Arrow's unified schema, so that a document is exactly the object in the file. A split is built when it is
first looked at: a run on the test split never pays for the training rows.
"""

from __future__ import annotations

import gzip
import json
import os
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from flashmem_bench.errors import DataError

Doc = dict[str, Any]
# Turns a raw row into a document, or raises ValueError with the reason why it is broken.
Parse = Callable[[Doc], Doc]


class Rows(Sequence[Doc]):
    """The documents of one split, in their fixed order."""

    def __init__(self, docs: Sequence[Doc]):
        self._docs = docs
        # lm-eval reads the column names off the keys of `features`.
        self.features = dict.fromkeys(docs[0])

    def __len__(self) -> int:
        return len(self._docs)

    def __getitem__(self, index):
        return self._docs[index]


class Splits(Mapping[str, Rows]):
    """The splits of a suite, each built on first use.

    Args:
        suite: Name of the suite, for messages.
        loaders: Split name -> function that returns its documents.
        count_bad: Returns how many broken rows were left out so far.
    """

    def __init__(self, suite: str, loaders: Mapping[str, Callable[[], Sequence[Doc]]], count_bad=lambda: 0):
        self._suite, self._loaders, self._count_bad = suite, dict(loaders), count_bad
        self._built: dict[str, Rows] = {}

    @property
    def bad_rows(self) -> int:
        """Broken rows left out so far, over the files that were read."""
        return self._count_bad()

    def __getitem__(self, split: str) -> Rows:
        if split not in self._built:
            docs = self._loaders[split]()
            if not docs:
                left_out = f" ({self.bad_rows} broken rows left out)" if self.bad_rows else ""
                raise DataError(f"the split {split!r} of {self._suite} is empty{left_out}; check its data file")
            self._built[split] = Rows(docs)
        return self._built[split]

    def __iter__(self) -> Iterator[str]:
        return iter(self._loaders)

    def __len__(self) -> int:
        return len(self._loaders)


class SuiteFiles:
    """The files of one suite, each read once, from the data folder or the hub.

    Args:
        suite: Folder name inside the data folder.
        files: Logical name (e.g. `test`) -> file name without its ending.
        parse: Makes a document of a row.
        from_hub: Returns the raw rows of a logical file from the hub; raises `HubError`.
        data_dir: The data folder; without one `FLASHMEM_DATA` is used.
        skip_bad_rows: Leave broken rows out and count them.
    """

    def __init__(
        self,
        suite: str,
        files: Mapping[str, str],
        parse: Parse,
        from_hub: Callable[[str], list[Doc]],
        data_dir: str | Path | None = None,
        skip_bad_rows: bool = False,
    ):
        self.suite, self._files, self._parse, self._from_hub = suite, files, parse, from_hub
        self._skip = skip_bad_rows
        self._folder = suite_folder(suite, data_dir)
        self._read: dict[str, list[tuple[int, Doc]]] = {}
        self.bad_rows = 0

    def rows(self, name: str) -> list[tuple[int, Doc]]:
        """Return `(row number, document)` of the file `name`; numbers start at 1, left-out rows keep theirs.

        Raises:
            DataError: The file is missing, cannot be read or holds a broken row; or no source has the data.
        """
        if name not in self._read:
            origin, numbered = self._numbered(name)
            self._read[name] = list(self._parsed(origin, numbered))
        return self._read[name]

    def _numbered(self, name: str) -> tuple[str, Iterator[tuple[int, Doc | ValueError]]]:
        if self._folder is not None:
            path = find_file(self._folder, self._files[name])
            return str(path), read_jsonl(path)
        return f"the hub's {self.suite}", enumerate(self._hub(name), start=1)

    def _hub(self, name: str) -> list[Doc]:
        from flashmem_bench.hub import HubError, NotOnHubError

        needed = " and ".join(f"{self.suite}/{stem}.jsonl[.gz]" for stem in self._files.values())
        try:
            return self._from_hub(name)
        except NotOnHubError as error:
            raise DataError(
                f"no data for {self.suite}: {error}; put {needed} into a folder given with --data-dir or FLASHMEM_DATA"
            ) from error
        except HubError as error:
            raise DataError(
                f"no data for {self.suite}: {error}. Three ways out: a folder that holds {needed} given with "
                "--data-dir or FLASHMEM_DATA; a network connection; a filled datasets cache (HF_HOME)"
            ) from error

    def _parsed(self, origin: str, numbered) -> Iterator[tuple[int, Doc]]:
        for number, row in numbered:
            try:
                if isinstance(row, ValueError):
                    raise row
                yield number, self._parse(row)
            except ValueError as error:
                if not self._skip:
                    raise DataError(
                        f"{origin}: row {number} is broken: {error}; mend it, or leave it out with --skip-bad-rows"
                    ) from error
                self.bad_rows += 1


def data_root(data_dir: str | Path | None) -> Path | None:
    """Return the data folder that is set, by option or environment; None where none is.

    Raises:
        DataError: It does not exist.
    """
    chosen = data_dir or os.environ.get("FLASHMEM_DATA")
    if not chosen:
        return None
    root = Path(chosen).expanduser()
    if not root.is_dir():
        origin = "--data-dir" if data_dir else "FLASHMEM_DATA"
        raise DataError(f"the data folder {root} does not exist; check {origin}")
    return root


def suite_folder(suite: str, data_dir: str | Path | None) -> Path | None:
    """Return `<data folder>/<suite>`, or None where no folder is set or it does not hold the suite.

    Raises:
        DataError: The data folder itself does not exist.
    """
    root = data_root(data_dir)
    return root / suite if root is not None and (root / suite).is_dir() else None


def find_file(folder: Path, stem: str) -> Path:
    """Return `folder/stem.jsonl` or its `.gz` form.

    Raises:
        DataError: Neither is there.
    """
    for ending in (".jsonl", ".jsonl.gz"):
        if (folder / (stem + ending)).is_file():
            return folder / (stem + ending)
    raise DataError(
        f"{folder} holds neither {stem}.jsonl nor {stem}.jsonl.gz; put the file there or move the folder away"
    )


def read_jsonl(path: Path) -> Iterator[tuple[int, Doc | ValueError]]:
    """Yield `(row number, object)`, or the reason in the object's place where a line is not a JSON object.

    Blank lines are passed over but numbered, so that a number is always the line in the file.

    Raises:
        DataError: The file cannot be read or unpacked.
    """
    opener = gzip.open if path.suffix == ".gz" else open
    try:
        with opener(path, "rb") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    yield number, _object(line)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} cannot be read: {error}; copy the file again") from error


def _object(line: bytes) -> Doc | ValueError:
    try:
        row = json.loads(line)
    except ValueError as error:
        return ValueError(f"not JSON ({error})")
    except RecursionError:
        return ValueError("not JSON (nested too deeply)")
    return row if isinstance(row, dict) else ValueError("not a JSON object")


def text_field(row: Doc, name: str) -> str:
    """Return `row[name]`, which must be text that is not blank.

    Raises:
        ValueError: It is missing or something else.
    """
    if name not in row:
        raise ValueError(f"the field {name!r} is missing")
    if not isinstance(row[name], str) or not row[name].strip():
        raise ValueError(f"the field {name!r} is not text")
    return row[name]
