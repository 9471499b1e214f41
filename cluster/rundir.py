"""The run directory: where things lie, and the records that scripts may rely on. The same on every back end.

    config.yaml    the resolved config           job.json      the current submission (a JobPlan and more)
    events.jsonl   everything that happened      metrics.jsonl one record a step
    failure.json   the last culprit              logs/a0003/node-0.log
    control/<job_id>/  (0700) token, coordinator-0001.json, node-0.json, status.json, cancel, ended.json
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any


class RunDir:
    """Paths of one run directory. Creates nothing by itself."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.config = self.path / "config.yaml"
        self.job = self.path / "job.json"
        self.events = self.path / "events.jsonl"
        self.metrics = self.path / "metrics.jsonl"
        self.failure = self.path / "failure.json"

    def log(self, attempt: int, node_rank: int) -> Path:
        return self.path / "logs" / f"a{attempt:04d}" / f"node-{node_rank}.log"

    def control(self, job_id: str) -> Control:
        return Control(self.path / "control" / job_id)


class Control:
    """The files through which one job's client, agents and coordinator find each other; 0700, files 0600."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.token = path / "token"  # 32 random bytes in hex
        self.status = path / "status.json"  # the coordinator's newest view, replaced atomically about once a second
        self.cancel = path / "cancel"  # exists: the person wants the run cancelled, not stopped
        self.ended = path / "ended.json"  # {"state", "exit_code", "reason", "step", "at"}; put once, by the coordinator

    def coordinator(self, term: int) -> Path:
        return self.path / f"coordinator-{term:04d}.json"

    def node(self, node_rank: int) -> Path:
        return self.path / f"node-{node_rank}.json"


def write_atomic(path: Path, data: str | bytes, mode: int | None = None) -> None:
    """Replaces `path` so that a reader sees the old bytes or the new ones. `mode` None follows the umask."""
    raw = data.encode() if isinstance(data, str) else data
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{time.monotonic_ns()}")
    try:
        with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666 if mode is None else mode), "wb") as file:
            file.write(raw)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise


def write_once(path: Path, data: str | bytes, mode: int | None = None) -> bool:
    """Creates `path` whole, unless it exists; True for the one caller that made it (atomic on NFS too: link(2))."""
    raw = data.encode() if isinstance(data, str) else data
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{time.monotonic_ns()}")
    try:
        with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666 if mode is None else mode), "wb") as file:
            file.write(raw)
            file.flush()
            os.fsync(file.fileno())
        try:
            os.link(temporary, path)
        except FileExistsError:
            return False
        return True
    finally:
        with contextlib.suppress(OSError):
            os.unlink(temporary)


def read_json(path: Path) -> dict[str, Any] | None:
    """The object in `path`, or None where there is no such file."""
    try:
        loaded: dict[str, Any] = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    return loaded


def read_jsonl(path: Path) -> Iterator[dict[str, Any]]:
    """The records of a JSON-lines file; a last line that is still being written is left out."""
    try:
        with open(path, "rb") as file:
            for line in file:
                if line.endswith(b"\n"):
                    yield json.loads(line)
    except FileNotFoundError:
        return


def append_event(run: RunDir, kind: str, /, **fields: Any) -> dict[str, Any]:
    """Appends one event with a single write, so that lines of several processes do not mix."""
    record = {"time": round(time.time(), 3), "type": kind, **fields}
    line = json.dumps(record, ensure_ascii=False) + "\n"
    descriptor = os.open(run.events, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
    try:
        os.write(descriptor, line.encode())
    finally:
        os.close(descriptor)
    return record
