"""What Slurm has of one dtrain job at this moment: whether a Slurm job of it waits or runs, or how the last one ended.
Silence is never taken for an end. Words for it are slurm/waiting.py's, the questions slurm/queue.py's.
"""

from __future__ import annotations

import contextlib
import json
import time
from dataclasses import dataclass
from pathlib import Path

from dtrain.cluster import exits
from dtrain.cluster.errors import UsageError
from dtrain.cluster.jobplan import JobPlan
from dtrain.cluster.procs import Liveness
from dtrain.cluster.rundir import Control, RunDir, put_end, read_json, write_once
from dtrain.slurm import owner, submission
from dtrain.slurm.client import SlurmRefused, SlurmUnreachable, ask
from dtrain.slurm.queue import Snapshot, look, show_job
from dtrain.slurm.records import SACCT_FORMAT, JobRecord, parse_sacct
from dtrain.slurm.waiting import ending_words, waiting_words

SURE_S = 5.0  # slurmctld may still be at a request whose sbatch is gone
RECENT_S = 10.0  # a coordinator writes status.json about once a second
SACCT_S = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Standing:
    liveness: Liveness
    jobs: tuple[JobRecord, ...] = ()  # those that wait, run or are being cleaned up; the newest last
    words: str = ""  # why nothing runs, or why that is not known


def standing(plan: JobPlan, max_age_s: float = 0.0) -> Standing:
    """Asks Slurm where no answer younger than `max_age_s` is there, and always before it says gone."""
    run = RunDir(plan.run_dir)
    control = run.control(plan.job_id)
    try:
        uid = control.path.stat().st_uid
        progress = submission.progress(control, time.time())
    except FileNotFoundError:
        return Standing(liveness="gone")
    if progress == "abandoned" or progress == "never":
        return Standing(liveness="gone", words="was never submitted: its launch ended before")
    if progress == "coming" or progress == "underway":
        return Standing(liveness="alive", words="is being submitted")
    if progress == "interrupted":
        return _find_or_abandon(plan, uid)
    if (ending := _known_end(control)) is not None:
        return ending
    return _ask_for(plan, uid, max_age_s)


def _ask_for(plan: JobPlan, uid: int, max_age_s: float) -> Standing:
    began_at = time.time()
    # Before it is gone: an answer to a question of this moment, because a cached one may be older than the job.
    for after in (0.0, began_at):
        found = look(uid, max_age_s=max_age_s, after=after)
        _clear_ghosts(plan, found)
        if found.error:
            return Standing(liveness="unknown", words=f"slurmctld does not answer: {found.error}")
        ours = _ours(plan, found)
        alive = tuple(job for job in ours if job.phase != "over")
        if alive:
            return Standing(liveness="alive", jobs=alive, words=_words(plan, alive[-1]))
    return _conclude(plan, ours)


def _words(plan: JobPlan, job: JobRecord) -> str:
    if job.phase == "pending":
        held = job.reason == "BeginTime" and RunDir(plan.run_dir).control(plan.job_id).ended.exists()
        return waiting_words(job, time.time()) + ("; `dtrain attach` lets it go at once" if held else "")
    return "its nodes are being cleaned up" if job.phase == "completing" else ""


def _ours(plan: JobPlan, snapshot: Snapshot) -> list[JobRecord]:
    """By the script's path, or by number where a person submitted a script of his own. A number that Slurm has given
    anew belongs to another script. The newest last."""
    script = str(submission.script_path(plan))
    number = owner.slurm_job_id(RunDir(plan.run_dir).control(plan.job_id))

    def is_ours(job: JobRecord) -> bool:
        if job.command == script or job.command.startswith(f"{script} "):
            return True
        return str(job.job_id) == number and not submission.script_path(plan).exists()

    return sorted((job for job in snapshot.jobs if is_ours(job)), key=lambda job: job.job_id)


def _clear_ghosts(plan: JobPlan, snapshot: Snapshot) -> None:
    """Slurm jobs of this run that were given up and came to be after all."""
    for job in snapshot.jobs:
        if job.phase in ("pending", "running") and submission.abandoned_elsewhere(RunDir(plan.run_dir), job.command):
            with contextlib.suppress(SlurmRefused, SlurmUnreachable, UsageError):
                ask("scancel", str(job.job_id))


