"""One cell of the results: its manifest, sample rows and texts.

A cell is a folder with three files. `manifest.json` says what the cell is (identity, description, attempts, summary)
and is replaced atomically. `texts.jsonl` and `samples.jsonl` get one line a sample, the text first, and each is flushed
before the next begins: a sample is done only when both lines are whole.

What a kill can leave is a text without its row, or broken lines at the end. Readers ignore either; the next writer cuts
broken lines off and the samples run again. A sample that was written twice counts once, with its last row. The order
of lines means nothing. A broken line anywhere else is a fault of the disk, so it is reported rather than skipped, and
`flashmem-bench verify --repair` puts it aside in `quarantine.jsonl`.

Invariants: one process at a time writes a cell (see `lease`), and makes sure of it before every write; no write failure
is swallowed; no row is cut off that another process may have written. The module imports neither torch nor pandas, and
computes no statistics.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from itertools import count
from pathlib import Path
from typing import Any, BinaryIO

from flashmem_bench.durable import (
    append,
    make_folder,
    read_json,
    remove_leftovers,
    replace,
    replace_json,
    sync_folder,
    take_back,
    write_failure,
)
from flashmem_bench.errors import StoreError
from flashmem_bench.lease import EXPIRY_S, PERIOD_S, Claim, ClaimHeld
from flashmem_bench.lines import by_sample, encode, plain, scalar
from flashmem_bench.quarantine import cut_broken_end, remove_broken
from flashmem_bench.schema import SCHEMA_VERSION, wrong_text_type, wrong_type

SAMPLES, TEXTS, MANIFEST = "samples.jsonl", "texts.jsonl", "manifest.json"
_REPAIR = "put it aside with flashmem-bench verify --repair, then run the same command again"


class CellStore:
    """One cell: its manifest, sample rows and texts.

    Args:
        path: folder of the cell.
        identifier: id of the cell.
        period_s: how often the claim of a writer is touched.
        expiry_s: after so many seconds without a touch another machine may take the cell over.
    """

    def __init__(self, path: Path, identifier: str, *, period_s: float = PERIOD_S, expiry_s: float = EXPIRY_S):
        self.path = path
        self.cell_id = identifier
        self.period_s, self.expiry_s = period_s, expiry_s
        self._files: dict[str, BinaryIO] = {}
        self._claim: Claim | None = None
        self._attempt = 0

    @property
    def manifest(self) -> dict[str, Any]:
        """The manifest as it stands on disk; empty before the cell was described.

        Raises:
            StoreError: it is broken.
        """
        path = self.path / MANIFEST
        if not path.exists():
            return {}
        manifest = read_json(path, _REPAIR)
        if not _is_manifest(manifest):
            raise StoreError(f"{path} is no manifest of a cell; {_REPAIR}")
        return manifest

    def get(self, key: str, default: Any = None) -> Any:
        """A value of the description, else of the identity, else the default."""
        manifest = self.manifest
        return manifest.get("descr", {}).get(key, manifest.get("identity", {}).get(key, default))

    @property
    def title(self) -> str:
        """Suite and method in words, as well as they can be known."""
        try:
            return f"{self.get('suite')} x {self.get('method')}"
        except StoreError:
            return f"{self.path.parent.parent.name} x {self.path.parent.name}"

    def rows(self) -> list[dict[str, Any]]:
        """The finished samples, each once, in the order in which they first appeared.

        Raises:
            StoreError: a line before the last whole one is broken, or was changed into something that is no row.
        """
        texts = self.texts()
        rows = [row for key, row in by_sample(self.path / SAMPLES).items() if key in texts]
        for row in rows:
            self._require(wrong_type(row), row, SAMPLES)
        return rows

    def texts(self) -> dict[str, dict[str, Any]]:
        """The texts by sample id, including a sample whose row never came; raises as `rows`."""
        texts = by_sample(self.path / TEXTS)
        for text in texts.values():
            self._require(wrong_text_type(text), text, TEXTS)
        return texts

    def _require(self, odd: str | None, record: Mapping[str, Any], name: str) -> None:
        # A checksum rules this out, unless a line was written by hand.
        if odd is not None:
            raise StoreError(
                f"{odd} of sample {record['sample_id']} in {self.path / name} is {record[odd]!r}; remove that line and "
                "run the same command again"
            )

    def done(self) -> set[str]:
        """Ids of the finished samples."""
        return {row["sample_id"] for row in self.rows()}

    def append(self, row: dict[str, Any], text: dict[str, Any]) -> None:
        """Write one finished sample, see `append_many`."""
        self.append_many([(row, text)])

    def append_many(self, samples: Sequence[tuple[dict[str, Any], dict[str, Any]]]) -> None:
        """Write finished samples: their texts, then their rows, each durable before the next begins.

        Args:
            samples: A row and a text for each. Of a row: sample columns; values are int, float, str, bool or None, and
                a float that is not finite becomes null. Of a text: prompt, text, tokens, triggers and entropies; any
                JSON value; it gets the row's ``sample_id``.

        Raises:
            TypeError: a value of another type (a numpy scalar, a tensor).
            StoreError: the write failed, or another process writes this cell. None of the samples counts as done.
        """
        content = {
            TEXTS: [{**plain(text, "text"), "sample_id": row["sample_id"]} for row, text in samples],
            SAMPLES: [{key: scalar(value, key) for key, value in row.items()} for row, _ in samples],
        }
        blocks = {name: b"".join(encode(record) for record in records) for name, records in content.items()}
        claim = self._open_for_writing()
        for name, block in blocks.items():
            claim.check()
            self._append_durably(name, block)

    def _append_durably(self, name: str, block: bytes) -> None:
        handle = self._files[name]
        try:
            before = os.fstat(handle.fileno()).st_size
            append(handle, block)
            try:
                os.fsync(handle.fileno())
            except OSError:
                # Nobody knows which part of it the disk has.
                take_back(handle, before, len(block))
                raise
        except OSError as error:
            raise self._failure(self.path / name, error) from error

    def begin_attempt(self, info: dict[str, Any]) -> int:
        """Record the start of a run over this cell and claim it.

        Args:
            info: what is known of this start (hardware, versions, command).

        Returns:
            Number of the attempt, from 1; no row of another attempt has it.
        """
        self._open_for_writing()
        manifest = self.manifest
        attempts = manifest.setdefault("attempts", [])
        # A manifest that had to be made anew has forgotten its attempts, the rows have not.
        known = [attempt.get("attempt") for attempt in attempts] + [row.get("attempt") for row in self.rows()]
        self._attempt = 1 + max((number for number in known if isinstance(number, int)), default=0)
        attempts.append({"attempt": self._attempt, "started_at": _now(), **info})
        self._save(manifest)
        return self._attempt

    def finish(self, summary: dict[str, Any], attempt: Mapping[str, Any] | None = None) -> None:
        """Record the end of the attempt with its summary and release the cell.

        Args:
            summary: of all samples of the cell.
            attempt: what is known of the attempt now that it is over (``write_ms``, ``answered_by``).
        """
        self._open_for_writing()
        manifest = self.manifest
        manifest["summary"] = summary
        for entry in manifest.get("attempts", [])[-1:]:
            entry |= {**(attempt or {}), "finished_at": _now()}
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
            path = self.path / SAMPLES
            held = by_sample(path)
            new = {row["sample_id"]: {key: scalar(value, key) for key, value in row.items()} for row in rows}
            missing = sorted(new.keys() - held.keys())
            if missing:
                raise KeyError(f"{self.path} has no sample {missing[0]}")
            self._replace(path, b"".join(encode(row) for row in {**held, **new}.values()))
            manifest = self.manifest
            manifest["summary"] = {**manifest.get("summary", {}), **summary}
            manifest.setdefault("revisions", []).append({"at": _now(), **note})
            self._save(manifest)
        finally:
            # The open file is the one that was replaced.
            self.close()

    def amend(self, **entries: Any) -> None:
        """Replace entries of the manifest, such as `attempts` or `summary`; the others stay.

        Raises:
            StoreError: the write failed, or another process writes this cell.
        """
        with self.claimed():
            self._save({**self.manifest, **entries})

    def put_broken_lines_aside(self) -> dict[str, int]:
        """Move broken lines to the quarantine, so that their samples count as missing; how many, by file.

        Raises:
            StoreError: the write failed, or another process writes this cell.
        """
        found = {}
        with self.claimed():
            for name in (TEXTS, SAMPLES):
                try:
                    found[name] = remove_broken(self.path / name, self._take().check)
                except OSError as error:
                    raise self._failure(self.path / name, error) from error
        return {name: lines for name, lines in found.items() if lines}

    def put_broken_manifest_aside(self) -> Path | None:
        """Give a manifest that cannot be read another name and return it; None where there is nothing to do.

        Raises:
            StoreError: the folder cannot be written, or another process writes this cell.
        """
        try:
            _ = self.manifest
            return None
        except StoreError:
            pass
        with self.claimed():
            path = next(place for number in count(1) if not (place := self.path / f"manifest.broken-{number}").exists())
            self._take().check()
            try:
                (self.path / MANIFEST).rename(path)
                sync_folder(self.path)
            except OSError as error:
                raise self._failure(path, error) from error
        return path

    def close(self) -> None:
        """Close the files and release the claim; reading stays possible."""
        for handle in self._files.values():
            handle.close()
        claim, self._files, self._claim = self._claim, {}, None
        if claim is not None:
            claim.release()

    def describe(self, identity: dict[str, Any], descr: dict[str, Any]) -> None:
        """Write what the cell is; see `ResultStore.open_cell`.

        Raises:
            StoreError: another cell has this id, or there is something to write and another process writes this cell.
        """
        if self._described(identity, descr) == self.manifest:
            return
        with self.claimed():
            # Only now nobody else can change it.
            self._save(self._described(identity, descr))

    def _described(self, identity: dict[str, Any], descr: dict[str, Any]) -> dict[str, Any]:
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
        return plain(new, "manifest")

    @contextmanager
    def claimed(self) -> Iterator[None]:
        """Hold the claim for a moment, or go on holding it."""
        mine = self._claim is None
        self._take()
        try:
            yield
        finally:
            if mine:
                self.close()

    def _save(self, manifest: dict[str, Any]) -> None:
        self._take().check()
        try:
            replace_json(self.path / MANIFEST, plain(manifest, "manifest"))
        except OSError as error:
            raise self._failure(self.path / MANIFEST, error) from error

    def _replace(self, path: Path, content: bytes) -> None:
        self._take().check()
        try:
            replace(path, content)
        except OSError as error:
            raise self._failure(path, error) from error

    def _open_for_writing(self) -> Claim:
        claim = self._take()
        if self._files:
            return claim
        try:
            remove_leftovers(self.path)
            new = not all((self.path / name).exists() for name in (TEXTS, SAMPLES))
            for name in (TEXTS, SAMPLES):
                self._files[name] = (self.path / name).open("ab", buffering=0)
                cut_broken_end(self._files[name], self.path / name, claim.check)
            if new:
                sync_folder(self.path)
        except OSError as error:
            self.close()
            raise self._failure(self.path, error) from error
        return claim

    def _take(self) -> Claim:
        """Return the claim, taking it first where this object has none."""
        if self._claim is None:
            try:
                make_folder(self.path)
                self._claim = Claim.take(self.path, period_s=self.period_s, expiry_s=self.expiry_s)
            except ClaimHeld as held:
                raise StoreError(
                    f"another process is writing {self.title} in {self.path} ({held}); {held.advice}, or use another "
                    "--results-dir"
                ) from held
            except OSError as error:
                raise self._failure(self.path, error) from error
        return self._claim

    def _failure(self, path: Path, error: OSError) -> StoreError:
        try:
            safe = f"{len(self.done())} samples of {self.title} are safe in {self.path}"
        except StoreError:
            safe = f"what was written before is safe in {self.path}"
        return write_failure(path, error, safe)


def _is_manifest(value: dict[str, Any]) -> bool:
    """Whether a document has the shape that everything that reads a manifest relies on."""
    kinds = {"identity": dict, "descr": dict, "summary": dict, "attempts": list}
    if not all(isinstance(value.get(key, kind()), kind) for key, kind in kinds.items()):
        return False
    descr = value.get("descr", {})
    marks = descr.get("ablation") or []
    return (
        all(isinstance(descr.get(key), str) for key in ("suite", "method"))
        and all(isinstance(entry, dict) for entry in value.get("attempts", []))
        and isinstance(marks, list)
        and all(isinstance(mark, dict) and isinstance(mark.get("axis"), str) and "value" in mark for mark in marks)
    )


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def _joined(old: list[Any], new: list[Any]) -> list[Any]:
    return [*old, *(entry for entry in new if entry not in old)]
