"""What of a suite's data is at hand: how many test rows, from where, and what to do where there are none.

Everything is read from the suite file, the data folder and the `datasets` cache as files, so that a list of suites
loads neither a model nor a data library and asks no network. In `metadata.flashmem`, `files` gives the file of each
split in a data folder (`test: gsm8k/test`, without its ending) and `source` the hub id, with `source_config` where
only one configuration holds the rows, `gated: true` where the hub asks for an account and `hub: false` where its copy
cannot be loaded; a generated suite's sizes are those of its `dataset_kwargs`.
"""

from __future__ import annotations

import gzip
import json
import os
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flashmem_bench.data import data_root
from flashmem_bench.suites import SuiteInfo, read_suite_file

_SPLIT = "test"
_ENDINGS = (".jsonl", ".jsonl.gz")


@dataclass(frozen=True)
class Reach:
    """Where a suite's test rows are.

    Attributes:
        rows: How many there are: lines of the file, which a suite may turn into more or fewer samples; None unknown.
        source: The hub id, or "generated".
        reachable: "yes: ..." with the place, or "no: ..." with what to do.
    """

    rows: int | None
    source: str
    reachable: str


def reach(info: SuiteInfo, data_dir: Path | None = None) -> Reach:
    """Return where the test rows of a suite are.

    Raises:
        DataError: The data folder itself does not exist.
    """
    source = str(info.metadata.get("source") or ("generated" if info.kind == "generated" else "-"))
    if info.kind == "generated":
        sizes = (read_suite_file(info.path).get("dataset_kwargs") or {}).get("sizes") or {}
        return Reach(sizes.get(_SPLIT), source, "yes: generated here")
    stem = (info.metadata.get("files") or {}).get(_SPLIT)
    root = data_root(data_dir)
    found = _file(root, stem)
    if found is not None:
        return Reach(_lines(found), source, "yes: data folder")
    cached = _cached_rows(source, info.metadata.get("source_config"))
    # A folder that lacks the file is an error when the suite is loaded, whatever the cache holds.
    if cached is not None and not (root is not None and stem and (root / stem).parent.is_dir()):
        return Reach(cached, source, "yes: datasets cache")
    return Reach(None, source, _what_to_do(info, source, stem))


def _what_to_do(info: SuiteInfo, source: str, stem: str | None) -> str:
    ways = [f"put {stem}.jsonl[.gz] into a folder and name it with --data-dir"] if stem else []
    if "/" in source and info.metadata.get("hub", True):
        gated = f"ask for access to {source} and log in to the hub"
        ways.append(gated if info.metadata.get("gated") else "use the hub")
    return "no: " + (", or ".join(ways) or "see the suite file")


def _file(root: Path | None, stem: str | None) -> Path | None:
    if root is None or not stem:
        return None
    return next((path for ending in _ENDINGS if (path := root / (stem + ending)).is_file()), None)


def _lines(path: Path) -> int | None:
    """Count the lines that hold something; None where the file cannot be read."""
    opener: Any = gzip.open if path.suffix == ".gz" else open
    try:
        with opener(path, "rb") as lines:
            return sum(1 for line in lines if line.strip())
    except (OSError, EOFError, zlib.error):
        return None


def _cached_rows(source: str, config: str | None) -> int | None:
    """Return the test rows of a hub data set that `datasets` has in its cache, as its own notes say."""
    sizes = [splits[_SPLIT] for splits in _cached_splits(source, config) if _SPLIT in splits]
    numbers = [entry.get("num_examples") for entry in sizes if isinstance(entry, dict)]
    return max((number for number in numbers if isinstance(number, int)), default=None)


def _cached_splits(source: str, config: str | None) -> Iterator[Mapping[str, Any]]:
    home = Path(os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "huggingface")
    cache = Path(os.environ.get("HF_DATASETS_CACHE") or home / "datasets").expanduser()
    if "/" not in source:
        return
    for notes in sorted((cache / source.replace("/", "___")).glob(f"{config or '*'}/*/*/dataset_info.json")):
        try:
            splits = json.loads(notes.read_text(encoding="utf-8")).get("splits")
        except (OSError, ValueError):
            continue
        if isinstance(splits, dict):
            yield splits
