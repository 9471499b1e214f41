"""Directories on a node's own disk that several processes share and that the last of them removes.

Who uses one holds a shared lock on it, which the kernel takes back however the process ends. So what a killed job has
left is known by its free lock, and goes with the next job on the machine.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import stat
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from dtrain.cluster.errors import NodeError

_POLL_S = 0.01
_LOCK = ".lock"


@dataclass(frozen=True, slots=True, kw_only=True)
class Hold:
    """A directory that stays while this is held. Close it once."""

    path: Path
    descriptor: int

    def close(self) -> None:
        """Lets go of it; the last one to do so removes it."""
        os.close(self.descriptor)
        _remove_unused(self.path)
        _remove_base(self.path.parent)


def base_dir() -> Path:
    """Ours alone, in the folder for temporary files. Raises NodeError where somebody else has made it."""
    base = _base()
    while not _is_ours(base):
        with contextlib.suppress(FileExistsError):
            base.mkdir(mode=0o700)
            return base
        if not os.path.lexists(base) or _is_ours(base):
            continue  # its last user has removed it, or another has made it, between two looks
        raise NodeError(
            f"{base} is not a folder that only you may write to. Remove it, or set TMPDIR to another place."
        )
    return base


def _base() -> Path:
    return Path(tempfile.gettempdir(), f"dtrain-{os.getuid()}")


def _is_ours(base: Path) -> bool:
    try:
        found = base.lstat()
    except FileNotFoundError:
        return False
    return stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and not found.st_mode & 0o022


def hold(name: str, fill: Callable[[Path], None]) -> Hold:
    """The shared directory `name`, made by `fill` (given an empty one) if nobody has; others see it whole or not at
    all. Raises what `fill` raises."""
    while True:
        path = base_dir() / name
        try:
            descriptor = os.open(path.with_name(name + _LOCK), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except FileNotFoundError:
            continue  # the last user of another one has just removed the base
        try:
            if _take(descriptor, path, fill):
                return Hold(path=path, descriptor=descriptor)
        except BaseException:
            os.close(descriptor)
            _remove_unused(path)
            _remove_base(path.parent)
            raise
        os.close(descriptor)
        time.sleep(_POLL_S)


def _take(descriptor: int, path: Path, fill: Callable[[Path], None]) -> bool:
    """Whether `descriptor` now holds a shared lock on a whole directory; False: try again, with a new descriptor."""
    if not _lock(descriptor, fcntl.LOCK_SH) or not _is_current(descriptor, path):
        return False
    if path.is_dir():
        return True
    fcntl.flock(descriptor, fcntl.LOCK_UN)
    if not _lock(descriptor, fcntl.LOCK_EX) or not _is_current(descriptor, path):
        return False
    if not path.is_dir():
        unfinished = path.with_name(path.name + ".new")
        shutil.rmtree(unfinished, ignore_errors=True)  # of one that was killed over it
        unfinished.mkdir(mode=0o700)
        try:
            fill(unfinished)
        except BaseException:
            shutil.rmtree(unfinished, ignore_errors=True)
            raise
        unfinished.rename(path)
    return False  # the next look takes the shared lock: turning one into the other is not atomic


def _lock(descriptor: int, how: int) -> bool:
    try:
        fcntl.flock(descriptor, how | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _is_current(descriptor: int, path: Path) -> bool:
    """Whether the locked file is still the one that others will find."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path.with_name(path.name + _LOCK)))
    except FileNotFoundError:
        return False


def sweep() -> None:
    """Removes what nobody holds: left by jobs that were killed."""
    base = _base()
    if not _is_ours(base):
        return
    for lock in base.glob(f"*{_LOCK}"):
        _remove_unused(lock.with_name(lock.name.removesuffix(_LOCK)))
    _remove_base(base)


def _remove_unused(path: Path) -> None:
    try:
        descriptor = os.open(path.with_name(path.name + _LOCK), os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return  # gone, or not ours to remove
    try:
        if _lock(descriptor, fcntl.LOCK_EX) and _is_current(descriptor, path):
            shutil.rmtree(path, ignore_errors=True)
            shutil.rmtree(path.with_name(path.name + ".new"), ignore_errors=True)
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path.with_name(path.name + _LOCK))
    finally:
        os.close(descriptor)


def _remove_base(base: Path) -> None:
    with contextlib.suppress(OSError):  # somebody has something in it
        base.rmdir()
