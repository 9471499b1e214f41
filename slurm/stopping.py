"""When the workers are asked to save and end, seen from the driver: a signal, or our own clock against the time limit
that Slurm tells. The wish is a file, which the coordinator looks for every second; on the step the ranks agree.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable
from pathlib import Path

from dtrain.cluster import exits
from dtrain.cluster.errors import DtrainError
from dtrain.cluster.jobplan import JobPlan
from dtrain.cluster.rundir import RunDir, put_end, read_json, read_newest, write_atomic
from dtrain.slurm.queue import show_job
from dtrain.slurm.records import JobRecord
from dtrain.slurm.stops import is_backstop, lead_s, stop_time

_LIMIT_S = 600.0  # between two looks at the time limit, which an administrator may change
_RETRY_S = 30.0  # where Slurm did not answer
_SAVES_S = 10.0  # between two looks at how long saves take
_PATIENCE_S = 10.0  # for a coordinator to be there, before the job is stopped without one
_LAST_S = 12.0  # before the time limit: to leave the agents behind, and to hand the job back to Slurm
_ANSWER_S = 5.0


def look(slurm_job_id: str) -> JobRecord | None:
    """What Slurm says of the job now; None where it does not answer."""
    try:
        records = show_job(slurm_job_id, _ANSWER_S)
    except DtrainError:
        return None
    return records[0] if records else None


class SaveTimes:
    """The slowest save of the run so far, in seconds, from its events."""

    def __init__(self, events: Path) -> None:
        self._events = events
        self._read = 0
        self.slowest_s = 0.0

    def update(self) -> None:
        if not self._events.exists():
            return
        with open(self._events, "rb") as file:
            file.seek(self._read)
            for line in file:
                if not line.endswith(b"\n"):
                    break
                self._read += len(line)
                if b'"checkpoint_committed"' in line:
                    self._note(line)

    def _note(self, line: bytes) -> None:
        with contextlib.suppress(ValueError, TypeError):  # a line that a full disk cut short
            self.slowest_s = max(self.slowest_s, float(json.loads(line).get("seconds", 0.0)))


class Stopper:
    """`seen`: names of signals, to which a handler appends. Polled by the driver while its agents run."""

    def __init__(
        self,
        plan: JobPlan,
        slurm_job_id: str,
        incarnation: int,
        seen: list[str],
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._plan = plan
        self._job = slurm_job_id
        self._incarnation = incarnation
        self._run = RunDir(plan.run_dir)
        self._control = self._run.control(plan.job_id)
        self._seen = seen
        self._heeded = 0
        self._clock = clock
        self._saves = SaveTimes(self._run.events)
        self._record: JobRecord | None = None
        self._look_at = self._saves_at = 0.0
        self._told = False
        self._asked_at: float | None = None

    @property
    def asked(self) -> bool:
        return self._asked_at is not None

    def poll(self) -> None:
        now = self._clock()
        if self._asked_at is not None:
            self._insist(now)
        elif reason := self._by_signal(now) or self._by_clock(now):
            self._asked_at = now
            write_atomic(self._control.stop(self._incarnation), reason, 0o600)
            _say(f"asking the workers to save and end: {reason}")

    def _by_signal(self, now: float) -> str:
        """Why to stop; "" for none."""
        while self._heeded < len(self._seen):
            name = self._seen[self._heeded]
            self._heeded += 1
            if name == "SIGUSR1":
                self._record = look(self._job) or self._record
            if not is_backstop(name, self._plan.slurm.signal, self._record, now):
                return f"{name} to the batch script"
            _say(f"{name}: the time limit is near, and the workers are told in time")
        return ""

    def _by_clock(self, now: float) -> str:
        if now >= self._saves_at:
            self._saves.update()
            self._saves_at = now + _SAVES_S
        if now >= self._look_at:
            self._look(now)
        at = self._stop_time()
        if at is None or now < at:
            return ""
        self._look(now)  # it may have been extended
        at = self._stop_time()
        if at is None or now < at or self._record is None or self._record.ends_at is None:
            return ""
        return f"the time limit is in {max(0.0, self._record.ends_at - now):.0f} s"

    def _stop_time(self) -> float | None:
        return None if self._record is None else stop_time(self._record.ends_at, self._saves.slowest_s)

    def _look(self, now: float) -> None:
        found = look(self._job)
        self._look_at = now + (_RETRY_S if found is None else _LIMIT_S)
        self._record = found or self._record
        if not self._told and found is not None:
            self._told = True
            _say(limit_line(found.ends_at, self._saves.slowest_s))

    def _insist(self, now: float) -> None:
        """Nodes that are still being prepared have nothing to save: no need to wait for them. Nor is there time to wait
        for a worker that hangs until the limit: Slurm would end the job for good."""
        assert self._asked_at is not None
        if self._control.ended.exists():
            return
        ends_at = None if self._record is None else self._record.ends_at
        if ends_at is not None and now > ends_at - _LAST_S:
            write_stopped(self._plan, "its workers did not end before the time limit")
        elif now - self._asked_at > _PATIENCE_S and not self._is_coordinated():
            write_stopped(self._plan, "stopped on request before its nodes were there")

    def _is_coordinated(self) -> bool:
        newest = read_newest(self._control.path, "coordinator-")
        return newest is not None and newest.get("incarnation") == self._incarnation


def write_stopped(plan: JobPlan, reason: str) -> None:
    """The last word of a start of the job whose agents have not written one."""
    run = RunDir(plan.run_dir)
    control = run.control(plan.job_id)
    step = int((read_json(control.status) or {}).get("step") or 0)
    put_end(run, control, state="stopped", exit_code=exits.STOPPED, reason=reason, step=step)


def limit_line(ends_at: float | None, slowest_save_s: float) -> str:
    if ends_at is None:
        return "this Slurm job has no time limit"
    at = time.strftime("%H:%M", time.localtime(ends_at))
    measured = f"the slowest save so far took {slowest_save_s:.1f} s" if slowest_save_s else "no save was measured yet"
    return f"stops {lead_s(slowest_save_s):.0f} s before the time limit at {at} ({measured})"


def _say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", flush=True)
