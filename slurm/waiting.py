"""What Slurm's reasons and last states mean for the person: in words, with what to do. Pure tables."""

from __future__ import annotations

import time

from dtrain.slurm.records import JobRecord

# squeue's words, blanks in the place of underscores -> what it waits for. In squeue(1), JOB REASON CODES.
_WAITS = {
    "": "waits to be looked at",
    "Resources": "waits for nodes: first in line",
    "Priority": "waits behind jobs of higher priority",
    "Dependency": "waits for the jobs that cluster.slurm.dependency names",
    "DependencyNeverSatisfied": "never starts: the job that it depends on has failed. Cancel it, launch it without",
    "BeginTime": "waits for its start time",
    "JobHeldUser": "is held. `scontrol release {id}` lets it go",
    "JobHeldAdmin": "is held by an administrator",
    "Reservation": "waits for its reservation to begin",
    "PartitionNodeLimit": "never starts: it asks for more nodes than the partition gives. Cancel it, launch with fewer",
    "PartitionTimeLimit": "never starts: it asks for more time than the partition gives. Cancel it, launch with less",
    "PartitionDown": "waits: the partition is down",
    "PartitionInactive": "waits: the partition takes no jobs now",
    "PartitionConfig": "never starts as it is: the partition's limits do not allow it (`scontrol show partition`)",
    "BadConstraints": "never starts: no nodes have what cluster.slurm.constraint asks for",
    "ReqNodeNotAvail": "waits: a node that it must have is not available (down, drained or reserved)",
    "NodeDown": "waits: a node that it must have is down",
    "InvalidAccount": "never starts: the account is not valid. Cancel it, set cluster.slurm.account",
    "InvalidQOS": "never starts: the QOS is not valid. Cancel it, set cluster.slurm.qos",
    "Licenses": "waits for licenses",
    "Cleaning": "is being cleaned up on its old nodes before it starts again",
    "launch failed requeued held": "is held: its nodes could not start it. `scontrol release {id}` tries again",
    "Prolog": "its nodes are being prepared",
}
_LIMITS = ("QOS", "Assoc", "Max")  # QOSMaxCpuPerUserLimit, AssocGrpNodeLimit, MaxJobsPerAccount ...
_NODES_GONE = "Nodes required for job are DOWN"

_ENDS = {
    "TIMEOUT": "its time limit passed. Raise cluster.slurm.time",
    "DEADLINE": "its deadline passed",
    "OUT_OF_MEMORY": "a node ran out of the memory that the job asked for. Raise cluster.slurm.mem",
    "NODE_FAIL": "a node failed",
    "BOOT_FAIL": "a node could not be booted",
    "PREEMPTED": "a job of higher priority took its nodes",
    "CANCELLED": "it was cancelled (scancel)",
    "REVOKED": "another cluster has taken it",
}


_NO_LOG = 53  # no signal of the kernel's: slurmd's word for it


def waiting_words(job: JobRecord, now: float) -> str:
    """Why a pending job does not run, and when it is expected to."""
    said = f"Slurm job {job.job_id} {_why(job)}"
    if job.starts_at is None or job.starts_at <= now or "never" in said:
        return said
    form = "%H:%M" if job.starts_at - now < 20 * 3600 else "%d %b %H:%M"
    verb = "starts" if job.reason == "BeginTime" else "expected to start"
    return f"{said}, {verb} at {time.strftime(form, time.localtime(job.starts_at))}"


def _why(job: JobRecord) -> str:
    if job.reason in _WAITS:
        words = _WAITS[job.reason].format(id=job.job_id)
        return words if not job.reason or job.reason in words else f"{words} ({job.reason})"
    if job.reason.startswith(_NODES_GONE):
        return "waits: nodes that it could have are down, drained or reserved"
    if job.reason.startswith(_LIMITS):
        return f"waits: a limit of your account or QOS is reached ({job.reason})"
    return f"waits for {job.reason}"


def ending_words(job: JobRecord) -> str:
    """How a job ended that could write nothing itself."""
    why = _ENDS.get(job.state)
    if why is None and job.exit_signal == _NO_LOG:
        why = "the node could not open the job's log. The run directory must lie on a disk that the nodes share"
    elif why is None and job.exit_signal:
        why = f"its script was killed by signal {job.exit_signal}"
    elif why is None:
        why = f"its script ended with {job.exit_code}" + (f" ({job.reason})" if job.reason else "")
    return f"Slurm ended job {job.job_id} ({job.state}): {why}"
