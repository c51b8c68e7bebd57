"""What goes along to a node that does not see the results folder: memories, thresholds, banks, files of own suites.

Only safetensors, JSON, YAML and JSON lines travel, as bytes under a path below one folder of the node. Which paths a
node does not see it says itself, so that on a shared disk nothing travels. Code never does: it has to be installed.
"""

from __future__ import annotations

import hashlib
import os
import secrets
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from flashmem_bench import durable
from flashmem_bench.checkpoints import JOINT, memory_folder
from flashmem_bench.errors import BenchError
from flashmem_bench.suites import find_suite, suite_files
from flashmem_bench.thresholds import threshold_folder

if TYPE_CHECKING:
    from flashmem_bench.methods.base import MethodSpec
    from flashmem_bench.session import Request

ENDINGS = (".safetensors", ".json", ".yaml", ".yml", ".jsonl", ".jsonl.gz")
RESULTS, NAMED, SUITES = "results", "named", "suites"
_MEMORY = "memory.checkpoint"


@dataclass(frozen=True)
class Parcel:
    """A file on its way.

    Attributes:
        path: Where it goes, relative, with forward slashes.
        content: Its bytes.
    """

    path: str
    content: bytes

    @property
    def label(self) -> tuple[str, str]:
        """Path and hash: what has been sent need not be sent again."""
        return self.path, hashlib.sha256(self.content).hexdigest()


class Token:
    """A small file in the results folder: who finds it there sees the same folder."""

    def __init__(self, results: Path):
        self.path, self.text = results / f".token-{secrets.token_hex(8)}", secrets.token_hex(16)
        self.path.write_text(self.text, encoding="utf-8")

    def remove(self) -> None:
        """Take it away again."""
        self.path.unlink(missing_ok=True)


def seen(path: str, text: str) -> bool:
    """Return whether the file of a token is here, with its text."""
    try:
        return Path(path).read_text(encoding="utf-8") == text
    except (OSError, ValueError):
        return False


def absolute(request: Request) -> Request:
    """Return the request with all paths from the root: a node has another working directory."""
    changes: dict[str, Any] = {"results_dir": request.results_dir.resolve()}
    for name in ("rows_dir", "data_dir"):
        path = getattr(request, name)
        changes[name] = path.resolve() if path is not None else None
    changes["suites"] = tuple(str(Path(name).resolve()) if is_file(name) else name for name in request.suites)
    if request.checkpoint is not None and Path(request.checkpoint).expanduser().is_dir():
        changes["checkpoint"] = str(Path(request.checkpoint).expanduser().resolve())
    named = request.settings.get(_MEMORY)
    if named is not None and Path(str(named)).expanduser().is_dir():
        changes["settings"] = {**request.settings, _MEMORY: str(Path(str(named)).expanduser().resolve())}
    if Path(request.model).expanduser().is_dir():
        changes["model"] = str(Path(request.model).expanduser().resolve())
    return replace(request, **changes)


def is_file(suite: str) -> bool:
    """Return whether a suite is named by its file."""
    return suite.endswith((".yaml", ".yml"))


def named_paths(request: Request) -> list[str]:
    """Return the paths that the request names besides the results folder and that may travel."""
    return [path for path in _named(request) if is_file(path) or Path(path).is_dir()]


def _named(request: Request) -> list[str]:
    memories = [request.checkpoint, request.settings.get(_MEMORY)]
    return [str(path) for path in memories if path] + list(filter(is_file, request.suites))


def parcels(request: Request, suite: str, spec: MethodSpec, unseen: frozenset[str], shared: bool) -> list[Parcel]:
    """Return what a node needs for a cell and does not see.

    Args:
        request: As `absolute` returns it.
        suite: The suite, as the request names it.
        spec: The method.
        unseen: Those of `named_paths` that the node does not see.
        shared: It sees the results folder.
    """
    files: dict[str, Path] = {}
    for path in sorted(unseen):
        files |= _of_suite(path) if is_file(path) else _below(Path(path), f"{NAMED}/{_key(path)}")
    if not shared:
        files |= _of_results(request, suite, spec)
    return [Parcel(path, file.read_bytes()) for path, file in files.items()]


