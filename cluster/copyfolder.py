"""The folder in which a copy of a run directory lies (cluster/mirror.py): what is in it, and the end of those that
nobody looks into any more."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

from dtrain.cluster.atomic import lock_within
from dtrain.cluster.remote import kind_of

MARK = ".remote.json"  # {"url", "node"} at the top of a copy
STATE = ".mirror.json"
LOCK = ".lock"  # touched by each use
_OLD_S = 30 * 86400.0
_GONE = ".gone"


def sign_of(path: Path) -> list[int]:
    """Differs when the file was written anew. Raises FileNotFoundError."""
    status = path.stat()
    return [status.st_ino, status.st_size, status.st_mtime_ns]


def files_of(top: Path) -> Iterator[Path]:
    """All that a copy and its store are to have alike."""
    for place, folders, names in os.walk(top):
        if place == str(top):
            folders[:] = [name for name in folders if name not in ("code", "checkpoints")]
        folders[:] = [name for name in folders if not name.startswith(".")]
        yield from (Path(place, name) for name in names if not name.startswith("."))


def remove_old(parent: Path) -> None:
    """Removes the copies in `parent` that nobody has used for 30 days, unless something in them is not in the store."""
    for left in parent.glob(f"*{_GONE}"):  # by one that was killed over it
        shutil.rmtree(left, ignore_errors=True)
    for mark in parent.glob(f"*/{MARK}"):
        with contextlib.suppress(OSError, ValueError):
            _remove_if_old(mark.parent)


def _remove_if_old(top: Path) -> None:
    with open(top / LOCK, "rb") as lock:
        if lock_within(lock.fileno(), 0) and time.time() - _last_used(top) > _OLD_S and _is_sent(top):
            shutil.rmtree(top.rename(top.with_name(top.name + _GONE)))


def _last_used(top: Path) -> float:
    """Looked into by a command, or written by a run on this machine."""
    return max(path.stat().st_mtime for path in (top / LOCK, *files_of(top)))


def _is_sent(top: Path) -> bool:
    """Whether every file is as it came from the store or went there."""
    state = json.loads((top / STATE).read_bytes())
    seen, came = state.get("seen", {}), state.get("in", {})
    for path in files_of(top):
        name = path.relative_to(top).as_posix()
        if kind_of(name) in ("record", "once"):
            known, found = seen.get(name, {}).get("sign"), sign_of(path)
        else:
            known, found = [came.get(name, {}).get(key) for key in ("file", "size")], sign_of(path)[:2]
        if known != found:
            return False
    return True
