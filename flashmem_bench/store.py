"""The results folder: where the cells lie and which version of the results it holds.

A cell is one folder ``<root>/runs/<suite>/<method>/<cell id>/`` (see `cell_store`).

Invariants: an id is the hash of the identity alone, so the same command finds its cell again; no suite or method name
    can lead out of the folder. The module imports neither torch nor pandas.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flashmem_bench.cell_store import CellStore
from flashmem_bench.durable import make_folder, read_json, replace_json, write_failure
from flashmem_bench.errors import StoreError
from flashmem_bench.migrations import can_migrate, migrate
from flashmem_bench.places import refuse_links, safe_name
from flashmem_bench.schema import SCHEMA_VERSION

_PROJECT = "flashmem-bench"


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


class ResultStore:
    """All cells of one results folder.

    Args:
        root: the results folder; made when absent.

    Raises:
        StoreError: the folder cannot be written, has a link that leads out of it, or holds results of a schema that
            this version cannot bring to its own.
    """

    def __init__(self, root: Path):
        self.root = Path(root)
        try:
            make_folder(self.root)
            with tempfile.TemporaryFile(dir=self.root):
                pass
        except OSError as error:
            reason = error.strerror or str(error)
            raise StoreError(
                f"cannot write to the results folder {self.root} ({reason}); choose another with --results-dir"
            ) from error
        refuse_links(self.root)
        self._check_schema()

    def _check_schema(self) -> None:
        path = self.root / "SCHEMA.json"
        if not path.exists():
            try:
                replace_json(path, {"project": _PROJECT, "schema_version": SCHEMA_VERSION})
            except OSError as error:
                raise write_failure(path, error) from error
            return
        found = read_json(path).get("schema_version")
        if found != SCHEMA_VERSION and can_migrate(found):
            migrate(self.root, path)
        elif found != SCHEMA_VERSION:
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
        cell.describe(json.loads(json.dumps(identity)), {**descr, "suite": names[0], "method": names[1]})
        return cell

    def cells(self) -> list[CellStore]:
        """All cells, ordered by suite, method and id."""
        found = sorted((self.root / "runs").glob("*/*/*/manifest.json"))
        return [CellStore(path.parent, path.parent.name) for path in found]

    def find(self, **where: Any) -> list[CellStore]:
        """The cells whose description (else identity) has all the given values."""
        return [cell for cell in self.cells() if _matches(cell, where)]


def _matches(cell: CellStore, where: Mapping[str, Any]) -> bool:
    try:
        return all(cell.get(key) == value for key, value in where.items())
    except StoreError:
        # Nobody knows what a broken manifest said; `report` and `verify` name it.
        return False
