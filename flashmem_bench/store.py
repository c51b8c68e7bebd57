"""The results folder: cells that survive a kill at any moment.

A cell is one folder ``<root>/runs/<suite>/<method>/<cell id>/`` with three files. ``manifest.json`` says what
the cell is (identity, description, attempts, summary) and is replaced atomically. ``texts.jsonl`` and
``samples.jsonl`` get one line a sample, each in one write followed by fsync, the text first: a sample is done
only when both lines are whole.

What a crash can leave is a text without its row, or a torn last line. Readers ignore either; the next writer
cuts the torn line off and the sample runs again. A sample that was written twice counts once, with its last
row. A broken line anywhere else is not the work of a crash, so it is reported rather than repaired.

Invariants: an id is the hash of the identity alone, so the same command finds its cell again; one process at
    a time writes a cell; no suite or method name can lead out of the folder; no write failure is swallowed.
    The module imports neither torch nor pandas, and computes no statistics.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import math
import os
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, BinaryIO

from flashmem_bench.errors import StoreError
from flashmem_bench.schema import SCHEMA_VERSION

_PROJECT = "flashmem-bench"
_MAX_NAME = 80


def cell_id(identity: Mapping[str, Any]) -> str:
    """First 16 hex digits of the SHA-256 of the identity as canonical JSON.

    Args:
        identity: JSON-serialisable mapping; key order does not matter.

    Raises:
        TypeError: a value that JSON cannot hold.
        ValueError: a number that is not finite.
    """
    canonical = json.dumps(identity, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]


def safe_name(name: str) -> str:
    """A folder name for a suite or method that cannot leave its parent folder.

    Plain names stay as they are. Any other gets its odd characters replaced and a short hash of the original,
    so that two names never share a folder.
    """
    plain = re.sub(r"[^A-Za-z0-9._-]", "_", name).lstrip(".")[:_MAX_NAME]
    if plain == name and name:
        return name
    return f"{plain or '_'}-{hashlib.sha256(name.encode('utf-8', 'replace')).hexdigest()[:6]}"


class ResultStore:
    """All cells of one results folder.

    Args:
        root: the results folder; made when absent.

    Raises:
        StoreError: the folder cannot be written, or holds results of another schema.
    """

    def __init__(self, root: Path):
        self.root = Path(root)
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.root):
                pass
        except OSError as error:
            reason = error.strerror or str(error)
            raise StoreError(
                f"cannot write to the results folder {self.root} ({reason}); choose another with --results-dir"
            ) from error
        self._check_schema()

    def _check_schema(self) -> None:
        path = self.root / "SCHEMA.json"
        if not path.exists():
            _replace_json(path, {"project": _PROJECT, "schema_version": SCHEMA_VERSION})
            return
        found = _read_json(path).get("schema_version")
        if found != SCHEMA_VERSION:
            raise StoreError(
                f"the results folder {self.root} has schema version {found}, this program writes "
                f"{SCHEMA_VERSION}; choose another with --results-dir or use the version of flashmem-bench that made it"
            )

    def open_cell(self, identity: dict[str, Any], descr: dict[str, Any]) -> CellStore:
        """Find or make the cell of an identity.

        Args:
            identity: everything that can change an answer; its hash is the cell's id.
            descr: what people want to know about the cell. ``suite`` and ``method`` are required here or in
                the identity. Opening an existing cell again updates its description; entries of the list
                ``descr["ablation"]`` are joined, so that a cell may serve several axes.

        Raises:
            StoreError: the names are missing, or the folder holds another identity.
        """
        names = [str(descr.get(key) or identity.get(key) or "") for key in ("suite", "method")]
        if not all(names):
            raise StoreError("a cell needs the names of its suite and its method")
        identifier = cell_id(identity)
        path = self.root / "runs" / safe_name(names[0]) / safe_name(names[1]) / identifier
        cell = CellStore(path, identifier)
        cell._describe(json.loads(json.dumps(identity)), {**descr, "suite": names[0], "method": names[1]})
        return cell

    def cells(self) -> list[CellStore]:
        """All cells, ordered by suite, method and id."""
        found = sorted((self.root / "runs").glob("*/*/*/manifest.json"))
        return [CellStore(path.parent, path.parent.name) for path in found]

    def find(self, **where: Any) -> list[CellStore]:
        """The cells whose description (else identity) has all the given values."""
        return [cell for cell in self.cells() if all(cell.get(key) == value for key, value in where.items())]


class CellStore:
    """One cell: its manifest, sample rows and texts.

    Args:
        path: folder of the cell.
        identifier: id of the cell.
    """

    def __init__(self, path: Path, identifier: str):
        self.path = path
        self.cell_id = identifier
        self._files: dict[str, BinaryIO] = {}
        self._lock: BinaryIO | None = None

    @property
    def manifest(self) -> dict[str, Any]:
        """The manifest as it stands on disk; empty before the cell was described."""
        path = self.path / "manifest.json"
        return _read_json(path) if path.exists() else {}

    def get(self, key: str, default: Any = None) -> Any:
        """A value of the description, else of the identity, else the default."""
        manifest = self.manifest
        return manifest.get("descr", {}).get(key, manifest.get("identity", {}).get(key, default))

    def rows(self) -> list[dict[str, Any]]:
        """The finished samples, each once, in the order in which they first appeared.

        Raises:
            StoreError: a line other than the last is broken.
        """
        texts = _by_sample(self.path / "texts.jsonl")
        return [row for key, row in _by_sample(self.path / "samples.jsonl").items() if key in texts]

    def texts(self) -> dict[str, dict[str, Any]]:
        """The texts by sample id, including a sample whose row never came."""
        return _by_sample(self.path / "texts.jsonl")

    def done(self) -> set[str]:
        """Ids of the finished samples."""
        return {row["sample_id"] for row in self.rows()}

    def append(self, row: dict[str, Any], text: dict[str, Any]) -> None:
        """Write one finished sample: its text, then its row, each durable before the next begins.

        Args:
            row: sample columns; values are int, float, str, bool or None. A float that is not finite becomes
                null.
            text: prompt, text, tokens, triggers and entropies; any JSON value. Gets the row's ``sample_id``.

        Raises:
            TypeError: a value of another type (a numpy scalar, a tensor).
            StoreError: the write failed, or another process writes this cell.
        """
        lines = {
            "texts.jsonl": _line({**_plain(text, "text"), "sample_id": row["sample_id"]}),
            "samples.jsonl": _line({key: _scalar(value, key) for key, value in row.items()}),
        }
        self._open_for_writing()
        for name, line in lines.items():
            _append_line(self._files[name], line, self.path / name)

    def begin_attempt(self, info: dict[str, Any]) -> int:
        """Record the start of a run over this cell and take its lock.

        Args:
            info: what is known of this start (hardware, versions, command).

        Returns:
            Number of the attempt, from 1.
        """
        self._open_for_writing()
        manifest = self.manifest
        attempts = manifest.setdefault("attempts", [])
        attempts.append({"attempt": len(attempts) + 1, "started_at": _now(), **info})
        self._save(manifest)
        return len(attempts)

    def finish(self, summary: dict[str, Any]) -> None:
        """Record the end of the attempt with its summary and release the cell."""
        manifest = self.manifest
        manifest["summary"] = summary
        if manifest.get("attempts"):
            manifest["attempts"][-1]["finished_at"] = _now()
        self._save(manifest)
        self.close()

    def revise(self, rows: list[dict[str, Any]], summary: Mapping[str, Any], note: Mapping[str, Any]) -> None:
        """Replace rows of samples that are there already, all at once; texts and all other rows stay.

        Args:
            rows: Whole rows; each takes the place of the row with its ``sample_id``.
            summary: What changes in the cell's summary.
            note: Kept in the manifest's list ``revisions`` with the time.

        Raises:
            KeyError: A row of a sample that the cell does not have.
            TypeError: A value that cannot be stored.
            StoreError: The write failed, or another process writes this cell.
        """
        self._open_for_writing()
        try:
            path = self.path / "samples.jsonl"
            held = _by_sample(path)
            new = {row["sample_id"]: {key: _scalar(value, key) for key, value in row.items()} for row in rows}
            missing = sorted(new.keys() - held.keys())
            if missing:
                raise KeyError(f"{self.path} has no sample {missing[0]}")
            _replace(path, b"".join(_line(row) for row in {**held, **new}.values()))
            manifest = self.manifest
            manifest["summary"] = {**manifest.get("summary", {}), **summary}
            manifest.setdefault("revisions", []).append({"at": _now(), **note})
            self._save(manifest)
        finally:
            # The open file is the one that was replaced.
            self.close()

    def append_many(self, samples: Sequence[tuple[dict[str, Any], dict[str, Any]]]) -> None:
        """Write finished samples, see `append`."""
        for row, text in samples:
            self.append(row, text)

    def amend(self, **entries: Any) -> None:
        """Replace entries of the manifest, such as `attempts` or `summary`; the others stay."""
        self._open_for_writing()
        self._save({**self.manifest, **entries})

    @contextmanager
    def claimed(self) -> Iterator[None]:
        """Keep all other processes from writing the cell.

        Raises:
            StoreError: another process writes it.
        """
        self._open_for_writing()
        try:
            yield
        finally:
            self.close()

    def close(self) -> None:
        """Close the files and release the lock; reading stays possible."""
        for handle in [*self._files.values(), *([self._lock] if self._lock else [])]:
            handle.close()
        self._files, self._lock = {}, None

    def _describe(self, identity: dict[str, Any], descr: dict[str, Any]) -> None:
        old = self.manifest
        if old and old.get("identity") != identity:
            raise StoreError(f"{self.path} holds another cell of the same id; move that folder away")
        ablation = _joined(old.get("descr", {}).get("ablation") or [], descr.get("ablation") or [])
        new = {
            "schema_version": SCHEMA_VERSION,
            "cell": self.cell_id,
            "created_at": _now(),
            "attempts": [],
            "summary": {},
            **old,
            "identity": identity,
            "descr": {**old.get("descr", {}), **descr, "ablation": ablation},
            # Asked for by itself as well: it belongs in the headline tables, whatever axes it serves.
            "direct": bool(old.get("direct")) or not descr.get("ablation"),
        }
        if new != old:
            _make_folder(self.path)
            self._save(new)

    def _save(self, manifest: dict[str, Any]) -> None:
        _replace_json(self.path / "manifest.json", _plain(manifest, "manifest"))

    def _open_for_writing(self) -> None:
        if self._files:
            return
        _make_folder(self.path)
        try:
            lock = (self.path / ".lock").open("ab")
            self._take(lock)
            self._files = {
                name: (self.path / name).open("ab", buffering=0) for name in ("texts.jsonl", "samples.jsonl")
            }
            for name, handle in self._files.items():
                handle.truncate(_whole_bytes(self.path / name))
        except OSError as error:
            raise _write_failure(self.path, error) from error

    def _take(self, lock: BinaryIO) -> None:
        # A POSIX record lock: gone with its process even after SIGKILL, and no obstacle within one process.
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            lock.close()
            raise StoreError(f"another process is writing {self.path}; wait for it or use another folder") from error
        self._lock = lock


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def _joined(old: list[Any], new: list[Any]) -> list[Any]:
    return [*old, *(entry for entry in new if entry not in old)]


def _scalar(value: Any, key: str) -> Any:
    if value is None or type(value) in (bool, int):
        return value
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, str):
        # A lone surrogate, which a tokenizer can produce, has no UTF-8 form.
        return value.encode("utf-8", "replace").decode("utf-8")
    raise TypeError(f"{key} holds a {type(value).__name__}; only int, float, str, bool and None can be stored")


def _plain(value: Any, key: str) -> Any:
    if isinstance(value, Mapping):
        return {str(_scalar(name, key)): _plain(entry, f"{key}.{name}") for name, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry, key) for entry in value]
    return _scalar(value, key)


def _line(record: dict[str, Any]) -> bytes:
    return json.dumps(record, ensure_ascii=False, allow_nan=False).encode("utf-8") + b"\n"


def _append_line(handle: BinaryIO, line: bytes, path: Path) -> None:
    size = os.fstat(handle.fileno()).st_size
    try:
        if handle.write(line) != len(line):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        os.fsync(handle.fileno())
    except OSError as error:
        # A full disk may have taken half the line; the file stays whole for the next attempt.
        os.truncate(path, size)
        raise _write_failure(path, error) from error


def _write_failure(path: Path, error: OSError) -> StoreError:
    reason = error.strerror or str(error)
    return StoreError(f"cannot write {path} ({reason}); nothing was lost, run the same command again once mended")


def _make_folder(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _write_failure(path, error) from error


def _whole_bytes(path: Path) -> int:
    """Length of the file up to the end of its last whole line."""
    data = path.read_bytes()
    end = data.rfind(b"\n") + 1
    last = data[:end].rstrip(b"\n").rfind(b"\n") + 1
    # A last line with its newline can still be torn: a power cut may leave zeros where its bytes should be.
    return end if end == 0 or _parsed(data[last:end]) is not None else last


def _parsed(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) and "sample_id" in record else None


def _records(path: Path) -> Iterator[dict[str, Any]]:
    if not path.exists():
        return
    lines = path.read_bytes().split(b"\n")
    # Without a newline at its end the last line was cut short, even if what is there happens to parse.
    whole = lines[:-1]
    for number, line in enumerate(whole, start=1):
        record = _parsed(line)
        if record is None and number < len(whole):
            raise StoreError(f"line {number} of {path} is broken; delete that line and run the same command again")
        if record is not None:
            yield record


def _by_sample(path: Path) -> dict[str, dict[str, Any]]:
    return {record["sample_id"]: record for record in _records(path)}


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise StoreError(f"cannot read {path} ({error}); move it away and run the command again") from error
    if not isinstance(value, dict):
        raise StoreError(f"{path} does not hold a JSON object; move it away and run the command again")
    return value


def _replace_json(path: Path, value: dict[str, Any]) -> None:
    _replace(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False).encode("utf-8") + b"\n")


def _replace(path: Path, content: bytes) -> None:
    """Write a file so that a reader sees the old or the new one, never a part."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as handle:
            handle.write(content)
            handle.flush()
            os.fsync(handle.fileno())
        temporary.replace(path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as error:
        raise _write_failure(path, error) from error
