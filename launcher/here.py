"""`launch --here`: one rank in this process and this terminal, so that breakpoint() and print behave as in any script.

There is no agent: this process claims the attempt, marks itself as the job's only node and writes how it ended.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from dtrain.cluster import exits
from dtrain.cluster.procs import ProcessId
from dtrain.cluster.rundir import RunDir, append_event, read_jsonl, write_atomic
from dtrain.cluster.secretrefs import file_values
from dtrain.cluster.storage import open_storage
from dtrain.cluster.workerenv import WorkerEnv
from dtrain.launcher.console import outcome_lines
from dtrain.launcher.follow import Bookmark, RunView, again_command, bookmark
from dtrain.launcher.runs import Job
from dtrain.launcher.screen import PlainScreen
from dtrain.launcher.submit import end
from dtrain.runtime.checkpoint.attempts import Attempt, claim_attempt
from dtrain.runtime.childproc import ENTRIES

STATES = {exits.DONE: "done", exits.STOPPED: "stopped", exits.CANCELLED: "cancelled"}
POLL_S = 0.2


def train_here(job: Job, since: Bookmark) -> int:
    """Trains in this process; its exit code, as a job's."""
    plan = job.plan
    write_atomic(job.control.node(0), json.dumps(ProcessId.of(os.getpid()).to_json()), 0o600)
    attempt = claim_attempt(open_storage(plan.checkpoint_url), host=socket.gethostname(), job_id=plan.job_id)
    origin = {"step": attempt.from_step, "attempt": attempt.from_attempt} if attempt.from_step else None
    append_event(job.run, "attempt_started", **{"attempt": attempt.number, "world_size": 1, "nodes": 1, "from": origin})
    _prepare_process(job)
    screen = PlainScreen(job.steps, sys.stdout)
    patience = 1 if plan.kind == "model" else 0  # a script is interrupted at once, as without us
    with _ctrl_c(patience) as interrupts, _shown(job, attempt, screen, since) as report_fd:
        # torch comes with the worker, and only now: the launcher itself never imports it.
        module, _, function = ENTRIES[plan.kind].partition(":")
        code = int(getattr(importlib.import_module(module), function)(_worker_env(job, attempt, report_fd)))
    return _finish(job, screen, code, interrupted=len(interrupts) > patience)


def _prepare_process(job: Job) -> None:
    """What the agent does for a worker: module search path, threads, the config's environment."""
    plan = job.plan
    sys.path[:0] = [path for path in plan.sys_path if path not in sys.path]
    for key, value in {**plan.env, "OMP_NUM_THREADS": str(plan.threads_per_proc)}.items():
        os.environ.setdefault(key, value)
    os.environ.update(file_values(plan.secrets))


def _worker_env(job: Job, attempt: Attempt, report_fd: int) -> WorkerEnv:
    with socket.socket() as probe:  # the store binds it again in a moment; nobody else is asked to find it
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    return WorkerEnv(
        run_dir=job.plan.run_dir,
        name=job.plan.name,
        job_id=job.plan.job_id,
        attempt=attempt.number,
        global_rank=0,
        local_rank=0,
        node_rank=0,
        world_size=1,
        local_world_size=1,
        num_nodes=1,
        master_addr="127.0.0.1",
        master_port=port,
        device="cuda:0" if job.plan.gpus_per_node else "cpu",
        resume_step=attempt.from_step,
        resume_attempt=attempt.from_attempt,
        report_fd=report_fd,
    )


def _finish(job: Job, screen: PlainScreen, code: int, *, interrupted: bool) -> int:
    if code == exits.STOPPED and job.control.cancel.exists():
        code = exits.CANCELLED
    state = STATES.get(code, "failed")
    reason = "interrupted" if interrupted else _stopped_early(job) if state == "done" else ""
    step = bookmark(job.run).newest[1]
    end(job, state=state, exit_code=code, reason=reason, step=step)
    url, again = job.plan.checkpoint_url, again_command(job)
    words = {"state": state, "exit_code": code, "reason": reason, "step": step}
    for said in outcome_lines(words, steps=job.steps, run_dir=str(job.run.path), url=url, again=again):
        screen.say(said)
    return exits.DETACHED if interrupted else code


def _stopped_early(job: Job) -> str:
    """The reason, where evaluations ended this job before its last step."""
    events = list(read_jsonl(job.run.events))
    begun = max(index for index, event in enumerate(events) if event["type"] == "submitted")
    return next((str(event["reason"]) for event in events[begun:] if event["type"] == "stopped_early"), "")


@contextmanager
def _ctrl_c(patience: int) -> Iterator[list[int]]:
    """The first `patience` Ctrl-Cs save and stop, as SIGTERM does; the next interrupts what runs. pdb sets its own."""
    seen: list[int] = []

    def note(signum: int, frame: FrameType | None) -> None:
        seen.append(signum)
        if len(seen) > patience:
            raise KeyboardInterrupt
        print("Ctrl-C: saving and stopping at the end of a step; once more interrupts at once", flush=True)
        os.kill(os.getpid(), signal.SIGTERM)

    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    signal.signal(signal.SIGINT, note)
    try:
        yield seen
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _shown(job: Job, attempt: Attempt, screen: PlainScreen, since: Bookmark) -> Iterator[int]:
    """A descriptor for the worker's reports; a thread puts them into the run's records and shows these."""
    read_fd, write_fd = os.pipe()
    over = threading.Event()
    pump = threading.Thread(target=_pump, args=(job.run, read_fd), name="dtrain-reports", daemon=True)
    shown = RunView(job.run, screen, since)
    view = threading.Thread(target=_watch, args=(job, attempt, shown, over), name="dtrain-view", daemon=True)
    pump.start()
    view.start()
    try:
        yield write_fd
    finally:
        with contextlib.suppress(OSError):
            os.close(write_fd)
        pump.join(timeout=5)
        over.set()
        view.join(timeout=5)
        os.close(read_fd)


def _watch(job: Job, attempt: Attempt, view: RunView, over: threading.Event) -> None:
    while not over.is_set():
        _write_status(job, attempt)
        for _ in range(5):
            over.wait(POLL_S)
            view.poll()
    view.close()
    _write_status(job, attempt)


def _write_status(job: Job, attempt: Attempt) -> None:
    """What the coordinator writes for a job that has one."""
    step = max(attempt.from_step, bookmark(job.run).newest[1])
    worker = {"global_rank": 0, "local_rank": 0, "node": 0, "host": socket.gethostname(), "pid": os.getpid()}
    status: dict[str, Any] = {"state": "running", "step": step, "steps": job.steps, "attempt": attempt.number}
    status |= {"world_size": 1, "nodes": 1, "workers": [{**worker, "step": step, "phase": ""}], "checkpoint": None}
    write_atomic(job.control.status, json.dumps({**status, "reason": "", "seen_at": time.time()}), 0o600)


def _pump(run: RunDir, descriptor: int) -> None:
    with open(descriptor, "rb", closefd=False) as reports:
        for line in reports:
            _keep(run, json.loads(line))


def _keep(run: RunDir, report: dict[str, Any]) -> None:
    if report["type"] == "event":
        event = dict(report["event"])
        append_event(run, event.pop("type"), **event)
        return
    failure = {key: report.get(key) for key in ("kind", "step", "phase", "message", "where", "evidence")}
    failure |= {"global_rank": 0, "node": 0, "collateral": []}
    write_atomic(run.failure, json.dumps(failure, indent=2) + "\n")
    append_event(run, "failure", **failure)
