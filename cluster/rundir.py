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

from dtrain.cluster.atomic import append_line, create_file, replace_file
from dtrain.cluster.errors import StorageError
from dtrain.cluster.mirror import copy_of, is_url, mirror_of

FRESH_S = 10.0  # an age of status.json, which is written every second, that still tells of life


class RunDir:
    """Paths of one run directory. Creates nothing by itself.

    `place` is what it was asked for by. Where that is a URL, `path` is this process's copy (cluster/mirror.py).
    """

    def __init__(self, place: str | os.PathLike[str]) -> None:
        text = os.fspath(place)
        self.path = copy_of(text) if is_url(text) else Path(place)
        self.place = text if is_url(text) else str(self.path)
        self.config = self.path / "config.yaml"
        self.job = self.path / "job.json"
        self.events = self.path / "events.jsonl"
        self.metrics = self.path / "metrics.jsonl"
        self.evaluations = self.path / "evaluations.jsonl"
        self.failure = self.path / "failure.json"

    def log(self, attempt: int, node_rank: int) -> Path:
        return self.path / "logs" / f"a{attempt:04d}" / f"node-{node_rank}.log"

    def agent_log(self, node_rank: int) -> Path:
        """What the node's own process has to say, over all attempts."""
        return self.path / "logs" / f"agent-{node_rank}.log"

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
        self.script = path / "node.sh"  # what each node runs, with its rank: it prepares the node and becomes the agent
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

    def without(self, node_rank: int) -> Path:
        """Exists: this start of the job goes on without the node, for the reason that it holds. Put by the coordinator;
        an agent of the node that comes after all is not wanted."""
        return self.path / f"without-{node_rank}"

    def left_out(self) -> dict[int, str]:
        """Node rank -> why the job goes on without it."""
        found = {int(path.name.partition("-")[2]): path for path in self.path.glob("without-[0-9]*")}
        return {node: found[node].read_text() for node in sorted(found)}


def write_atomic(path: Path, data: str | bytes, mode: int | None = None) -> None:
    """Replaces `path` so that a reader sees the old bytes or the new ones. `mode` None follows the umask."""
    replace_file(path, data.encode() if isinstance(data, str) else data, mode)
    if (mirror := mirror_of(path)) is not None:
        mirror.replaced(path)


def write_once(path: Path, data: str | bytes, mode: int | None = None) -> bool:
    """Creates `path` whole, unless it exists; True for the one caller that made it."""
    raw = data.encode() if isinstance(data, str) else data
    mirror = mirror_of(path)
    return create_file(path, raw, mode) if mirror is None else mirror.create(path, raw, mode)


def remove(path: Path) -> None:
    """No error where there is no such record."""
    if (mirror := mirror_of(path)) is not None:
        mirror.remove(path)
    path.unlink(missing_ok=True)


def archive(path: Path, to: Path) -> None:
    """Gives a record another name. Raises FileNotFoundError where there is none."""
    if mirror_of(path) is None:
        os.replace(path, to)
        return
    write_once(to, path.read_bytes(), 0o600)
    remove(path)


def refresh(path: Path, max_age_s: float = 0.0) -> None:
    """Brings what is read up to date, where `path` lies in the copy of a run directory that others write to, unless
    that was done within `max_age_s`. Raises StorageError, UsageError."""
    if (mirror := mirror_of(path)) is not None:
        mirror.refresh(max_age_s)


def look_again(path: Path, max_age_s: float = 0.0) -> None:
    """The same for those who look again later: a store that does not answer now may do so then."""
    with contextlib.suppress(StorageError):
        refresh(path, max_age_s)


def publish(path: Path) -> None:
    """For a file that was written otherwise: shows it to those who see the run directory through another copy."""
    if (mirror := mirror_of(path)) is not None:
        mirror.send(path)


def obtain(path: Path) -> None:
    """The other side of `publish`: afterwards the file is here, if it is anywhere."""
    if (mirror := mirror_of(path)) is not None and not path.exists():
        mirror.fetch(path)


def read_json(path: Path) -> dict[str, Any] | None:
    """The object in `path`, or None where there is no such file."""
    try:
        loaded: dict[str, Any] = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    return loaded


def read_newest(folder: Path, prefix: str) -> dict[str, Any] | None:
    """The object in the file PREFIX<number>.json of the highest number, or None where there is none."""
    names = sorted(folder.glob(f"{prefix}[0-9]*.json"), key=lambda path: (len(path.name), path.name))
    return read_json(names[-1]) if names else None


def silent_s(control: Control) -> float:
    """For how long the coordinator has not written its status, which it does every second; huge where it never has."""
    return time.time() - float((read_json(control.status) or {}).get("seen_at") or 0.0)


def tells_of_life(control: Control) -> bool:
    """Whether the coordinator has written its status just now."""
    return silent_s(control) < FRESH_S


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
    if (mirror := mirror_of(run.events)) is not None:
        mirror.append(run.events, line)
    else:
        append_line(run.events, line)
    return record


def put_end(run: RunDir, control: Control, *, state: str, exit_code: int, reason: str, step: int) -> bool:
    """Writes down how a job has ended, where nobody has yet; True for the one who did."""
    words = {"state": state, "exit_code": exit_code, "reason": reason, "step": step}
    if not write_once(control.ended, json.dumps({**words, "at": round(time.time(), 3)}), 0o600):
        return False
    append_event(run, "ended", **words)
    return True
