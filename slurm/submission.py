"""sbatch so that no job is lost and none is doubled, whatever dies half way. What a launch has done so far stands in
control/<job_id>/: slurm-intent.json (put once, before sbatch), a lock that sbatch itself holds while it lives, and
slurm-submitted.json (what it said). Whoever finds the first without the last asks Slurm, which knows a job by the path
of its script. What Slurm answers is slurm/standing.py's.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from dtrain.cluster import exits
from dtrain.cluster.errors import UsageError
from dtrain.cluster.jobplan import JobPlan
from dtrain.cluster.rundir import Control, RunDir, put_end, write_atomic, write_once
from dtrain.slurm import client, owner

SBATCH_S = 60.0  # sbatch tries again for a while when slurmctld is busy
UNSENT_S = 60.0  # from the record of a launch to its sbatch: longer means that the launch died in between

Outcome = Literal["accepted", "unclear"]
Progress = Literal["coming", "underway", "interrupted", "settled", "abandoned", "never"]


def script_path(plan: JobPlan) -> Path:
    """The script's place, which no other job has: by it Slurm's record of the job is found."""
    return RunDir(plan.run_dir).control(plan.job_id).path / "job.sbatch"


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    outcome: Outcome
    words: str = ""


def submit(plan: JobPlan, script: str, options: list[str]) -> Answer:
    """Runs sbatch, once for this job. Raises UsageError where Slurm refuses it, with Slurm's words."""
    control = RunDir(plan.run_dir).control(plan.job_id)
    path = script_path(plan)
    write_atomic(path, script, 0o600)
    environ = client.environment(os.environ, client.script_options(script))
    with _submitting(control) as lock:
        if not write_once(_intent(control), json.dumps(_who()), 0o600):
            raise UsageError(f"{plan.run_dir}: job {plan.job_id} was given up before it was submitted. Launch again.")
        argv = ["sbatch", "--parsable", *options, str(path)]
        code, said, errors = client.run(argv, environ, SBATCH_S, cwd=plan.cwd, keeps=[lock])
        number, _, cluster = said.strip().partition(";")
        if code == 0 and number.isdigit():
            owner.note_submission(control, number, cluster)
            return Answer(outcome="accepted")
        if code is not None and code != 0 and not client.is_no_answer(errors, code):
            raise UsageError(f"sbatch refused the job: {client.last_words(errors)}")
    late = f"sbatch had no answer within {SBATCH_S:g} s"
    return Answer(outcome="unclear", words=late if code is None else client.last_words(errors) or "sbatch said nothing")


def progress(control: Control, now: float) -> Progress:
    """How far the submission of a job has come that no Slurm job is known for; settled where one is."""
    newest = owner.newest_owner(control)
    if newest is not None:
        return "abandoned" if newest.is_nobody else "settled"
    if owner.slurm_job_id(control) is not None:
        return "settled"
    if not _intent(control).exists():
        return "coming" if now - control.path.stat().st_mtime < UNSENT_S else "never"
    return "underway" if _is_locked(control) else "interrupted"


def intended_at(control: Control) -> float:
    """When sbatch was started, by the file system's clock."""
    return _intent(control).stat().st_mtime


def abandon(plan: JobPlan, reason: str) -> bool:
    """Ends a job of which Slurm has no trace. False where it has begun after all. Should Slurm take the request in
    hours later, that job finds somebody in its place, and ends."""
    run = RunDir(plan.run_dir)
    control = run.control(plan.job_id)
    if not owner.claim_for_nobody(control):
        return False
    put_end(run, control, state="failed", exit_code=exits.FAILED, reason=reason, step=0)
    return True


def abandoned_elsewhere(run: RunDir, command: str) -> bool:
    """Whether `command` is the script of a job of this run that was given up: such a job is nobody's."""
    path = Path(command)
    if path.name != "job.sbatch" or path.parent.parent != run.path / "control":
        return False
    newest = owner.newest_owner(Control(path.parent))
    return newest is not None and newest.is_nobody


def _intent(control: Control) -> Path:
    return control.path / "slurm-intent.json"


def _lock(control: Control) -> Path:
    return control.path / "slurm-submit.lock"


def _who() -> dict[str, object]:
    return {"host": socket.gethostname(), "pid": os.getpid(), "at": round(time.time(), 3)}


@contextlib.contextmanager
def _submitting(control: Control) -> Iterator[int]:
    """The lock's descriptor, for sbatch to inherit: it is held until both are gone."""
    descriptor = os.open(_lock(control), os.O_RDWR | os.O_CREAT, 0o600)
    try:
        with contextlib.suppress(OSError):  # a file system without locks: then only time tells
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield descriptor
    finally:
        os.close(descriptor)


def _is_locked(control: Control) -> bool:
    try:
        descriptor = os.open(_lock(control), os.O_RDWR)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return time.time() - intended_at(control) < SBATCH_S
    finally:
        os.close(descriptor)
    return False
