"""Audits what is installed: pins, files, licences, known vulnerabilities.

    make audit

Four checks. The first three need no network and are made everywhere:

* every installed distribution has the version that constraints.txt pins, and their demands on each other are met;
* every installed file has the hash that its distribution's RECORD gives;
* every direct dependency has a licence of the list below.

The fourth asks a vulnerability service through pip-audit, which gets an environment of its own so that it changes
nothing of what it audits. Where the service cannot be reached, or does not know a distribution, that is said and the
audit goes on: a machine without network must not fail, and a reader must not take silence for a clean bill. What is
found fails the audit unless .ci/vulnerabilities.toml lists it with a reason and the day on which that was judged.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import json
import re
import subprocess
import sys
import tomllib
import venv
from collections.abc import Iterable, Iterator, Mapping
from datetime import date
from importlib.metadata import Distribution, distributions
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PIP_AUDIT = "pip-audit==2.10.1"
OWN = "flashmem"
# They install the rest and come with the environment.
INSTALLERS = {"pip", "setuptools", "wheel"}
# Words of licences that may be used and passed on with this project.
LICENCES = ("apache", "mit", "bsd", "isc", "psf", "python software foundation", "mpl-2.0", "mozilla public license 2")
# Their metadata name a file, or nothing; read there, and who read it says what it is.
READ_BY_HAND: dict[str, str] = {}
_NAME = re.compile(r"^[A-Za-z0-9._-]+")
_DEADLINE_S = 300


def plain(name: str) -> str:
    """Return a distribution's name as indexes compare it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def pins(text: str) -> dict[str, str]:
    """Return name -> version of a constraints file."""
    lines = (line.partition("#")[0].strip() for line in text.splitlines())
    return {plain(name): version for name, _, version in (line.partition("==") for line in lines) if version}


def pin_problems(installed: Iterable[Distribution], pinned: Mapping[str, str]) -> Iterator[str]:
    """What is installed without a pin, or in another version."""
    for found in installed:
        name, version = plain(found.name), found.version.partition("+")[0]
        if name in INSTALLERS or name == OWN:
            continue
        if name not in pinned:
            yield f"{name} {version} is installed and not pinned in constraints.txt"
        elif pinned[name] != version:
            yield f"{name} {version} is installed, constraints.txt pins {pinned[name]}"


def record_problems(installed: Iterable[Distribution]) -> Iterator[str]:
    """Installed files that are not what their distribution's RECORD says."""
    for found in installed:
        if found.files is None:
            yield f"{found.name} has no RECORD: nobody can say what it installed"
        for file in found.files or ():
            # Compiled files, and RECORD itself, have no hash: they are made on the spot.
            if file.hash is not None and not _as_recorded(Path(str(file.locate())), file.hash.mode, file.hash.value):
                yield f"{found.name}: {file} is missing or not what was installed"


def _as_recorded(path: Path, mode: str, wanted: str) -> bool:
    try:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, mode).digest()
    except (OSError, ValueError):
        return False
    return base64.urlsafe_b64encode(digest).rstrip(b"=").decode() == wanted


def licence_problems(installed: Iterable[Distribution], direct: Iterable[str]) -> Iterator[str]:
    """Direct dependencies whose licence is not of the list."""
    wanted = {plain(name) for name in direct}
    for found in installed:
        if plain(found.name) in wanted:
            said = READ_BY_HAND.get(plain(found.name)) or licence(found)
            if not any(re.search(rf"\b{re.escape(word)}", said.lower()) for word in LICENCES):
                yield f"{found.name}: the licence is {said.strip()[:80] or 'not stated'!r}; read it, then say so here"


def licence(found: Distribution) -> str:
    """Return what a distribution says about its licence: the expression, the classifiers or the free text."""
    metadata = found.metadata
    classifiers = [text for text in metadata.get_all("Classifier") or [] if text.startswith("License ::")]
    return str(metadata.get("License-Expression") or "; ".join(classifiers) or metadata.get("License") or "")


def direct_dependencies(project: Mapping[str, Any]) -> list[str]:
    """Return the names that pyproject.toml asks for, extras included."""
    extras = project.get("optional-dependencies", {}).values()
    lines = [*project["dependencies"], *(line for extra in extras for line in extra)]
    return [match.group() for line in lines if (match := _NAME.match(line))]


