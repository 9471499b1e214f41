"""`dtrain launch --batch`: what the script of a Slurm job calls on its first node. Hands the job that was recorded
for it to the driver, and imports little: each job waits for this. One that is not recorded yet is launcher/byhand.py's.
"""

from __future__ import annotations

import argparse
import os

from dtrain.cluster.errors import UsageError
from dtrain.launcher.runs import Job, read_job
from dtrain.slurm.driver import drive
from dtrain.slurm.jobenv import SlurmJob, slurm_job
from dtrain.slurm.owner import newest_owner
from dtrain.slurm.steps import is_over


def run_in_job(args: argparse.Namespace) -> int:
    """The exit code of the batch script."""
    here = slurm_job(os.environ)
    if here is None:
        raise UsageError("launch --batch: there is no Slurm job around this process. Write `dtrain launch` without it.")
    there = read_job(args.run_dir) if args.run_dir else None
    if there is not None and is_ours(there, args.job_id, here):
        return drive(there.plan)
    from dtrain.launcher.byhand import run_by_hand

    return run_by_hand(args, here)


def is_ours(job: Job, job_id: str | None, here: SlurmJob) -> bool:
    """Whether the run directory's job is this Slurm job's: it has run in it before, or it was submitted with it and no
    other Slurm job holds it."""
    owner = newest_owner(job.control)
    if owner is not None and owner.slurm_job_id == here.id:
        return True
    return job.plan.job_id == job_id and (owner is None or is_over(owner.slurm_job_id))
