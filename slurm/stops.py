"""What a Slurm job does when its part of a run is over, and how long before its time limit it begins to stop. Pure, so
that every case is a line of a table; asking Slurm and doing it is slurm/ending.py's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from dtrain.cluster import exits
from dtrain.slurm.records import JobRecord

Action = Literal["finish", "requeue", "resubmit", "leave"]
OnStop = Literal["requeue", "resubmit", "none"]

MIN_LEAD_S = 30.0
# The signal in the header (slurm/options.py) comes this long before the limit, up to a minute earlier (sbatch(1)); and
# slurmctld looks at times every half minute.
BACKSTOP_S = 120.0 + 60.0 + 30.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """All that the decision depends on."""

    exit_code: int  # the run's own last word
    on_stop: OnStop
    restart: int  # SLURM_RESTART_COUNT
    record: JobRecord | None  # what Slurm says of the job; None: it does not answer
    now: float
    cancelled: bool = False  # a person's `dtrain cancel` has left its mark
    lost: str = ""  # why the job goes on without nodes that it has lost; "": it has lost none
    stalled: int = 0  # starts in a row that brought the run no step further
    max_stalled: int = 3  # recovery.max_restarts_without_progress


@dataclass(frozen=True, slots=True, kw_only=True)
class Ending:
    action: Action
    exit_code: int  # of the batch script
    reason: str
    waits: bool = True  # a resubmitted job: for the end of this one


def decide_end(facts: Facts) -> Ending:
    code, record = facts.exit_code, facts.record
    if code != exits.STOPPED:
        return Ending(action="finish", exit_code=code, reason="the run has ended")
    if facts.cancelled:
        return Ending(action="finish", exit_code=exits.CANCELLED, reason="cancelled by a person")
    if record is not None and record.restarts > facts.restart:
        return Ending(action="leave", exit_code=exits.STOPPED, reason="Slurm has put the job back into the queue")
    if record is not None and (by := _ended_by_person(record)):
        return Ending(action="finish", exit_code=exits.STOPPED, reason=by)
    if facts.on_stop == "none":
        return Ending(action="finish", exit_code=exits.STOPPED, reason="cluster.slurm.on_stop: none")
    if facts.stalled > facts.max_stalled:
        reason = f"{facts.stalled} starts in a row without a new step"
        return Ending(action="finish", exit_code=exits.FAILED, reason=reason)
    return _again(facts)


def _again(facts: Facts) -> Ending:
    reason = facts.lost or _why(facts)
    if facts.lost:
        # A requeued job would wait until Slurm has noticed too that the node is dead, and then for its hold.
        return Ending(action="resubmit", exit_code=exits.STOPPED, reason=reason, waits=False)
    if facts.on_stop == "resubmit":
        return Ending(action="resubmit", exit_code=exits.STOPPED, reason=reason)
    if facts.record is not None and not facts.record.may_requeue:
        reason += "; Slurm has Requeue=0 for this job, so it is submitted anew"
        return Ending(action="resubmit", exit_code=exits.STOPPED, reason=reason)
    return Ending(action="requeue", exit_code=exits.STOPPED, reason=reason)


def _ended_by_person(record: JobRecord) -> str:
    """Slurm is ending the job, and neither time, preemption nor a node is the reason."""
    if record.phase not in ("completing", "over") or record.preempted_at is not None:
        return ""
    if record.reason in _SLURMS_REASONS or record.state in _SLURMS_STATES:
        return ""
    return f"Slurm job {record.job_id} was cancelled with scancel"


# Of a job that Slurm ends by itself. While it is COMPLETING only the reason tells (seen in 22.05).
_SLURMS_REASONS = ("TimeLimit", "NodeDown")
_SLURMS_STATES = ("NODE_FAIL", "TIMEOUT", "PREEMPTED", "BOOT_FAIL", "DEADLINE")


def _why(facts: Facts) -> str:
    record = facts.record
    if record is not None and record.reason in _SLURMS_REASONS:
        return "the time limit" if record.reason == "TimeLimit" else "a node failed"
    if record is not None and record.preempted_at is not None:
        return "preempted"
    if record is not None and record.ends_at is not None and record.ends_at - facts.now < BACKSTOP_S:
        return "the time limit"
    return "stopped on request"


# ---- the time limit ----


def lead_s(slowest_save_s: float) -> float:
    """How long before the limit the workers are asked to stop: for the end of a step, and a save that takes twice as
    long as the slowest one so far."""
    return max(MIN_LEAD_S, 2 * slowest_save_s + 15.0)


def stop_time(ends_at: float | None, slowest_save_s: float) -> float | None:
    """When to begin; None: there is no limit, or it is not known."""
    return None if ends_at is None else ends_at - lead_s(slowest_save_s)


def is_backstop(signal: str, own_signal: str | None, record: JobRecord | None, now: float) -> bool:
    """Whether a signal is only the header's reminder of a limit that our own clock knows better. `own_signal`:
    cluster.slurm.signal, which is obeyed whenever it comes."""
    if signal != "SIGUSR1" or own_signal is not None or record is None:
        return False
    if record.preempted_at is not None or record.phase != "running" or record.ends_at is None:
        return False
    return record.ends_at - now < BACKSTOP_S


# ---- starts without progress ----


def count_stalled(before: tuple[int, int], step: int, *, preempted: bool) -> tuple[int, int]:
    """(furthest step, starts in a row without a further one) after a start that reached `step`. Being preempted early
    says nothing about the run."""
    furthest, stalled = before
    if step > furthest:
        return step, 0
    return furthest, stalled if preempted else stalled + 1
