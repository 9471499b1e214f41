"""Follows a run from its files only, so that the one who launched it and anybody who comes later see the same.

Reads events.jsonl, metrics.jsonl, rank 0's log and ended.json, and asks the back end now and then whether anything is
still alive. What it says is in launcher/console.py, where it appears in launcher/screen.py.
"""

from __future__ import annotations

import contextlib
import math
import os
import shlex
import signal
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import FrameType
from typing import Any

from dtrain.cluster import exits
from dtrain.cluster.rundir import RunDir, look_again, read_json, read_jsonl
from dtrain.launcher.console import Said, continue_command, event_lines, outcome_lines, without_message
from dtrain.launcher.departure import wait_until_gone
from dtrain.launcher.pace import Pace, is_work, stall_words
from dtrain.launcher.runs import Job
from dtrain.launcher.screen import Screen
from dtrain.launcher.state import STARTING_S
from dtrain.launcher.submit import end
from dtrain.launcher.tail import JsonTail, LineTail

POLL_S = 0.15
KILLED = "killed by Ctrl-C (second time)"
ASK_BACKEND_S = 2.0
_CANCELLER_S = 10.0  # for who cancels a run to put its end down
_LOOK_S = 1.0  # into a store
BACKEND_AGE_S = 40.0  # a scheduler is asked rarely, once for all followers: the files tell of everything but a death
TRACEBACK_HOLD_S = 3.0
# What comes before the first step of an attempt.
STARTS = frozenset({"submitted", "node_joined", "attempt_started", "workers_started", "chosen", "resumed"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Bookmark:
    """What of a run's files is old news. Taken before the job that is to be followed can write."""

    events_bytes: int = 0
    newest: tuple[int, int] = (0, 0)  # (attempt, step) of the newest record of metrics.jsonl


def bookmark(run: RunDir) -> Bookmark:
    return Bookmark(
        events_bytes=run.events.stat().st_size if run.events.exists() else 0,
        newest=max(map(_place, read_jsonl(run.metrics)), default=(0, 0)),
    )


def _place(record: dict[str, Any]) -> tuple[int, int]:
    return int(record.get("attempt", 0)), int(record.get("step", 0))


class RunView:
    """Carries what is new in a run's files to a screen."""

    def __init__(self, run: RunDir, screen: Screen, since: Bookmark) -> None:
        self._run = run
        self._screen = screen
        self._events = JsonTail(run.events, offset_bytes=since.events_bytes)
        self._metrics = JsonTail(run.metrics)
        self._newest = since.newest
        self._pending: deque[dict[str, Any]] = deque()
        self._log: LineTail | None = None
        self._printed = RankZeroLines()
        self._chosen: list[str] | None = None
        self._evidence: list[str] | None = None
        self._attempts = 0
        self.failure: dict[str, Any] | None = None  # the newest one shown
        self._restarting = False
        self.pace = Pace()

    def poll(self) -> None:
        """Shows what happened since the last call. It comes through three files: what was written before an event is
        there when the event is, so it is shown before it."""
        events = self._events.poll()
        self._pending += self._metrics.poll()
        for event in events:
            if event.get("type") not in STARTS:
                self._show_log()
                self._show_metrics(event.get("step"))
            self._show_event(event)
        self._show_log()
        self._show_metrics(None)

    def follow_log(self, attempt: int, node: int, *, from_end: bool) -> None:
        if self._log is not None:
            self._show_log()
            self._log.close()
        self._log = LineTail(self._run.log(attempt, node), from_end=from_end)

    def close(self) -> None:
        for line in self._printed.flush():
            self._screen.say(Said(line))
        self._events.close()
        self._metrics.close()
        if self._log is not None:
            self._log.close()

    def _show_event(self, event: dict[str, Any]) -> None:
        kind = event.get("type")
        if kind == "attempt_started":
            self._attempts += 1
            self.pace.restart()
            self._screen.waiting(0.0, "")
            self.follow_log(int(event["attempt"]), _first_node(event), from_end=False)
            event, self._restarting = {**event, "again": self._restarting}, False
        if kind == "node_joined" and self._attempts == 0:
            return  # that the nodes of a new job join is no news
        if kind == "chosen":
            if event.get("lines") == self._chosen:
                return  # a restart chooses the same again
            self._chosen = event.get("lines")
        if kind == "failure":
            self._printed.drop_traceback()
            self.failure = event
            event = self._without_known_evidence(event)
        if kind == "restart" and not without_message(str(event.get("reason") or ""), self.failure):
            self._restarting = True
            return  # the failure has been shown, and the attempt that follows says from where
        for said in event_lines(event):
            self._screen.say(said)

    def _without_known_evidence(self, failure: dict[str, Any]) -> dict[str, Any]:
        """A restart that meets the same error shows its traceback once."""
        known, self._evidence = self._evidence, failure.get("evidence")
        return {**failure, "evidence": ["(the same as before)"]} if known and known == self._evidence else failure

    def _show_metrics(self, up_to_step: int | None) -> None:
        while self._pending and (up_to_step is None or self._pending[0].get("step", 0) <= up_to_step):
            record = self._pending.popleft()
            self.pace.saw(record)
            if (place := _place(record)) > self._newest:  # a replaced file repeats what earlier attempts finished
                self._newest = place
                self.pace.restart()
                self._screen.metric(record)

    def _show_log(self) -> None:
        for line in self._printed.take([] if self._log is None else self._log.poll(), time.monotonic()):
            self._screen.say(Said(line))


def _first_node(attempt_started: Mapping[str, Any]) -> int:
    """The one of rank 0."""
    return int((attempt_started.get("node_ranks") or [0])[0])


class RankZeroLines:
    """What rank 0 printed, without its tag. A traceback is held back for a moment: when it belongs to a failure, the
    failure's own view shows it, with the culprit first, and the copy here is dropped."""

    def __init__(self) -> None:
        self._held: list[str] = []
        self._held_since = 0.0
        self._in_traceback = False

    def take(self, lines: list[str], now: float) -> list[str]:
        """The lines to show now."""
        shown = []
        for line in lines:
            if not line.startswith("[0 "):
                continue
            text = line.partition("] ")[2]
            if text.startswith("Traceback (most recent call last)"):
                self._in_traceback, self._held_since = True, now
            if self._in_traceback or (self._held and _is_traceback_glue(text)):
                self._held.append(text)
                self._in_traceback = self._in_traceback and (text.startswith((" ", "Traceback")) or not text)
            else:
                shown.append(text)
        if self._held and now - self._held_since > TRACEBACK_HOLD_S:
            shown = self.flush() + shown
        return shown

    def drop_traceback(self) -> None:
        self._held = []
        self._in_traceback = False

    def flush(self) -> list[str]:
        held, self._held = self._held, []
        self._in_traceback = False
        return held


def _is_traceback_glue(text: str) -> bool:
    return not text or text.startswith(("During handling of the above", "The above exception was the direct"))


def follow(job: Job, screen: Screen, since: Bookmark, *, attempt: int = 0) -> int:
    """Shows the run until it ends; the run's exit code. `attempt`: the one that goes on already, when coming later.

    The first Ctrl-C asks the run to save and end, the second kills it; where a scheduler keeps the run, it only leaves.
    """
    view = RunView(job.run, screen, since)
    if attempt:
        starts = (event for event in read_jsonl(job.run.events) if event["type"] == "attempt_started")
        first = next((_first_node(event) for event in starts if event.get("attempt") == attempt), 0)
        view.follow_log(attempt, first, from_end=True)
    try:
        with _interrupts(terminated=not attempt and not job.backend.detaches) as interrupts:
            return _until_end(job, screen, view, interrupts)
    finally:
        view.close()
        screen.close()


def _until_end(job: Job, screen: Screen, view: RunView, interrupts: list[int]) -> int:
    queue = Queue(job)
    asked_at = time.monotonic()
    handled = 0
    while True:
        look_again(job.run.path, _LOOK_S)
        ended = job.final_end()  # read before the poll, so that the last lines are shown before the end
        view.poll()
        if ended is not None:
            return _say_outcome(job, screen, view, ended)
        _show_wait(job, screen, view, queue)
        if len(interrupts) > handled:
            first, handled = not handled, len(interrupts)
            if _on_interrupt(job, screen, view, interrupts[:handled], first=first):
                return exits.DETACHED
        if time.monotonic() - asked_at > ASK_BACKEND_S:
            asked_at = time.monotonic()
            if _is_gone(job):
                ended = _last_word(job)
                view.poll()
                return _say_all_gone(job, screen) if ended is None else _say_outcome(job, screen, view, ended)
            queue.look()
        time.sleep(POLL_S)


class Queue:
    """What a follower knows of a job that does not run: before its first node came, or between stop and restart."""

    def __init__(self, job: Job, clock: Callable[[], float] = time.monotonic) -> None:
        self._job = job
        self._clock = clock
        self._since: float | None = None
        self.words = ""

    @property
    def waited_s(self) -> float:
        return 0.0 if self._since is None else self._clock() - self._since

    def look(self) -> None:
        stopped = self._job.control.ended.exists()
        if not stopped and self._job.control.status.exists():
            self._since, self.words = None, ""
            return
        self._since = self._clock() if self._since is None else self._since
        backend, plan = self._job.backend, self._job.plan
        backend.hasten(plan)
        reason = backend.reason(plan)
        self.words = ": ".join(filter(None, ["stopped, to be started again" if stopped else "", reason]))


def _show_wait(job: Job, screen: Screen, view: RunView, queue: Queue) -> None:
    if queue.words:
        screen.waiting(queue.waited_s, queue.words)
    else:
        _show_stall(job, screen, view)


def _show_stall(job: Job, screen: Screen, view: RunView) -> None:
    """A hang is silent: where the ranks are is known to their agents, and so to status.json."""
    waited_s = view.pace.overdue_s()
    status = None if waited_s is None else read_json(job.control.status)
    workers = [] if status is None else status.get("workers") or []
    stalls = status is not None and status.get("state") in ("running", "stopping")
    if waited_s is not None and stalls and not is_work(waited_s, workers):
        screen.waiting(waited_s, stall_words(waited_s, workers, job.plan.name))
    else:
        screen.waiting(0.0, "")


def _is_gone(job: Job) -> bool:
    """Asked in this order: a job that ended between the two questions has ended.json by the second."""
    if time.time() - job.submitted_at < STARTING_S and not job.control.status.exists():
        return False
    return job.backend.state(job.plan, patience_s(_quiet_s(job))) == "gone" and job.final_end() is None


def _last_word(job: Job) -> dict[str, Any] | None:
    """Of a job whose nodes are gone. Who cancels one that does not end kills it first, and then puts its end down."""
    deadline = time.monotonic() + (_CANCELLER_S if job.control.cancel.exists() else 0.0)
    while True:
        look_again(job.run.path)
        ended = read_json(job.control.ended)
        if ended is not None or time.monotonic() > deadline:
            return ended
        time.sleep(POLL_S)


def patience_s(quiet_s: float) -> float:
    """How old the back end's word may be: the longer nothing has happened, the less soon something will."""
    return min(BACKEND_AGE_S, max(ASK_BACKEND_S, quiet_s))


def _quiet_s(job: Job) -> float:
    """For how long a job has waited that does not run; of one that runs its own files tell."""
    if job.control.status.exists() and not job.control.ended.exists():
        return math.inf
    with contextlib.suppress(FileNotFoundError):
        return time.time() - job.control.ended.stat().st_mtime
    return time.time() - job.submitted_at


def _on_interrupt(job: Job, screen: Screen, view: RunView, interrupts: Sequence[int], *, first: bool) -> bool:
    """`interrupts`: all signals so far. True when there is nothing left to follow: the run was killed, or goes on
    without a follower."""
    if job.backend.detaches:
        screen.close()
        screen.say(Said(f"Ctrl-C: detached, job {job.plan.job_id} goes on"))
        screen.say(Said(f"  come back:  dtrain attach {shlex.quote(job.plan.name)}"))
        screen.say(Said(f"  end it:     dtrain cancel {shlex.quote(job.plan.name)}"))
        return True
    if signal.SIGINT not in interrupts[1:]:
        if first:
            what, then = ("SIGTERM", "Ctrl-C") if interrupts[0] == signal.SIGTERM else ("Ctrl-C", "once more")
            screen.say(Said(f"{what}: saving and stopping at the end of a step; {then} kills the run at once"))
            job.backend.stop(job.plan)
        return False
    job.backend.kill(job.plan)
    wait_until_gone(job)
    view.poll()
    step = bookmark(job.run).newest[1]
    end(job, state="failed", exit_code=exits.FAILED, reason=KILLED, step=step)
    _say_outcome(job, screen, view, read_json(job.control.ended) or {})
    return True


def _say_outcome(job: Job, screen: Screen, view: RunView, ended: dict[str, Any]) -> int:
    view.close()
    screen.close()
    words = outcome_lines(
        ended,
        steps=job.steps,
        run_dir=job.run.place,
        url=job.plan.checkpoint_url,
        again=again_command(job),
        failure=view.failure,
    )
    for said in words:
        screen.say(said)
    return int(ended.get("exit_code", exits.FAILED))


def _say_all_gone(job: Job, screen: Screen) -> int:
    screen.close()
    screen.say(Said("every node of the run is gone, and none could say why", "bad"))
    for line in _last_agent_words(job):
        screen.say(Said(f"  | {line}"))
    screen.say(_where_it_goes_on(job))
    return exits.STOPPED


def _last_agent_words(job: Job) -> list[str]:
    """What the first agent printed at the end: a traceback where it could not even start."""
    try:
        return (job.run.path / "logs" / "agent-0.log").read_text(errors="replace").splitlines()[-12:]
    except OSError:
        return []


def _where_it_goes_on(job: Job) -> Said:
    step = job.newest_checkpoint_step()
    start = "from the beginning (no checkpoint was committed)" if step is None else f"from step {step}"
    return Said(f"  continue {start}:  {again_command(job)}")


def again_command(job: Job) -> str:
    plan = job.plan
    return continue_command(plan.argv, plan.cwd, os.getcwd(), name=plan.name, run_dir=plan.run_dir)


@contextlib.contextmanager
def _interrupts(*, terminated: bool) -> Iterator[list[int]]:
    """Collects Ctrl-C in a list instead of raising: an exception could hit between reading a line and showing it. And
    SIGTERM, where who is `terminated` is who has the run, unless somebody else has a use for it already."""
    seen: list[int] = []

    def note(signum: int, frame: FrameType | None) -> None:
        seen.append(signum)

    numbers = [signal.SIGINT]
    if terminated and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL:
        numbers.append(signal.SIGTERM)
    previous = {number: signal.signal(number, note) for number in numbers}
    try:
        yield seen
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
