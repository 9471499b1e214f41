"""What state a run is in, decided from facts: what its job wrote, and what the back end says about its processes.

The first half is pure; `read_status` gathers the facts and gives the documented object of `dtrain status --json`.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dtrain.cluster.rundir import Control, read_json
from dtrain.launcher.runs import Job

ACTIVE = frozenset({"pending", "running", "stopping", "requeued"})
STARTING_S = 3.0  # between its record and its first process a job has left no other mark


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """`ended` and `status` are the contents of the job's files, None where there is none."""

    ended: dict[str, Any] | None
    status: dict[str, Any] | None
    backend: str  # alive | gone | unknown
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
    """ended.json wins; then whether the processes live; what the last status said counts only while they do."""
    status = facts.status or {}
    seen_at = status.get("seen_at")
    if facts.ended is not None:
        state, reason = str(facts.ended["state"]), str(facts.ended.get("reason") or "")
        return Derived(state=state, reason=reason, seen_at=facts.ended.get("at"))
    if facts.backend == "unknown":
        return Derived(state="unknown", reason="the back end can't be asked from here", seen_at=seen_at)
    starting = facts.status is None and facts.now - facts.submitted_at < STARTING_S
    if facts.backend == "alive" or starting:
        state = str(status.get("state", "pending"))
        return Derived(state=state, reason=str(status.get("reason") or ""), seen_at=seen_at)
    return Derived(state="failed", reason="all nodes died without a word", seen_at=seen_at)


def gather(job: Job, backend_state: str) -> Facts:
    control: Control = job.control
    return Facts(
        ended=read_json(control.ended),
        status=read_json(control.status),
        backend=backend_state,
        submitted_at=job.submitted_at,
        now=time.time(),
    )


# What `status --json` says of a worker; status.json has more, for people.
WORKER_KEYS = ("global_rank", "local_rank", "node", "host", "pid", "step", "phase")


def documented(status: Mapping[str, Any]) -> dict[str, Any]:
    """The object that scripts may rely on, and nothing beside it."""
    workers = [{key: worker.get(key) for key in WORKER_KEYS} for worker in status["workers"]]
    return {**status, "workers": workers}


def read_status(job: Job, *, look_for_checkpoint: bool = True) -> dict[str, Any]:
    """The object of `status --json`, its workers with more. `look_for_checkpoint` False spares the store a listing."""
    # ended.json is read again after the processes were found gone: a job that ends in between has ended, not died.
    facts = gather(job, job.backend_state())
    derived = derive(facts)
    status = facts.status or {}
    ended_step = (facts.ended or {}).get("step")
    checkpoint = job.newest_checkpoint_step() if look_for_checkpoint else None
    return {
        "name": job.plan.name,
        "run_dir": str(job.run.path),
        "backend": job.plan.backend,
        "job_id": job.plan.job_id,
        "state": derived.state,
        "step": status.get("step", 0) if ended_step is None else ended_step,
        "steps": status.get("steps") or job.steps,
        "attempt": status.get("attempt", 0),
        "world_size": status.get("world_size") or job.plan.world_size,
        "nodes": status.get("nodes") or job.plan.nodes,
        "workers": [] if derived.is_over else status.get("workers", []),
        "checkpoint": status.get("checkpoint") if checkpoint is None else checkpoint,
        "reason": derived.reason,
        "seen_at": derived.seen_at,
    }
