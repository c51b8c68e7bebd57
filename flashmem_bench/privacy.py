"""What is recorded about a run names no secret and no person.

Commands, paths and messages of errors end up in manifests, rows and reports, and those are shared. Before they are
stored, secrets are taken out (values of environment variables that are named like one, the usual forms of tokens,
credentials in URLs, options and settings named like one), the home folder becomes `~`, and the names of the user and
the machine become `<user>` and `<host>`. What a person sees in the terminal stays as it was typed.
"""

from __future__ import annotations

import getpass
import os
import re
import socket
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

HIDDEN = "***"
_NAME = r"(?:secret|passw(?:or)?d|passphrase|credentials?|api[_-]?key|access[_-]?key|private[_-]?key|token)"
_NAMED = re.compile(rf"(?:^|[_-]){_NAME}(?:$|[_-])|^{_NAME}", re.IGNORECASE)
# hub.token=X, --token=X, "token": "X", and --token X; not tokens=5, which counts something, nor "token 3 of 5".
_GIVEN = re.compile(rf"((?<![a-z]){_NAME}(?![a-z0-9])[\"']?\s*[=:]\s*[\"']?)([^\s\"',;&]+)", re.IGNORECASE)
_OPTION = re.compile(rf"((?<!\S)--(?:[\w-]+-)?{_NAME}\s+[\"']?)([^\s\"']+)", re.IGNORECASE)
_URL = re.compile(r"([a-z][a-z0-9+.-]*://)[^\s/@\"']+@", re.IGNORECASE)
_FORMS = re.compile(
    r"hf_[A-Za-z0-9]{16,}|gh[pousr]_[A-Za-z0-9]{20,}|github_pat_\w{20,}|glpat-[\w-]{16,}|sk-[\w-]{16,}|"
    r"xox[abprs]-[\w-]{10,}|AKIA[0-9A-Z]{16}|AIza[\w-]{30,}|eyJ[\w-]{8,}\.eyJ[\w-]{8,}\.[\w-]+"
)
_SHORTEST = 6
# Names that say nothing about anybody, and would be taken out of ordinary words.
_COMMON = frozenset({"root", "user", "localhost", "nobody", "home"})


def redact(text: str) -> str:
    """Return text that may be stored and shared."""
    for secret in _secrets():
        text = text.replace(secret, HIDDEN)
    text = _FORMS.sub(HIDDEN, _URL.sub(rf"\1{HIDDEN}@", text))
    text = _OPTION.sub(rf"\1{HIDDEN}", _GIVEN.sub(rf"\1{HIDDEN}", text))
    for pattern, word in _people():
        text = pattern.sub(word, text)
    return text


def redacted(value: Any) -> Any:
    """Return a JSON value all of whose texts, keys aside, went through `redact`."""
    if isinstance(value, str):
        return redact(value)
    if isinstance(value, Mapping):
        return {key: redacted(entry) for key, entry in value.items()}
    return [redacted(entry) for entry in value] if isinstance(value, list | tuple) else value


def _secrets() -> list[str]:
    """The values of environment variables whose names say that they are secret, the longest first."""
    found = {value for name, value in os.environ.items() if _NAMED.search(name) and len(value) >= _SHORTEST}
    # A flag or a path is no secret.
    return sorted((value for value in found if not os.path.exists(value)), key=len, reverse=True)


def _people() -> list[tuple[re.Pattern[str], str]]:
    return _patterns(os.path.expanduser("~"), _user(), socket.gethostname())


@lru_cache(maxsize=4)
def _patterns(home: str, user: str, host: str) -> list[tuple[re.Pattern[str], str]]:
    found = []
    if len(home.strip("/")) > 1:
        found.append((re.compile(rf"(?<![\w.~-]){re.escape(home.rstrip('/'))}(?![\w.-])"), "~"))
    if len(user) > 1 and user.lower() not in _COMMON:
        # A person's name may be a word of a sentence; in a path, or before an address, it is the person.
        name = re.escape(user)
        found.append((re.compile(rf"(?<=/){name}(?=/|$|[\s\"',;:])|(?<!\w){name}(?=@)"), "<user>"))
    if len(host) > 3 and host.lower() not in _COMMON:
        found.append((re.compile(rf"(?<![\w-]){re.escape(host)}(?![\w-])"), "<host>"))
    return found


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # Nobody of this number is known here.
        return ""
