"""Only one launch at a time settles what happens to a run directory: the second one is told who was first."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager

from dtrain.cluster.errors import UsageError
from dtrain.cluster.rundir import RunDir


class Busy(UsageError):
    """Another launch holds the directory at this moment."""


@contextmanager
def launching(run: RunDir, job_id: str) -> Iterator[None]:
    """Held from the decision until the job is submitted. Raises Busy, naming the other job; UsageError.

    The file stays: removing it would let a third launch lock a file that nobody else sees. The kernel drops the lock
    of a launch that dies; the descriptor is not inherited by what is started inside.
    """
    directory = run.path / "control"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(directory / "launch.lock", os.O_RDWR | os.O_CREAT, 0o600)
    except OSError as error:
        raise UsageError(
            f"run_dir: {run.path} can't be written ({error.strerror}). Choose another: --run-dir"
        ) from error
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            other = os.pread(descriptor, 200, 0).decode(errors="replace").strip() or "another job"
            raise Busy(
                f"{run.path}: {other} is being launched here at this moment; nothing was started. "
                "Follow it with `attach`, or train beside it with --fresh or --name NAME."
            ) from None
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, job_id.encode(), 0)
        yield
    finally:
        os.close(descriptor)
