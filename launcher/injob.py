"""`dtrain launch --batch`: what the script of a Slurm job calls on its first node. Finds the job that was recorded for
it and hands it to the driver."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping

from dtrain.cluster import exits
from dtrain.launcher.runs import Job, read_job
from dtrain.slurm.driver import drive
from dtrain.slurm.owner import newest_owner


def run_in_job(args: argparse.Namespace) -> int:
    job = recorded_job(args.run_dir, args.job_id, os.environ)
    if job is None:
        print("nothing recorded", file=sys.stderr)
        return exits.NEVER_RETRY
    return drive(job.plan)


def recorded_job(run_dir: str | None, job_id: str | None, environ: Mapping[str, str]) -> Job | None:
    """The job that was recorded for this Slurm job: it has run in it before, or it was submitted with it."""
    job = read_job(run_dir) if run_dir else None
    if job is None:
        return None
    owner = newest_owner(job.control)
    if owner is not None and owner.slurm_job_id == environ.get("SLURM_JOB_ID"):
        return job
    return job if job.plan.job_id == job_id else None