def _of_results(request: Request, suite: str, spec: MethodSpec) -> dict[str, Path]:
    results, model, files = request.results_dir, request.model, {}
    for name in (find_suite(suite).name, JOINT):
        folders = [threshold_folder(results, model, name)]
        folders += [memory_folder(results, model, name, spec.memory_of)] if spec.memory_of else []
        for folder in folders:
            files |= _below(folder, f"{RESULTS}/{folder.relative_to(results).as_posix()}")
    if spec.needs_bank:
        for place in (results, request.own_dir):
            files |= _below(place / "banks", f"{RESULTS}/banks")
    return files


def _of_suite(path: str) -> dict[str, Path]:
    """Return a suite file with all that it includes and the data that lies beside it."""
    files = [file for file in dict.fromkeys(suite_files(Path(path))) if file.name.endswith(ENDINGS)]
    root = os.path.commonpath([file.parent for file in files])
    return {f"{SUITES}/{_key(path)}/{file.relative_to(root).as_posix()}": file for file in files}


def _below(folder: Path, target: str) -> dict[str, Path]:
    found = (path for path in sorted(folder.rglob("*")) if path.is_file() and path.name.endswith(ENDINGS))
    return {f"{target}/{path.relative_to(folder).as_posix()}": path for path in found}


def _key(path: str) -> str:
    return hashlib.sha256(path.encode()).hexdigest()[:12]


def unpack(folder: Path, sent: Iterable[Parcel]) -> None:
    """Write parcels below a folder.

    Raises:
        BenchError: One would lead out of it, or is of a kind that does not travel; or the write failed.
    """
    for parcel in sent:
        path = PurePosixPath(parcel.path)
        if path.is_absolute() or ".." in path.parts or not path.name.endswith(ENDINGS):
            raise BenchError(f"a file was sent to a place where none belongs: {parcel.path}")
        target = folder / path
        try:
            durable.make_folder(target.parent)
            durable.replace(target, parcel.content)
        except OSError as error:
            raise durable.write_failure(target, error) from error


def arrived(request: Request, folder: Path, unseen: frozenset[str], shared: bool) -> Request:
    """Return the request with what has travelled in the place where it now is."""
    changes: dict[str, Any] = {} if shared else {"results_dir": folder / RESULTS, "rows_dir": None}
    if request.checkpoint in unseen:
        changes["checkpoint"] = str(folder / NAMED / _key(str(request.checkpoint)))
    if request.settings.get(_MEMORY) in unseen:
        changes["settings"] = {**request.settings, _MEMORY: str(folder / NAMED / _key(request.settings[_MEMORY]))}
    changes["suites"] = tuple(suite_here(name, folder, unseen) for name in request.suites)
    return replace(request, **changes)


def suite_here(suite: str, folder: Path, unseen: frozenset[str]) -> str:
    """Return the name of a suite on the node."""
    if suite not in unseen:
        return suite
    return str(next((folder / SUITES / _key(suite)).rglob(Path(suite).name), suite))


def banks_made(folder: Path) -> Iterator[Parcel]:
    """Yield the banks of a node's own results folder."""
    for path in sorted((folder / RESULTS / "banks").glob("*.safetensors")):
        yield Parcel(f"banks/{path.name}", path.read_bytes())


def called_here(text: str, folder: str, request: Request, results: Path) -> str:
    """Return what a node says with the places of files that were sent to it called as the user calls them.

    Args:
        text: A sentence or a path.
        folder: Where the node keeps what is sent to it; empty where nothing is.
        request: As `absolute` returns it.
        results: The results folder as the user names it.
    """
    if not folder:
        return text
    text = text.replace(f"{folder}/{RESULTS}", str(results))
    for path in _named(request):
        text = text.replace(f"{folder}/{SUITES if is_file(path) else NAMED}/{_key(path)}", path)
    return text
