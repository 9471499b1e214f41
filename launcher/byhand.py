"""A Slurm job whose script a person has submitted: `sbatch train.sbatch cfg.yaml key=value`, or what a dry run printed.
What a launch does on a login node is done here, on the job's first node.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from contextlib import ExitStack

from dtrain.cluster import exits
from dtrain.cluster.errors import ConfigError, DtrainError, UsageError
from dtrain.launcher.compose import LaunchConfig, load_config
from dtrain.launcher.injob import is_ours
from dtrain.launcher.inside import differences, fit
from dtrain.launcher.launching import prepare
from dtrain.launcher.lease import Busy
from dtrain.launcher.runs import Job, read_job
from dtrain.launcher.state import read_status
from dtrain.launcher.submit import ALIVE
from dtrain.slurm.driver import drive
from dtrain.slurm.jobenv import SlurmJob
from dtrain.slurm.owner import note_submission, slurm_job_id
from dtrain.slurm.queue import show_job


def run_by_hand(args: argparse.Namespace, here: SlurmJob) -> int:
    """The exit code of the batch script."""
    asked = _as_written(args)
    run_dir = args.run_dir or (asked.run_dir if asked else None)
    there = read_job(run_dir) if run_dir else None
    if there is not None and is_ours(there, args.job_id, here):
        return drive(there.plan)
    if there is not None and (code := _refused_by(there)):
        return code
    with ExitStack() as held:
        return _start_here(args, asked, here, held)


def _start_here(args: argparse.Namespace, asked: LaunchConfig | None, here: SlurmJob, held: ExitStack) -> int:
    fitted = fit(asked.cluster if asked else None, asked.origins if asked else {}, here, whole=True)
    for line in differences(asked, here, os.environ) if asked else ():
        print(f"this job's header decides: {line}", flush=True)
    typed = [args.config, *args.overrides]
    args.backend, args.nodes, args.overrides = "slurm", fitted.nodes, [*args.overrides, *fitted.overrides]
    args.argv = submitted_as(here, typed) or args.argv
    try:
        outcome = prepare(args, held)
    except ConfigError:
        raise
    except UsageError as error:
        there = read_job(asked.run_dir) if asked else None
        code = _refused_by(there) if there is not None and not is_ours(there, None, here) else 0
        if not code and not isinstance(error, Busy):
            raise
        print(error, file=sys.stderr)
        return code or exits.NEVER_RETRY
    if isinstance(outcome, int):
        return outcome
    job, _ = outcome
    note_submission(job.control, here.id)
    return drive(job.plan)


def _as_written(args: argparse.Namespace) -> LaunchConfig | None:
    """The config before the allocation's shape is put into it; None where it makes no sense without."""
    with contextlib.suppress(ConfigError):
        return load_config(args.config, args.overrides, name=args.name, run_dir=args.run_dir)
    return None


def _refused_by(there: Job) -> int:
    """The exit code where another job has the run directory, after saying which; 0 where it is free."""
    state = read_status(there, look_for_checkpoint=False)["state"]
    if state not in ALIVE:
        return 0
    number = slurm_job_id(there.control)
    slurm = f" (Slurm job {number})" if number else ""
    print(
        f"{there.run.path}: job {there.plan.job_id}{slurm} is {state} here; this one ends without starting anything. "
        "Follow that one with `dtrain attach`, end it with `dtrain cancel`, or give this one another run_dir or name.",
        file=sys.stderr,
    )
    return exits.UNKNOWN if state == "unknown" else exits.NEVER_RETRY


def submitted_as(here: SlurmJob, words: list[str]) -> tuple[str, ...]:
    """What a person types to have the same again; () where Slurm does not say."""
    try:
        records = show_job(here.id)
    except DtrainError:
        return ()
    script = records[0].command.removesuffix(" ".join(words)).strip() if records else ""
    return ("sbatch", script, *words) if script else ()
