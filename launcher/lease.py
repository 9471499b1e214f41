"""Only one launch at a time settles what happens to a run directory: the second one is told who was first."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager

from dtrain.cluster.atomic import lock_within
from dtrain.cluster.errors import AlreadyExists, StorageError, UsageError
from dtrain.cluster.mirror import is_url, mirror_of
from dtrain.cluster.procs import ProcessId
from dtrain.cluster.rundir import RunDir
from dtrain.cluster.storage import ObjectInfo, Storage

_PATIENCE_S = 0.5  # a process that a killed launch was about to start holds its lock until it runs a program of its own
_LEASE_S = 120.0  # of a launch on another machine, which nobody can see die
_CLAIM = "launches/"  # at a URL: NUMBER, and NUMBER-over
_OVER = "-over"


class Busy(UsageError):
    """Another launch holds the directory at this moment."""


@contextmanager
def launching(run: RunDir, job_id: str) -> Iterator[None]:
    """Held from the decision until the job is submitted. Raises Busy, naming the other job; UsageError.

    The file stays: removing it would let a third launch lock a file that nobody else sees. The kernel drops the lock
    of a launch that dies; the descriptor is not inherited by what is started inside.
    """
    if is_url(run.place):
        with _launching_at_url(run, job_id):
            yield
        return
    directory = run.path / "control"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(directory / "launch.lock", os.O_RDWR | os.O_CREAT, 0o600)
    except OSError as error:
        raise UsageError(
            f"run_dir: {run.path} can't be written ({error.strerror}). Choose another: --run-dir"
        ) from error
    try:
        if not lock_within(descriptor, _PATIENCE_S):
            other = os.pread(descriptor, 200, 0).decode(errors="replace").strip() or "another job"
            raise _busy(run, other)
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, job_id.encode(), 0)
        yield
    finally:
        os.close(descriptor)


@contextmanager
def _launching_at_url(run: RunDir, job_id: str) -> Iterator[None]:
    """The same by numbered claims: whoever puts the next one has it. One is over when its launch says so, is known to
    be dead, or has had its time."""
    store = _store(run)
    newest = _newest_claim(store)
    if newest is not None and (other := _holder(store, newest)):
        raise _busy(run, other)
    number = 1 if newest is None else _number(newest) + 1
    record = {"job_id": job_id, "by": ProcessId.of(os.getpid()).to_json()}
    try:
        store.put_if_absent(f"{_CLAIM}{number:06d}", json.dumps(record).encode())
    except AlreadyExists:
        raise _busy(run, "another job") from None
    try:
        yield
    finally:
        with contextlib.suppress(StorageError):
            store.put_if_absent(f"{_CLAIM}{number:06d}{_OVER}", b"")
            store.delete(f"{_CLAIM}{number - 1:06d}{_OVER}", f"{_CLAIM}{number - 1:06d}")


def confirm(run: RunDir, job_id: str) -> None:
    """Before anything is recorded: raises Busy where the launch took so long that another one took its place."""
    if is_url(run.place):
        store = _store(run)
        newest = _newest_claim(store)
        if newest is None or json.loads(store.get(newest.key))["job_id"] != job_id:
            raise _busy(run, "another job")


def _busy(run: RunDir, other: str) -> Busy:
    return Busy(
        f"{run.place}: {other} is being launched here at this moment; nothing was started. "
        "Follow it with `attach`, or train beside it with --fresh or --name NAME."
    )


def _store(run: RunDir) -> Storage:
    mirror = mirror_of(run.path)
    assert mirror is not None
    return mirror.store


def _newest_claim(store: Storage) -> ObjectInfo | None:
    claims = [info for info in store.list(_CLAIM) if not info.key.endswith(_OVER)]
    return max(claims, key=_number, default=None)


def _number(claim: ObjectInfo) -> int:
    return int(claim.key.removeprefix(_CLAIM))


def _holder(store: Storage, claim: ObjectInfo) -> str:
    """The job that is being launched under it; "" where that is over."""
    if store.stat(f"{claim.key}{_OVER}") is not None or time.time() - claim.modified_at > _LEASE_S:
        return ""
    record = json.loads(store.get(claim.key))
    return "" if ProcessId.from_json(record["by"]).liveness() == "gone" else str(record["job_id"])
