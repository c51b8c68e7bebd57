"""The hashes of the bundled backbone's files, so that a damaged one is named instead of answering differently.

A cell knows its backbone by a fingerprint over a sample of every weight, which tells models apart and costs nothing for
a large one; it does not see each bit, nor the tokenizer. The bundled backbone is small, so each of its files is hashed
when it is loaded.
"""

from __future__ import annotations

import json
from pathlib import Path

from flashmem.errors import CheckpointError
from flashmem.integrity import file_hash, require_hash, require_seal, sealed

SUMS = "sums.json"
_MEND = "install flashmem again, or make the bundled model anew with `make tiny`"
# Read by people alone.
_PROSE = {"README.md", SUMS}


def write_sums(folder: Path) -> None:
    """Write the hash of every file of the folder into `sums.json`."""
    files = {path.name: file_hash(path) for path in sorted(folder.iterdir()) if path.name not in _PROSE}
    (folder / SUMS).write_text(json.dumps(sealed({"files": files}), indent=2) + "\n", encoding="utf-8")


def check_sums(folder: Path) -> None:
    """Refuse a folder in which a file is not what `write_sums` saw.

    Raises:
        CheckpointError: the file, and both hashes; or a file that is missing.
    """
    path = folder / SUMS
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        files = dict(record["files"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} is missing or damaged: {_MEND}.") from error
    require_seal(record, path, _MEND)
    for name, wanted in files.items():
        try:
            found = file_hash(folder / name)
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{folder / name} is missing or cannot be read: {_MEND}.") from error
        require_hash(folder / name, str(wanted), found, _MEND)
