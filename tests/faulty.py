"""Installs the plugin of `tests/plugin` in a folder of a test, from where worker processes load it."""

from __future__ import annotations

import importlib
import json
import shutil
import sys
from pathlib import Path

import pytest

_PLUGIN = Path(__file__).parent / "plugin" / "bad_methods.py"


def install(folder: Path, monkeypatch: pytest.MonkeyPatch, faults: dict[str, str]) -> Path:
    """Make `--method faulty` known here and in processes that are started from here; faults by sample id."""
    info = folder / "bad_methods-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: bad-methods\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[flashmem_bench.methods]\nfaulty = bad_methods:SPEC\n")
    shutil.copy(_PLUGIN, folder)
    (folder / "faults.json").write_text(json.dumps(faults))
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.delitem(sys.modules, "bad_methods", raising=False)
    importlib.invalidate_caches()
    return folder
