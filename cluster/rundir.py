"""The run directory: where things lie, and the records that scripts may rely on. The same on every back end.

config.yaml    the resolved config           job.json      the current submission (a JobPlan and more)
events.jsonl   everything that happened      metrics.jsonl one record a step
failure.json   the last culprit              evaluations.jsonl one record an evaluation
logs/a0003/node-0.log
code/<sha256>.tar.gz  the user's code as it was at a launch
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
        self.evaluations = self.path / "evaluations.jsonl"
        self.failure = self.path / "failure.json"

    def log(self, attempt: int, node_rank: int) -> Path:
        return self.path / "logs" / f"a{attempt:04d}" / f"node-{node_rank}.log"

    def code(self, digest: str) -> Path:
        return self.path / "code" / f"{digest}.tar.gz"

    def control(self, job_id: str) -> Control:
        return Control(self.path / "control" / job_id)


class Control:
    """The files through which one job's client, agents and coordinator find each other; 0700, files 0600."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.token = path / "token"  # 32 random bytes in hex
        self.status = path / "status.json"  # the coordinator's newest view, replaced atomically about once a second
        self.cancel = path / "cancel"  # exists: the person wants the run cancelled, not stopped
        self.incarnation = path / "incarnation"  # a number, where a scheduler may start the job more than once
        self.note = path / "note"  # a line for `status`, by a back end: what the job goes on without, and why
        self.ended = path / "ended.json"  # {"state", "exit_code", "reason", "step", "at"}; put once, by the coordinator

    def coordinator(self, term: int) -> Path:
        return self.path / f"coordinator-{term:04d}.json"

    def stop(self, incarnation: int) -> Path:
        """Exists: this start of the job is to save and end, for the reason that it holds. A back end's driver puts it,
        for the times in which nobody listens on the control port."""
        return self.path / f"stop-{incarnation:04d}"

    def node(self, node_rank: int) -> Path:
        return self.path / f"node-{node_rank}.json"


def write_atomic(path: Path, data: str | bytes, mode: int | None = None) -> None:
    """Replaces `path` so that a reader sees the old bytes or the new ones. `mode` None follows the umask."""
    raw = data.encode() if isinstance(data, str) else data
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{time.monotonic_ns()}")
    try:
        _write_new(temporary, raw, mode)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise


def _write_new(path: Path, raw: bytes, mode: int | None) -> None:
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
    with open(os.open(path, flags, 0o666 if mode is None else mode), "wb") as file:
        file.write(raw)
        file.flush()
        os.fsync(file.fileno())


def write_once(path: Path, data: str | bytes, mode: int | None = None) -> bool:
    """Creates `path` whole, unless it exists; True for the one caller that made it (atomic on NFS too: link(2))."""
    raw = data.encode() if isinstance(data, str) else data
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{time.monotonic_ns()}")
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


def read_json(path: Path) -> dict[str, Any] | None:
    """The object in `path`, or None where there is no such file."""
    try:
        loaded: dict[str, Any] = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    return loaded


def read_jsonl(path: Path) -> Iterator[dict[str, Any]]:
    """The records of a JSON-lines file. What is no JSON object is passed over: a line that is still being written, or
    that a full disk or a kill has cut short."""
    try:
        with open(path, "rb") as file:
            for line in file:
                with contextlib.suppress(ValueError):
                    record = json.loads(line) if line.endswith(b"\n") else None
                    if isinstance(record, dict):
                        yield record
    except FileNotFoundError:
        return


def append_event(run: RunDir, kind: str, /, **fields: Any) -> dict[str, Any]:
    """Appends one event with a single write, so that lines of several processes do not mix."""
    record = {"time": round(time.time(), 3), "type": kind, **fields}
    # Text that is no UTF-8 (a file name, a message) becomes an escape, which is what JSON says for it too.
    line = json.dumps(record, ensure_ascii=False).encode(errors="backslashreplace") + b"\n"
    descriptor = os.open(run.events, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o666)
    try:
        size = os.fstat(descriptor).st_size
        if size and os.pread(descriptor, 1, size - 1) != b"\n":
            line = b"\n" + line  # the one before was cut short, this one need not be lost with it
        os.write(descriptor, line)
    finally:
        os.close(descriptor)
    return record
