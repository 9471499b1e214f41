"""Files that appear whole or not at all, and locks on them. The ground that records of a run directory are written
on."""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from pathlib import Path

_LOCK_POLL_S = 0.02


def replace_file(path: Path, raw: bytes, mode: int | None = None) -> None:
    """A reader sees the old bytes or the new ones. `mode` None follows the umask."""
    temporary = _beside(path)
    try:
        _write_new(temporary, raw, mode)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise


def create_file(path: Path, raw: bytes, mode: int | None = None) -> bool:
    """Creates `path` whole, unless it exists; True for the one caller that made it (atomic on NFS too: link(2))."""
    temporary = _beside(path)
    try:
        _write_new(temporary, raw, mode)
        try:
            os.link(temporary, path)
        except FileExistsError:
            return False
        return True
    finally:
        with contextlib.suppress(OSError):
            os.unlink(temporary)


def _beside(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}.{time.monotonic_ns()}")


def _write_new(path: Path, raw: bytes, mode: int | None) -> None:
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
    with open(os.open(path, flags, 0o666 if mode is None else mode), "wb") as file:
        file.write(raw)
        file.flush()
        os.fsync(file.fileno())


def append_line(path: Path, line: bytes) -> None:
    """With a single write, so that lines of several processes do not mix."""
    descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o666)
    try:
        size = os.fstat(descriptor).st_size
        if size and os.pread(descriptor, 1, size - 1) != b"\n":
            line = b"\n" + line  # the one before was cut short, this one need not be lost with it
        os.write(descriptor, line)
    finally:
        os.close(descriptor)


def lock_within(descriptor: int, patience_s: float) -> bool:
    """Locks the file for this descriptor alone (flock(2)); False where another one still has it after `patience_s`."""
    deadline = time.monotonic() + patience_s
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() > deadline:
                return False
            time.sleep(_LOCK_POLL_S)
