"""One cell of the results: its manifest, sample rows and texts.

A cell is a folder with three files. ``manifest.json`` says what
the cell is (identity, description, attempts, summary) and is replaced atomically. ``texts.jsonl`` and
``samples.jsonl`` get one line a sample, each in one write followed by fsync, the text first: a sample is done
only when both lines are whole.

What a crash can leave is a text without its row, or a torn last line. Readers ignore either; the next writer
cuts the torn line off and the sample runs again. A sample that was written twice counts once, with its last
row. A broken line anywhere else is not the work of a crash, so it is reported rather than repaired.

Invariants: one process at a time writes a cell; no write failure is swallowed. The module imports neither torch nor
    pandas, and computes no statistics.
"""

from __future__ import annotations

import fcntl
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, BinaryIO

from flashmem_bench.durable import append_line, make_folder, read_json, replace, replace_json, write_failure
from flashmem_bench.errors import StoreError
from flashmem_bench.lines import by_sample, line, plain, scalar, whole_bytes
from flashmem_bench.schema import SCHEMA_VERSION


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
        return read_json(path) if path.exists() else {}

    def get(self, key: str, default: Any = None) -> Any:
        """A value of the description, else of the identity, else the default."""
        manifest = self.manifest
        return manifest.get("descr", {}).get(key, manifest.get("identity", {}).get(key, default))

    def rows(self) -> list[dict[str, Any]]:
        """The finished samples, each once, in the order in which they first appeared.

        Raises:
            StoreError: a line other than the last is broken.
        """
        texts = by_sample(self.path / "texts.jsonl")
        return [row for key, row in by_sample(self.path / "samples.jsonl").items() if key in texts]

    def texts(self) -> dict[str, dict[str, Any]]:
        """The texts by sample id, including a sample whose row never came."""
        return by_sample(self.path / "texts.jsonl")

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
            "texts.jsonl": line({**plain(text, "text"), "sample_id": row["sample_id"]}),
            "samples.jsonl": line({key: scalar(value, key) for key, value in row.items()}),
        }
        self._open_for_writing()
        for name, written in lines.items():
            append_line(self._files[name], written, self.path / name)

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
            held = by_sample(path)
            new = {row["sample_id"]: {key: scalar(value, key) for key, value in row.items()} for row in rows}
            missing = sorted(new.keys() - held.keys())
            if missing:
                raise KeyError(f"{self.path} has no sample {missing[0]}")
            replace(path, b"".join(line(row) for row in {**held, **new}.values()))
            manifest = self.manifest
            manifest["summary"] = {**manifest.get("summary", {}), **summary}
            manifest.setdefault("revisions", []).append({"at": _now(), **note})
            self._save(manifest)
        finally:
            # The open file is the one that was replaced.
            self.close()

    def close(self) -> None:
        """Close the files and release the lock; reading stays possible."""
        for handle in [*self._files.values(), *([self._lock] if self._lock else [])]:
            handle.close()
        self._files, self._lock = {}, None

    def describe(self, identity: dict[str, Any], descr: dict[str, Any]) -> None:
        """Write what the cell is; see `ResultStore.open_cell`."""
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
            make_folder(self.path)
            self._save(new)

    def _save(self, manifest: dict[str, Any]) -> None:
        replace_json(self.path / "manifest.json", plain(manifest, "manifest"))

    def _open_for_writing(self) -> None:
        if self._files:
            return
        make_folder(self.path)
        try:
            lock = (self.path / ".lock").open("ab")
            self._take(lock)
            self._files = {
                name: (self.path / name).open("ab", buffering=0) for name in ("texts.jsonl", "samples.jsonl")
            }
            for name, handle in self._files.items():
                handle.truncate(whole_bytes(self.path / name))
        except OSError as error:
            raise write_failure(self.path, error) from error

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
