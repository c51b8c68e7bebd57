"""Removing what a program has left in folders, whatever it made of them."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path


def clear(layer: str, folder: str, uid: int | None) -> None:
    """Remove the folder of a program, and what its own user has left elsewhere; in namespaces nothing was on disk."""
    if "namespaces" in layer or not os.path.isdir(folder):
        return
    if layer == "uid" and uid:
        remove_owned(uid, {str(Path(folder).parent), "/tmp", "/var/tmp", "/dev/shm"})
    if os.path.isdir(folder):
        remove(Path(folder))


def remove_owned(uid: int, folders: set[str]) -> None:
    """Remove what a user that exists for one program alone has in folders open to everybody."""
    for folder in folders:
        for path in Path(folder).glob("*"):
            # Others come and go there.
            with contextlib.suppress(FileNotFoundError):
                if path.lstat().st_uid == uid:
                    path.unlink() if path.is_symlink() or not path.is_dir() else remove(path)


def remove(folder: Path) -> None:
    """Remove a folder whose owner is gone, however deep it is: step by step, since a path could be too long."""
    os.chmod(folder, 0o700)
    names: list[str] = []
    current = os.open(folder, os.O_RDONLY)
    while (below := _empty(current)) is not None or names:
        if below is not None:
            os.chmod(below, 0o700, dir_fd=current)
            names.append(below)
            current = _step(current, below)
        else:
            current = _step(current, "..")
            os.rmdir(names.pop(), dir_fd=current)
    os.close(current)
    os.rmdir(folder)


def _step(current: int, name: str) -> int:
    following = os.open(name, os.O_RDONLY, dir_fd=current)
    os.close(current)
    return following


def _empty(current: int) -> str | None:
    """Remove the files of an open folder up to its first folder, which is returned."""
    with os.scandir(current) as entries:
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                return entry.name
            os.unlink(entry.name, dir_fd=current)
    return None
