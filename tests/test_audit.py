"""The audit of what is installed finds what it should; it is told of made-up distributions and reports."""

from __future__ import annotations

import base64
import hashlib
import importlib.util
import subprocess
from importlib.metadata import Distribution, PathDistribution
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent


def _load() -> Any:
    spec = importlib.util.spec_from_file_location("audit", ROOT / ".ci" / "audit.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


audit = _load()


def installed(
    folder: Path, name: str, version: str = "1.0", licence: str = "MIT", code: bytes = b"x = 1\n"
) -> Distribution:
    """A distribution of one file, with its RECORD."""
    digest = base64.urlsafe_b64encode(hashlib.sha256(code).digest()).rstrip(b"=").decode()
    info = folder / f"{name}-{version}.dist-info"
    info.mkdir(parents=True)
    (folder / f"{name}.py").write_bytes(code)
    (info / "METADATA").write_text(f"Name: {name}\nVersion: {version}\nLicense-Expression: {licence}\n")
    (info / "RECORD").write_text(f"{name}.py,sha256={digest},{len(code)}\n{info.name}/RECORD,,\n")
    return PathDistribution(info)


def test_versions_that_are_not_pinned_are_named(tmp_path: Path) -> None:
    found = [installed(tmp_path, "one", "2.0"), installed(tmp_path, "Two_a", "1.0+cpu"), installed(tmp_path, "three")]
    pinned = audit.pins("# a comment\none==1.0\ntwo.A==1.0  # why\n")
    problems = list(audit.pin_problems(found, pinned))
    assert problems == ["one 2.0 is installed, constraints.txt pins 1.0",
                        "three 1.0 is installed and not pinned in constraints.txt"]  # fmt: skip


def test_a_changed_a_missing_and_an_unrecorded_file_are_found(tmp_path: Path) -> None:
    found = [installed(tmp_path, name) for name in ("good", "changed", "gone", "unknown")]
    (tmp_path / "changed.py").write_bytes(b"x = 2\n")
    (tmp_path / "gone.py").unlink()
    (tmp_path / "unknown-1.0.dist-info" / "RECORD").unlink()
    problems = list(audit.record_problems(found))
    assert [line.split(":")[0].split()[0] for line in problems] == ["changed", "gone", "unknown"]


def test_a_licence_outside_the_list_is_found_for_direct_dependencies_alone(tmp_path: Path) -> None:
    said = {"free": "BSD-3-Clause", "odd": "Proprietary", "beneath": "Proprietary", "permit": "Permit-1"}
    found = [installed(tmp_path, name, licence=text) for name, text in said.items()]
    problems = list(audit.licence_problems(found, ["free", "odd", "permit"]))
    assert [line.split(":")[0] for line in problems] == ["odd", "permit"]


REPORT = {
    "dependencies": [
        {"name": "a", "version": "1", "vulns": [{"id": "X-1", "aliases": ["CVE-1"], "fix_versions": ["2"]}]},
        {"name": "b", "version": "1", "vulns": []},
        {"name": "c", "skip_reason": "not found"},
    ]
}


def test_a_known_vulnerability_fails_unless_somebody_judged_it() -> None:
    assert audit.vulnerability_problems(REPORT, {}) == (["a 1: X-1, mended in 2"], ["c"])
    judged = audit.known_ignores('[[ignore]]\nid = "CVE-1"\nreviewed = 2026-01-31\nreason = "never called"\n')
    assert audit.vulnerability_problems(REPORT, judged) == ([], ["c"])


@pytest.mark.parametrize(
    "entry", ['id = "CVE-1"', 'id = "CVE-1"\nreason = "x"', 'id="CVE-1"\nreason="x"\nreviewed="soon"']
)
def test_an_exception_without_reason_and_date_is_refused(entry: str) -> None:
    with pytest.raises(SystemExit, match="needs id, reason and reviewed"):
        audit.known_ignores(f"[[ignore]]\n{entry}\n")


@pytest.mark.parametrize("stage", ["install", "ask"])
def test_without_network_the_audit_says_so_and_goes_on(stage, tmp_path, monkeypatch, capsys) -> None:
    def call(line: list[Any], check: bool = True) -> Any:
        if stage == "install":
            raise subprocess.CalledProcessError(1, ["pip"], stderr="\nERROR: no route to host\n")
        return SimpleNamespace(stdout="", stderr="ConnectionError: no route to host\n", returncode=1)

    tool = tmp_path / "bin" / "pip-audit"
    if stage == "ask":
        tool.parent.mkdir()
        tool.touch()
    monkeypatch.setattr(audit, "_call", call)
    monkeypatch.setattr(audit.venv, "create", lambda *_, **__: None)
    assert audit.online_problems(tmp_path) == []
    said = capsys.readouterr().out
    assert "VULNERABILITIES NOT CHECKED" in said and "no route to host" in said


def test_every_direct_dependency_is_known_by_name() -> None:
    project = {"dependencies": ["torch>=2.8,<3", "math-verify>=0.9"], "optional-dependencies": {"x": ["pytest>=8"]}}
    assert audit.direct_dependencies(project) == ["torch", "math-verify", "pytest"]