def known_ignores(text: str) -> dict[str, str]:
    """Return vulnerability id -> reason of the reviewed list.

    Raises:
        SystemExit: an entry without its reason or the day on which it was judged.
    """
    ignored = {}
    for entry in tomllib.loads(text).get("ignore", []):
        complete = entry.get("id") and entry.get("reason") and isinstance(entry.get("reviewed"), date)
        if not complete:
            raise SystemExit(f"audit: {entry} of .ci/vulnerabilities.toml needs id, reason and reviewed (a date)")
        ignored[str(entry["id"])] = str(entry["reason"])
    return ignored


def vulnerability_problems(report: Mapping[str, Any], ignored: Mapping[str, str]) -> tuple[list[str], list[str]]:
    """Return what was found and what could not be looked up, from pip-audit's JSON."""
    found, unknown = [], []
    for entry in report["dependencies"]:
        if "skip_reason" in entry:
            unknown.append(str(entry["name"]))
        for one in entry.get("vulns", []):
            names = {one["id"], *one.get("aliases", [])}
            if not names & ignored.keys():
                mended = ", ".join(one.get("fix_versions") or []) or "no release"
                found.append(f"{entry['name']} {entry['version']}: {one['id']}, mended in {mended}")
    return found, unknown


def ask_service(environment: Path) -> tuple[dict[str, Any] | None, str]:
    """Return pip-audit's report on this environment, or None and why there is none."""
    tool = environment / "bin" / "pip-audit"
    quiet = ["--quiet", "--disable-pip-version-check"]
    try:
        if not tool.exists():
            venv.create(environment, with_pip=True, clear=True)
            _call([environment / "bin" / "python", "-m", "pip", "install", *quiet, PIP_AUDIT])
        line = [tool, "--path", *_site_packages(), "--format", "json", "--progress-spinner", "off"]
        done = _call(line, check=False)
        return json.loads(done.stdout), ""
    except subprocess.CalledProcessError as error:
        return None, f"{PIP_AUDIT} cannot be installed ({_last_line(error.stderr)})"
    except subprocess.TimeoutExpired:
        return None, f"no answer within {_DEADLINE_S} seconds"
    except ValueError:
        return None, f"the service cannot be reached ({_last_line(done.stderr)})"


def _site_packages() -> list[str]:
    return list(dict.fromkeys(str(Path(str(found.locate_file(""))).resolve()) for found in _installed()))


def _installed() -> list[Distribution]:
    return [found for found in distributions() if found.name and plain(found.name) != OWN]


def _call(line: list[Any], check: bool = True) -> subprocess.CompletedProcess[str]:
    parts = [str(part) for part in line]
    return subprocess.run(parts, check=check, capture_output=True, text=True, timeout=_DEADLINE_S)


def _last_line(text: str) -> str:
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "no message")


def offline_problems() -> list[str]:
    """Everything that can be checked without a network."""
    installed = _installed()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    found = list(pin_problems(installed, pins((ROOT / "constraints.txt").read_text(encoding="utf-8"))))
    demands = _call([sys.executable, "-m", "pip", "check", "--disable-pip-version-check"], check=False)
    found += [] if demands.returncode == 0 else demands.stdout.splitlines()
    found += record_problems(installed)
    found += licence_problems(installed, direct_dependencies(project))
    print(f"audit: {len(installed)} distributions: pins, demands, files and licences looked at")
    return found


def online_problems(environment: Path) -> list[str]:
    """What the vulnerability service knows, said plainly where it knows nothing."""
    report, why = ask_service(environment)
    if report is None:
        print(f"audit: VULNERABILITIES NOT CHECKED: {why}")
        return []
    ignored = known_ignores((ROOT / ".ci" / "vulnerabilities.toml").read_text(encoding="utf-8"))
    found, unknown = vulnerability_problems(report, ignored)
    every = len(report["dependencies"])
    print(f"audit: {every - len(unknown)} of {every} distributions looked up, {len(found)} vulnerabilities")
    if unknown:
        named = ", ".join(unknown[:5]) + (", ..." if len(unknown) > 5 else "")
        print(f"audit: VULNERABILITIES NOT CHECKED for {len(unknown)} that the service does not know: {named}")
    return found


def main() -> None:
    """Make all checks and fail on what they find."""
    parser = argparse.ArgumentParser(description="Audit the installed distributions.")
    parser.add_argument("--offline", action="store_true", help="ask no vulnerability service")
    parser.add_argument("--tool-environment", type=Path, default=ROOT / "build" / "audit", help="where pip-audit goes")
    asked = parser.parse_args()
    found = offline_problems()
    found += [] if asked.offline else online_problems(asked.tool_environment)
    for sentence in found:
        print(f"audit: {sentence}")
    sys.exit(f"audit: {len(found)} problems" if found else 0)


if __name__ == "__main__":
    main()
