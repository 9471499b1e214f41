"""What Slurm says of a user's jobs, asked once for all: a snapshot in a file that all the user's dtrain processes on
this host share, so that ten followers ask slurmctld as often as one. What it means for a run is slurm/batch.py's.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dtrain.cluster.rundir import read_json, write_atomic
from dtrain.slurm.client import SlurmRefused, SlurmUnreachable, ask
from dtrain.slurm.records import SQUEUE_FORMAT, JobRecord, parse_scontrol, parse_squeue

COMMAND_AGE_S = 2.0  # even one who asks again and again gets an answer this old


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """The newest answer, and whether a later question had none. Times are seconds since the epoch, 0.0: never."""

    jobs: tuple[JobRecord, ...] = ()
    asked_at: float = 0.0  # what happened before that is in `jobs`
    answered_at: float = 0.0
    error: str = ""  # why the newest question had no answer; "" where it had one
    failed_at: float = 0.0

    def is_fresh(self, *, max_age_s: float, after: float, now: float) -> bool:
        """Whether it answers a question asked now: not older than that, and asked after what it is to tell of. That
        nobody answered is an answer too, for as long."""
        told_at = self.failed_at if self.error else self.answered_at
        asked_at = told_at if self.error else self.asked_at
        return told_at > 0 and 0 <= now - told_at <= max_age_s and asked_at >= after


def look(uid: int, *, max_age_s: float = 0.0, after: float = 0.0, clock: Callable[[], float] = time.time) -> Snapshot:
    """The jobs of user `uid` on this host's cluster, those that ended lately too. Asks where no answer younger than
    `max_age_s` is there that was asked after `after`; one who asks at once after another gets that one's answer."""
    path = _file(uid)
    max_age_s = max(max_age_s, COMMAND_AGE_S)

    def fresh() -> Snapshot | None:
        found = _read(path)
        return found if found.is_fresh(max_age_s=max_age_s, after=after, now=clock()) else None

    if (found := fresh()) is not None:
        return found
    with _alone(path.with_suffix(".lock")):
        if (found := fresh()) is not None:
            return found
        return _ask(uid, path, clock)


def show_job(number: str, timeout_s: float | None = None) -> list[JobRecord]:
    """Slurm's records of one job at this moment, past the snapshot. Raises SlurmRefused, which also says that it knows
    no such job; SlurmUnreachable, UsageError."""
    return parse_scontrol(ask("scontrol", "-o", "show", "job", number, timeout_s=timeout_s))


def _ask(uid: int, path: Path, clock: Callable[[], float]) -> Snapshot:
    asked_at = clock()
    try:
        text = ask("squeue", "--all", f"--user={uid}", "--states=all", f"--format={SQUEUE_FORMAT}")
        if not text.startswith("JOBID"):
            raise SlurmUnreachable("squeue printed nothing, not even its header")  # which is not "no jobs"
        record = {"text": text, "asked_at": asked_at, "answered_at": clock()}
    except (SlurmUnreachable, SlurmRefused) as error:
        # A refusal is no answer either: nothing is taken for gone because squeue has changed its mind.
        record = {**_record(path), "error": str(error), "failed_at": clock()}
    with contextlib.suppress(OSError):
        write_atomic(path, json.dumps(record), 0o600)
    return _snapshot(record)


def _read(path: Path) -> Snapshot:
    return _snapshot(_record(path))


def _record(path: Path) -> dict[str, Any]:
    try:
        record = read_json(path)
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


def _snapshot(record: Mapping[str, Any]) -> Snapshot:
    times = {name: float(record.get(name, 0.0)) for name in ("asked_at", "answered_at", "failed_at")}
    jobs = tuple(parse_squeue(str(record.get("text", ""))))
    return Snapshot(jobs=jobs, error=str(record.get("error", "")), **times)


def _file(uid: int) -> Path:
    """Of one user's jobs on one cluster, as seen from this host: hosts may have clocks of their own."""
    environ = os.environ
    home = environ.get("XDG_CACHE_HOME") or os.path.join(environ.get("HOME", "/"), ".cache")
    cluster = hashlib.sha256(environ.get("SLURM_CONF", "").encode()).hexdigest()[:8]
    return Path(home) / "dtrain" / "slurm" / f"{socket.gethostname()}-{cluster}-{uid}.json"


@contextlib.contextmanager
def _alone(path: Path) -> Iterator[None]:
    """One question at a time; where the folder can't be written everybody asks for himself."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    except OSError:
        yield
        return
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
