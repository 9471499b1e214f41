"""The end of a Slurm job's part in a run, carried out: Slurm is asked how things stand, slurm/stops.py decides, and the
job is put back into the queue, submitted anew, or left. Called when the run's state is saved, never before: `scontrol
requeue` ends every process of the job.
"""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from dtrain.cluster import exits
from dtrain.cluster.backends import NODE_FAILURES
from dtrain.cluster.errors import DtrainError, UsageError
from dtrain.cluster.jobplan import JobPlan
from dtrain.cluster.rundir import Control, RunDir, append_event, read_json, write_atomic, write_once
from dtrain.slurm import badnodes, client
from dtrain.slurm.client import SlurmRefused, SlurmUnreachable, ask
from dtrain.slurm.hostlist import compress, expand
from dtrain.slurm.limits import parse_partitions
from dtrain.slurm.options import submit_options
from dtrain.slurm.owner import Owner, newest_owner, note_submission
from dtrain.slurm.records import SQUEUE_FORMAT, JobRecord, parse_squeue
from dtrain.slurm.stopping import look, write_stopped
from dtrain.slurm.stops import Ending, Facts, count_stalled, decide_end
from dtrain.slurm.submission import SBATCH_S, script_path

_SILENCE_S = 300.0  # for slurmctld to answer at the end; the time limit may come first
_PAUSE_S = 2.0


def conclude(plan: JobPlan, owner: Owner, code: int) -> int:
    """The batch script's exit code, after what is to happen next has been arranged. `code`: the run's last word."""
    ending = arrange(plan, owner) if code == exits.STOPPED else None
    return code if ending is None else ending.exit_code


def arrange(plan: JobPlan, owner: Owner, sleep: Callable[[float], None] = time.sleep) -> Ending | None:
    """What happens next to a run that can go on, done; None where it is for others to do, or they have done it."""
    write_stopped(plan, "stopped; no agent could say why")
    control = RunDir(plan.run_dir).control(plan.job_id)
    # Once a start of the job: a driver that was cut off with its node may wake up when others have done its part.
    mark = control.path / f"slurm-end-{owner.number:04d}"
    newest = newest_owner(control)
    if newest != owner or not write_once(mark, socket.gethostname(), 0o600):
        return None
    record = _look_long(owner.slurm_job_id, sleep)
    ending = decide_end(_facts(plan, control, owner, exits.STOPPED, record))
    if ending.action == "requeue":
        ending = _requeue(plan, owner, ending, sleep)
    if ending.action == "resubmit":
        ending = _submit_anew(plan, owner, ending, record, sleep)
    if ending.action != "requeue":
        _tell(plan, ending)
    if ending.action in ("requeue", "leave"):
        _exclude(plan, owner, record)
    return ending


def _look_long(slurm_job_id: str, sleep: Callable[[float], None]) -> JobRecord | None:
    for _ in range(int(_SILENCE_S / _PAUSE_S)):
        if (record := look(slurm_job_id)) is not None:
            return record
        sleep(_PAUSE_S)
    return None


def _facts(plan: JobPlan, control: Control, owner: Owner, code: int, record: JobRecord | None) -> Facts:
    return Facts(
        exit_code=code,
        on_stop=plan.slurm.on_stop,
        restart=owner.restart,
        record=record,
        now=time.time(),
        cancelled=control.cancel.exists(),
        lost=badnodes.lost_in(badnodes.bad_nodes(control), owner.number),
        stalled=_count(control, preempted=record is not None and record.preempted_at is not None),
        max_stalled=plan.max_restarts_without_progress,
    )


def _count(control: Control, *, preempted: bool) -> int:
    """Starts in a row that committed nothing new, this one included."""
    path = control.path / "slurm-progress.json"
    before = read_json(path) or {"step": 0, "stalled": 0}
    step = int((read_json(control.path / "memory.json") or {}).get("committed", 0))
    furthest, stalled = count_stalled((int(before["step"]), int(before["stalled"])), step, preempted=preempted)
    write_atomic(path, json.dumps({"step": furthest, "stalled": stalled}), 0o600)
    return stalled


# ---- back into the queue ----


def _requeue(plan: JobPlan, owner: Owner, ending: Ending, sleep: Callable[[float], None]) -> Ending:
    """What was done; a resubmission where Slurm refuses."""
    _tell(plan, ending)  # before: in the same instant this process is told to end
    for _ in range(int(_SILENCE_S / _PAUSE_S)):
        try:
            ask("scontrol", "requeue", owner.slurm_job_id)
        except SlurmRefused as error:
            if "pending" in str(error).lower():  # Slurm was faster
                return ending
            reason = f"{ending.reason}; Slurm refuses to requeue it ({error}), so it is submitted anew"
            return Ending(action="resubmit", exit_code=ending.exit_code, reason=reason)
        except SlurmUnreachable:
            record = look(owner.slurm_job_id)  # scontrol gets the signal too, and may die of it after its work
            if record is not None and (record.restarts > owner.restart or record.phase != "running"):
                return ending
            sleep(_PAUSE_S)
        else:
            return ending
    return Ending(action="finish", exit_code=ending.exit_code, reason="Slurm does not answer; launch it again")


def _exclude(plan: JobPlan, owner: Owner, record: JobRecord | None) -> None:
    """Slurm takes this only once the job is on its way back, and as the whole list."""
    names = _excluded(plan, record)
    if not names:
        return
    try:
        ask("scontrol", "update", f"JobId={owner.slurm_job_id}", f"ExcNodeList={compress(names)}")
    except DtrainError as error:
        print(f"{compress(names)} could not be excluded: {error}", flush=True)
    else:
        _tell_excluded(plan, names)


