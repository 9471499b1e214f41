"""Runs on disk: the job of a run directory, and which run a person means by a label, a path or a job id."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dtrain.cluster.backends import Backend, get_backend
from dtrain.cluster.errors import DtrainError, UsageError
from dtrain.cluster.jobplan import JobPlan
from dtrain.cluster.mirror import is_url
from dtrain.cluster.procs import Liveness
from dtrain.cluster.rundir import Control, RunDir, read_json, refresh
from dtrain.cluster.storage import IMPATIENT_RETRY_S, open_storage
from dtrain.launcher import labels
from dtrain.launcher.console import plural
from dtrain.runtime.checkpoint.attempts import CheckpointInfo, live_checkpoints, newest_live
from dtrain.runtime.checkpoint.manifest import decode_manifest
from dtrain.runtime.checkpoint.names import manifest_key


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """The current submission of a run directory: the content of job.json."""

    run: RunDir
    plan: JobPlan
    submitted_at: float  # seconds since the epoch
    steps: int | None  # train.steps

    @property
    def control(self) -> Control:
        return self.run.control(self.plan.job_id)

    @property
    def backend(self) -> Backend:
        return get_backend(self.plan.backend)

    def may_start_again(self, ended: dict[str, Any]) -> bool:
        """Whether a job that ended so may go on without a person: then only its back end knows if it is over."""
        return ended.get("state") == "stopped" and self.backend.restarts_after_stop(self.plan)

    def final_end(self) -> dict[str, Any] | None:
        """The content of ended.json, where it is the job's last word."""
        ended = read_json(self.control.ended)
        return None if ended is None or self.may_start_again(ended) else ended

    def backend_state(self, max_age_s: float = 0.0) -> Liveness:
        """alive | gone | unknown; not asked for a job whose end is written down for good."""
        return "gone" if self.final_end() is not None else self.backend.state(self.plan, max_age_s)

    def newest_checkpoint_step(self) -> int | None:
        """None where there is none, and where the store can't be asked."""
        try:
            newest = newest_checkpoint(self.plan.checkpoint_url)
        except (DtrainError, OSError):
            return None
        return None if newest is None else newest.step


def newest_checkpoint(url: str) -> CheckpointInfo | None:
    """The newest live checkpoint under `url`, None where there is none. Raises StorageError, CheckpointError."""
    return newest_live(live_checkpoints(open_storage(url, retry_s=IMPATIENT_RETRY_S)))


def describe_checkpoint(url: str, info: CheckpointInfo) -> str:
    """By which layout it was saved: `attempt 1: ddp on 3 ranks`."""
    try:
        manifest = decode_manifest(open_storage(url, retry_s=IMPATIENT_RETRY_S).get(manifest_key(info.dir)), info.dir)
    except DtrainError:
        return f"attempt {info.attempt}; its manifest can't be read"
    return f"attempt {info.attempt}: {manifest.strategy.get('name', '?')} on {plural(manifest.world_size, 'rank')}"


def read_job(path: str | os.PathLike[str]) -> Job | None:
    """The job of the run directory `path`, or at a URL; None where no run was ever submitted. Raises StorageError."""
    run = RunDir(path)
    refresh(run.path)
    return _read(run)


def _read(run: RunDir) -> Job | None:
    if not os.path.isfile(run.job):  # a label may also be the name of a file here, or no file name at all
        return None
    try:
        data = read_json(run.job)
        if data is None:
            return None
        plan = JobPlan.from_json(data)
    except (TypeError, KeyError, ValueError, AttributeError) as error:
        raise UsageError(f"{run.job} is not a job of this dtrain ({error}). Look at it, or move it away.") from error
    return Job(run=run, plan=plan, submitted_at=float(data.get("submitted_at", 0.0)), steps=data.get("steps"))


def known_jobs(cwd: Path) -> list[Job]:
    """The runs of the label registry and those under `cwd`/runs that still exist, the newest submission first. Those
    at a URL as they were when they were looked at last."""
    remembered = [label.run_dir for label in labels.remembered()]
    nearby = [str(file.parent) for file in (cwd / "runs").glob("*/job.json")]
    jobs = []
    for place in dict.fromkeys(place if is_url(place) else os.path.abspath(place) for place in remembered + nearby):
        try:
            job = _read(RunDir(place))
        except (UsageError, ValueError, OSError):
            continue  # one broken directory must not hide the others
        if job is not None:
            jobs.append(job)
    return sorted(jobs, key=lambda job: job.submitted_at, reverse=True)


def resolve(text: str, cwd: Path) -> tuple[Job, str]:
    """The run that `text` means, and a remark for the person ("" where nothing is unclear). Raises UsageError,
    StorageError."""
    job, remark = _find(text, cwd)
    if is_url(job.run.place) and (newest := read_job(job.run.place)) is not None:
        job = newest
    return job, remark


def _find(text: str, cwd: Path) -> tuple[Job, str]:
    if is_url(text):
        if (job := read_job(text)) is None:
            raise UsageError(f"{text}: no run was submitted there.")
        return job, ""
    if (job := read_job(os.path.join(cwd, os.path.expanduser(text)))) is not None:
        return job, ""
    jobs = known_jobs(cwd)
    for job in jobs:
        if job.plan.job_id == text:
            return job, ""
        if _is_one_word(text) and os.path.isdir(job.run.control(text).path):
            return job, f"{text} was an earlier job of this run; its newest is {job.plan.job_id}"
    named = [job for job in jobs if job.plan.name == text]
    if named:
        others = ", ".join(job.run.place for job in named[1:])
        return named[0], f"{text} is {named[0].run.place}, launched last; also called so: {others}" if others else ""
    if text.isdigit() and (job := find_by_number(text, jobs)) is not None:
        return job, ""
    if (
        _is_one_word(text) and (job := read_job(cwd / "runs" / text)) is not None
    ):  # a folder that was renamed, or copied
        return job, ""
    raise UsageError(_not_found(text, cwd, jobs))


def find_by_number(number: str, jobs: Iterable[Job]) -> Job | None:
    """The run of a scheduler's job: one that is known, or one of which the scheduler tells the place."""
    from dtrain.slurm.owner import slurm_job_id
    from dtrain.slurm.standing import run_of_number

    for job in jobs:
        if job.plan.backend == "slurm" and slurm_job_id(job.control) == number:
            return job
    place = run_of_number(number)
    return None if place is None else read_job(place)


def _is_one_word(text: str) -> bool:
    return bool(text) and "/" not in text and text not in (".", "..")


def _not_found(text: str, cwd: Path, jobs: Iterable[Job]) -> str:
    names = list(dict.fromkeys(job.plan.name for job in jobs))
    found = f"No run is known, and {cwd / 'runs'} has none."
    if near := difflib.get_close_matches(text, names, n=3, cutoff=0.5):
        found = f"Similar: {', '.join(near)}."
    elif names:
        found = f"Known labels: {', '.join(names[:5])}{', ...' if len(names) > 5 else ''}."
    return f"{text}: no run has this label, directory or job id. {found} `dtrain ls` shows all."