def _find_or_abandon(plan: JobPlan, uid: int) -> Standing:
    """The launch died, or sbatch said nothing that can be read. Slurm knows."""
    control = RunDir(plan.run_dir).control(plan.job_id)
    for patience_s in (0.0, SURE_S):
        since_s = time.time() - submission.intended_at(control)
        time.sleep(min(max(0.0, patience_s - since_s), SURE_S))
        found = look(uid, after=time.time())
        if found.error:
            words = f"whether Slurm has accepted it is not known; slurmctld does not answer: {found.error}"
            return Standing(liveness="unknown", words=words)
        if ours := _ours(plan, found):
            owner.note_submission(control, str(ours[-1].job_id))
            break
    else:
        if submission.abandon(plan, "was never submitted: sbatch did not get through, and Slurm has no such job"):
            return Standing(liveness="gone", words="was never submitted")
    return _ask_for(plan, uid, 0.0)


def run_of_number(number: str) -> Path | None:
    """The run directory of a Slurm job that `launch` submitted; None where Slurm can't tell."""
    try:
        records = show_job(number)
    except (SlurmRefused, SlurmUnreachable, UsageError):
        return None
    scripts = [Path(job.command) for job in records]
    return next((path.parents[2] for path in scripts if path.match("control/*/job.sbatch")), None)


# ---- how it ended ----


def _conclude(plan: JobPlan, ours: list[JobRecord]) -> Standing:
    """No Slurm job of it waits or runs, says one who knows; once more asked by number, then it is written down."""
    control = RunDir(plan.run_dir).control(plan.job_id)
    number = str(ours[-1].job_id) if ours else owner.slurm_job_id(control) or ""
    try:
        last = _show(plan, number) or (ours[-1] if ours else None)
    except SlurmUnreachable as error:
        return Standing(liveness="unknown", words=f"slurmctld does not answer: {error}")
    if last is not None and last.phase != "over":
        return Standing(liveness="alive", jobs=(last,), words=_words(plan, last))
    if last is None and _is_lively(control):
        return Standing(liveness="alive", words=f"Slurm does not know job {number}, but its nodes are at work")
    last = last or _account(number)
    words = ending_words(last) if last else f"Slurm does not know job {number} any more"
    if last is not None and last.state == "CANCELLED":
        _write_cancelled(plan, words)
    record = {"words": words, "owner": _owner_number(control), "at": round(time.time(), 3)}
    if control.ended.exists() or last is not None or not _is_lively(control):
        write_once(_end_file(control), json.dumps(record), 0o600)
    return Standing(liveness="gone", words=words)


def _show(plan: JobPlan, number: str) -> JobRecord | None:
    """Slurm's record of the job; None where it has none, or gave the number to another."""
    try:
        records = show_job(number) if number else []
    except SlurmRefused as error:
        if "nvalid job id" in str(error):
            return None
        raise SlurmUnreachable(str(error)) from error
    if number and not records:
        raise SlurmUnreachable("scontrol printed nothing")
    ours = _ours(plan, Snapshot(jobs=tuple(records)))
    return ours[-1] if ours else None


def _account(number: str) -> JobRecord | None:
    """What slurmdbd remembers, where there is one."""
    options = ("--noheader", "--parsable2", "--allocations", f"--jobs={number}", f"--format={SACCT_FORMAT}")
    with contextlib.suppress(SlurmRefused, SlurmUnreachable, UsageError):
        records = parse_sacct(ask("sacct", *options, timeout_s=SACCT_S)) if number else []
        return records[-1] if records and records[-1].phase == "over" else None
    return None


def _is_lively(control: Control) -> bool:
    with contextlib.suppress(OSError):
        return abs(time.time() - control.status.stat().st_mtime) < RECENT_S and not control.ended.exists()
    return False


def _write_cancelled(plan: JobPlan, words: str) -> None:
    """By somebody with scancel: nothing that was left running could write it."""
    run = RunDir(plan.run_dir)
    control = run.control(plan.job_id)
    step = int((read_json(control.status) or {}).get("step") or 0)
    put_end(run, control, state="cancelled", exit_code=exits.CANCELLED, reason=words, step=step)


def _known_end(control: Control) -> Standing | None:
    """An end that was written down, unless the job has begun again since."""
    record = read_json(_end_file(control))
    if record is None or record.get("owner") != _owner_number(control):
        return None
    return Standing(liveness="gone", words=str(record.get("words", "")))


def _end_file(control: Control) -> Path:
    return control.path / f"slurm-end-{_owner_number(control):04d}.json"


def _owner_number(control: Control) -> int:
    newest = owner.newest_owner(control)
    return 0 if newest is None else newest.number