def _excluded(plan: JobPlan, record: JobRecord | None) -> list[str]:
    control = RunDir(plan.run_dir).control(plan.job_id)
    known = badnodes.bad_nodes(control)
    if not any(node.count >= NODE_FAILURES for node in known.values()):
        return []
    own = expand(record.excluded) if record is not None and record.excluded else []
    return badnodes.excluded(known, own, spare_nodes(plan, record))


def spare_nodes(plan: JobPlan, record: JobRecord | None) -> int:
    """Nodes of the partition beyond those that the job needs; 0 where Slurm does not say."""
    try:
        partitions = parse_partitions(ask("scontrol", "-o", "show", "partition"))
    except DtrainError:
        return 0
    wanted = record.partition if record is not None else ""
    totals = [int(p.get("TotalNodes", 0)) for p in partitions if p["PartitionName"] in wanted.split(",")]
    return max(totals, default=0) - plan.nodes


# ---- submitted anew ----


def _submit_anew(
    plan: JobPlan, owner: Owner, ending: Ending, record: JobRecord | None, sleep: Callable[[float], None]
) -> Ending:
    """What was done. A site may forbid sbatch on its nodes: where it was only the quicker way, back into the queue."""
    done = _resubmit(plan, owner, ending, record, sleep)
    if done.action == "resubmit" or ending.waits or plan.slurm.on_stop != "requeue":
        return done
    back = _requeue(plan, owner, replace(done, action="requeue"), sleep)
    return done if back.action == "resubmit" else back


def _resubmit(
    plan: JobPlan, owner: Owner, ending: Ending, record: JobRecord | None, sleep: Callable[[float], None]
) -> Ending:
    """What was done; nothing more than the end where Slurm refuses that too."""
    control = RunDir(plan.run_dir).control(plan.job_id)
    try:
        script = own_script(plan, owner)
        options = ["--parsable"]
        if ending.waits:
            options.append(f"--dependency=afterany:{owner.slurm_job_id}")
        if names := _excluded(plan, record):
            options.append(f"--exclude={compress(names)}")
        if record is not None and Path(record.stdout).parent == RunDir(plan.run_dir).path / "logs":
            options += submit_options(plan)  # as launch has it; what a person submitted says itself where its log lies
        words = (plan.config, *plan.overrides) if '"$@"' in script.read_text() else ()
        number = _sbatch(plan, owner, [*options, str(script), *words], sleep)
    except (DtrainError, OSError) as error:
        return Ending(action="finish", exit_code=ending.exit_code, reason=f"{ending.reason}; sbatch: {error}")
    note_submission(control, number)
    if names:
        _tell_excluded(plan, names)
    return Ending(action="resubmit", exit_code=ending.exit_code, reason=f"{ending.reason}; Slurm job {number} goes on")


def own_script(plan: JobPlan, owner: Owner) -> Path:
    """The one that this job was submitted with. A script of a person's own, whose header may have been edited, is
    fetched from Slurm, which keeps it."""
    path = script_path(plan)
    if not path.exists():
        text = ask("scontrol", "write", "batch_script", owner.slurm_job_id, "-")
        write_atomic(path, text, 0o600)
    return path


def _sbatch(plan: JobPlan, owner: Owner, words: list[str], sleep: Callable[[float], None]) -> str:
    """The number of the new job. Raises UsageError where Slurm refuses it, SlurmUnreachable where it never answers."""
    script = script_path(plan)
    environ = client.environment(os.environ, client.script_options(script.read_text()))
    errors = ""
    for _ in range(int(_SILENCE_S / _PAUSE_S)):
        code, said, errors = client.run(["sbatch", *words], environ, SBATCH_S, cwd=plan.cwd)
        number = said.strip().partition(";")[0]
        if code == 0 and number.isdigit():
            return number
        if code is not None and code != 0 and not client.is_no_answer(errors, code):
            raise UsageError(client.last_words(errors))
        if (found := _found(script, owner)) is not None:
            return found
        sleep(_PAUSE_S)
    raise SlurmUnreachable(client.last_words(errors) or "no answer")


def _found(script: Path, owner: Owner) -> str | None:
    """A job of the script that Slurm has accepted though sbatch could not say so."""
    try:
        jobs = parse_squeue(ask("squeue", "--noheader", "--me", f"--format={SQUEUE_FORMAT}"))
    except DtrainError:
        return None
    ours = [job for job in jobs if job.command.startswith(str(script)) and job.phase == "pending"]
    return next((str(job.job_id) for job in ours if str(job.job_id) != owner.slurm_job_id), None)


def _tell_excluded(plan: JobPlan, names: list[str]) -> None:
    run = RunDir(plan.run_dir)
    reason = badnodes.note_text(badnodes.bad_nodes(run.control(plan.job_id)))
    append_event(run, "nodes_excluded", nodes=names, reason=reason)


def _tell(plan: JobPlan, ending: Ending) -> None:
    words = {"finish": "ends", "requeue": "back into the queue", "resubmit": "submitted anew", "leave": "goes on"}
    print(f"{time.strftime('%H:%M:%S')} {words[ending.action]}: {ending.reason}", flush=True)
    append_event(RunDir(plan.run_dir), "slurm_end", action=ending.action, reason=ending.reason)
