"""System calls for the sandbox that Python 3.11 has no function for (Linux)."""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import sys

CLONE_NEWNS = 0x00020000
CLONE_NEWIPC = 0x08000000
CLONE_NEWUSER = 0x10000000
CLONE_NEWPID = 0x20000000
CLONE_NEWNET = 0x40000000

MS_NOSUID, MS_NODEV, MS_NOEXEC = 2, 4, 8
MS_REC, MS_PRIVATE = 1 << 14, 1 << 18

_PR_SET_DUMPABLE, _PR_SET_SECCOMP, _PR_SET_NO_NEW_PRIVS = 4, 22, 38
_PR_SET_CHILD_SUBREAPER, _PR_SET_PDEATHSIG = 36, 1
_SIGKILL = 9

# The number is the same on every architecture, as for all calls that are younger than 2019.
_NR_MOUNT_SETATTR = 442
_AT_FDCWD, _AT_RECURSIVE = -100, 0x8000
_MOUNT_ATTR_RDONLY = 1

# Machine -> its audit number and the numbers of socket, ptrace, process_vm_readv and process_vm_writev.
_MACHINES = {
    "x86_64": (0xC000003E, (41, 101, 310, 311)),
    "aarch64": (0xC00000B7, (198, 117, 270, 271)),
}
# io_uring can open sockets past a filter of system calls; pidfd_getfd takes other processes' files.
_EVERYWHERE = (425, 438)

_libc = ctypes.CDLL(None, use_errno=True)


def _check(result: int, what: str) -> None:
    if result != 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{what}: {os.strerror(code)}")


def unshare(flags: int) -> None:
    """Leave the namespaces named by `flags` for new ones; a new PID namespace is entered by the next fork."""
    _check(_libc.unshare(flags), "unshare")


def mount(source: str, target: str, kind: str | None, flags: int, data: str | None = None) -> None:
    """Put a file system at `target`; see the manual page of the call for the arguments."""
    arguments = [None if text is None else text.encode() for text in (source, target, kind)]
    _check(_libc.mount(*arguments, ctypes.c_ulong(flags), data.encode() if data else None), f"mount {target}")


class _MountAttr(ctypes.Structure):
    _fields_ = [(name, ctypes.c_uint64) for name in ("attr_set", "attr_clr", "propagation", "userns_fd")]


def make_read_only(path: str) -> None:
    """Make a mount and all mounts below it read-only, in this mount namespace (Linux 5.12 or newer)."""
    attr = _MountAttr(_MOUNT_ATTR_RDONLY, 0, 0, 0)
    size = ctypes.c_size_t(ctypes.sizeof(attr))
    number, folder, flags = ctypes.c_long(_NR_MOUNT_SETATTR), ctypes.c_int(_AT_FDCWD), ctypes.c_uint(_AT_RECURSIVE)
    _check(_libc.syscall(number, folder, path.encode(), flags, ctypes.byref(attr), size), "mount_setattr")


def _prctl(option: int, *arguments: int | ctypes.c_void_p) -> None:
    words = [value if isinstance(value, ctypes.c_void_p) else ctypes.c_ulong(value) for value in arguments]
    words += [ctypes.c_ulong(0)] * (4 - len(words))
    _check(_libc.prctl(option, *words), "prctl")


def adopt_orphans() -> None:
    """Become the parent of every descendant whose own parent ends."""
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)


def die_with_parent() -> None:
    """Be killed when the parent process ends."""
    _prctl(_PR_SET_PDEATHSIG, _SIGKILL)


def set_dumpable(on: bool) -> None:
    """Say whether other processes of the same user may look into this one."""
    _prctl(_PR_SET_DUMPABLE, int(on))


def forbid_new_privileges() -> None:
    """From here on no set-uid program gives privileges."""
    _prctl(_PR_SET_NO_NEW_PRIVS, 1)


class _Instruction(ctypes.Structure):
    _fields_ = [("code", ctypes.c_uint16), ("jt", ctypes.c_uint8), ("jf", ctypes.c_uint8), ("k", ctypes.c_uint32)]


class _Filter(ctypes.Structure):
    _fields_ = [("length", ctypes.c_uint16), ("instructions", ctypes.POINTER(_Instruction))]


def forbid_sockets() -> bool:
    """Refuse this process and its descendants new sockets and looks into other processes, for good.

    Returns:
        False where the filter does not know the machine or the kernel has no filters.
    """
    if platform.machine() not in _MACHINES or sys.maxsize < 2**32:
        return False
    load, equal, at_least, give = 0x20, 0x15, 0x35, 0x06
    allow, refuse, kill = 0x7FFF0000, 0x00050000 | errno.EPERM, 0x80000000
    audit, special = _MACHINES[platform.machine()]
    # The architecture first, since numbers mean other calls on another; then x86's second table of numbers.
    lines = [(load, 0, 0, 4), (equal, 1, 0, audit), (give, 0, 0, kill), (load, 0, 0, 0)]
    lines += [(at_least, 0, 1, 0x40000000), (give, 0, 0, refuse)]
    for number in (*special, *_EVERYWHERE):
        lines += [(equal, 0, 1, number), (give, 0, 0, refuse)]
    lines.append((give, 0, 0, allow))
    array = (_Instruction * len(lines))(*(_Instruction(*line) for line in lines))
    program = _Filter(len(lines), array)
    try:
        _prctl(_PR_SET_SECCOMP, 2, ctypes.cast(ctypes.pointer(program), ctypes.c_void_p))
    except OSError:
        return False
    return True
