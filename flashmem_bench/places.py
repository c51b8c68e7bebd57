"""Where things lie below a results folder, so that no name and no link leads out of it.

Names come from users, suite files and data: whatever they hold, the folder or file made of one lies where it was meant
to. Links are another way out: a results folder may have come from elsewhere, and a link in it would let an ordinary run
write into any file of its user. So what a run writes into must not be a link that leads out of the results folder; the
folder itself may be one, and so may trained memories and thresholds, which are only read, until something is to be
written there.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Collection
from pathlib import Path

from flashmem_bench.errors import StoreError

# Only read, unless `train` or `calibrate` writes there, and those ask `require_own` first.
_MAY_BE_LENT = frozenset({"checkpoints", "thresholds"})
# What file systems allow is 255 bytes; an ending and a temporary name's mark must fit too.
_LONGEST = 180
_MAX_NAME = 80


def safe_name(name: str) -> str:
    """A folder name for a suite or method that cannot leave its parent folder.

    Plain names stay as they are. Any other gets its odd characters replaced and a short hash of the original,
    so that two names never share a folder.
    """
    plain = re.sub(r"[^A-Za-z0-9._-]", "_", name).lstrip(".")[:_MAX_NAME]
    if plain == name and name:
        return name
    return f"{plain or '_'}-{hashlib.sha256(name.encode('utf-8', 'replace')).hexdigest()[:6]}"


def folder_name(name: str) -> str:
    """Return the folder of a suite or model: a hub id keeps its parts, joined by `--`."""
    return safe_name(name.strip("/").replace("/", "--"))


def file_stem(*parts: str) -> str:
    """Return a file name without ending for several names together; bounded, and its own for each."""
    plain = "-".join(safe_name(part) for part in parts)
    if len(plain) <= _LONGEST:
        return plain
    digest = hashlib.sha256("\0".join(parts).encode("utf-8", "replace")).hexdigest()[:12]
    return f"{plain[: _LONGEST - 13]}-{digest}"


def refuse_links(results: Path) -> None:
    """Refuse a results folder in which a link would lead a run's writing out of it.

    Raises:
        StoreError: with the link and its target.
    """
    root = results.resolve()
    for link in _links(root, _MAY_BE_LENT):
        _require_inside(root, link)


def require_own(results: Path, folder: Path) -> None:
    """Refuse to write a memory or thresholds where a link would lead that out of the results folder.

    Args:
        results: The results folder.
        folder: To be written into. One that does not lie below the results folder was named by the user, who may.

    Raises:
        StoreError: with the link and its target.
    """
    root = Path(os.path.abspath(results))
    if root not in Path(os.path.abspath(folder)).parents:
        return
    for path in (folder, *_links(folder)):
        _require_inside(root.resolve(), path)


def _require_inside(root: Path, path: Path) -> None:
    real = path.resolve()
    if real != root and root not in real.parents:
        raise StoreError(
            f"{path} leads out of the results folder, to {real}, and nothing is written there; put the folder itself "
            "in the link's place, or choose another with --results-dir"
        )


def _links(folder: Path, but: Collection[str] = ()) -> list[Path]:
    found = []
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError:  # Gone meanwhile, or not to be read: then it is not to be written either.
        return []
    for entry in entries:
        if entry.name in but:
            continue
        if entry.is_symlink():
            found.append(Path(entry.path))
        elif entry.is_dir(follow_symlinks=False):
            found += _links(Path(entry.path))
    return found
