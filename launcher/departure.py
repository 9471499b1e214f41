"""Waiting until the processes of a killed job are really gone, so that the next command finds memory, GPUs and ports
free. Kills nothing."""

from __future__ import annotations

import socket
import time
from pathlib import Path

from dtrain.cluster.procs import ProcessId, boot_id, session_members, start_time
from dtrain.cluster.rundir import read_json
from dtrain.launcher.runs import Job

WAIT_S = 5.0
POLL_S = 0.05


def wait_until_gone(job: Job, timeout_s: float = WAIT_S) -> bool:
    """True when nothing of the job's sessions on this host lives any more. Other hosts can't be seen and do not count.

    An agent leads a session, in which all that its workers start stays.
    """
    records = [read_json(path) for pattern in ("node-*.json", "superseded-*.json") for path in _files(job, pattern)]
    nodes = [ProcessId.from_json(record) for record in records if record is not None]
    here = [node for node in nodes if node.host == socket.gethostname() and node.boot == boot_id()]
    deadline = time.monotonic() + timeout_s
    while any(map(_lives, here)):
        if time.monotonic() > deadline:
            return False
        time.sleep(POLL_S)
    return True


def _files(job: Job, pattern: str) -> list[Path]:
    return sorted(job.control.path.glob(pattern))


def _lives(leader: ProcessId) -> bool:
    """Whether anything is left in the session of `leader`; not asked where another process has its number by now."""
    started = start_time(leader.pid)
    return bool(session_members(leader.pid)) if started in (None, leader.started) else False
