"""What state a run is in, decided from facts: what its job wrote, and what the back end says about its processes.

The first half is pure; `read_status` gathers the facts and gives the documented object of `dtrain status --json`.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dtrain.cluster.rundir import look_again, read_json
from dtrain.launcher.runs import Job

ACTIVE = frozenset({"pending", "running", "stopping", "requeued"})
STARTING_S = 3.0  # between its record and its first process a job has left no other mark


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """`ended` and `status` are the contents of the job's files, None where there is none."""

    ended: dict[str, Any] | None
    status: dict[str, Any] | None
    backend: str  # alive | gone | unknown
    words: str = ""  # the back end's own, about why nothing runs
    restarts: bool = False  # a job that stopped is started again without a person
    submitted_at: float
    now: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Derived:
    state: str  # pending | running | stopping | requeued | done | failed | stopped | cancelled | unknown
    reason: str
    seen_at: float | None

    @property
    def is_over(self) -> bool:
        return self.state not in ACTIVE and self.state != "unknown"


def derive(facts: Facts) -> Derived:
    """ended.json wins, unless the job may be started again; then whether the processes live; what the last status said
    counts only while they do."""
    ended, status = facts.ended, facts.status or {}
    seen_at = status.get("seen_at") if ended is None else ended.get("at")
    over = ended is not None and not (facts.restarts and ended["state"] == "stopped" and facts.backend != "gone")
    if ended is not None and over:
        return Derived(state=str(ended["state"]), reason=str(ended.get("reason") or ""), seen_at=seen_at)
    last = str(ended["state"] if ended else status.get("state", ""))
    if facts.backend == "unknown":
        seen = f"; last seen {last}" if facts.words and last else ""
        words = facts.words or "the back end can't be asked from here"
        return Derived(state="unknown", reason=words + seen, seen_at=seen_at)
    if ended is not None:
        return Derived(state="requeued", reason=facts.words, seen_at=seen_at)
    starting = facts.status is None and facts.now - facts.submitted_at < STARTING_S
    if facts.backend == "alive" or starting:
        if last == "stopped":  # said before it was started again
            return Derived(state="requeued", reason=facts.words or "its nodes are being started again", seen_at=seen_at)
        if last not in ACTIVE:
            return Derived(state="pending", reason=facts.words, seen_at=seen_at)
        return Derived(state=last, reason=str(status.get("reason") or facts.words), seen_at=seen_at)
    return Derived(state="failed", reason=facts.words or "all nodes died without a word", seen_at=seen_at)


def gather(job: Job) -> Facts:
    # ended.json is read again after the processes were found gone: a job that ends in between has ended, not died.
    backend_state, control = job.backend_state(), job.control
    if backend_state == "gone":
        look_again(job.run.path)
    ended = read_json(control.ended)
    may_restart = ended is None or job.may_start_again(ended)
    return Facts(
        ended=ended,
        status=read_json(control.status),
        backend=backend_state,
        words=job.backend.reason(job.plan) if may_restart else "",
        restarts=ended is not None and may_restart,
        submitted_at=job.submitted_at,
        now=time.time(),
    )


# What `status --json` says of a worker; status.json has more, for people.
WORKER_KEYS = ("global_rank", "local_rank", "node", "host", "pid", "step", "phase")


def documented(status: Mapping[str, Any]) -> dict[str, Any]:
    """The object that scripts may rely on, and nothing beside it."""
    workers = [{key: worker.get(key) for key in WORKER_KEYS} for worker in status["workers"]]
    return {**{key: value for key, value in status.items() if key != "called"}, "workers": workers}


def read_status(job: Job, *, look_for_checkpoint: bool = True) -> dict[str, Any]:
    """The object of `status --json`, its workers with more, and `called`, the scheduler's name of the job.
    `look_for_checkpoint` False spares the store a listing."""
    facts = gather(job)
    derived = derive(facts)
    status = facts.status or {}
    ended_step = (facts.ended or {}).get("step")
    checkpoint = job.newest_checkpoint_step() if look_for_checkpoint else None
    return {
        "name": job.plan.name,
        "run_dir": job.run.place,
        "backend": job.plan.backend,
        "job_id": job.plan.job_id,
        "called": job.backend.called(job.plan),
        "state": derived.state,
        "step": status.get("step", 0) if ended_step is None else ended_step,
        "steps": status.get("steps") or job.steps,
        "attempt": status.get("attempt", 0),
        "world_size": status.get("world_size") or job.plan.world_size,
        "nodes": status.get("nodes") or job.plan.nodes,
        "nodes_asked": job.plan.nodes,
        "workers": [] if derived.is_over else status.get("workers", []),
        "checkpoint": status.get("checkpoint") if checkpoint is None else checkpoint,
        "reason": derived.reason,
        "seen_at": derived.seen_at,
    }
