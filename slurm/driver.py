"""The process that the batch script becomes, on the job's first node: takes the dtrain job over, starts the agents with
srun, waits for the end that they write down, and ends with its exit code. What to do at an end that is no end is
slurm/stops.py's. No training decision is made here.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from types import FrameType

from dtrain.cluster import exits
from dtrain.cluster.errors import UsageError
from dtrain.cluster.jobplan import JobPlan
from dtrain.cluster.rundir import Control, RunDir, append_event, read_json, write_atomic
from dtrain.slurm import owner as owners
from dtrain.slurm.jobenv import SlurmJob, slurm_job
from dtrain.slurm.owner import Owner
from dtrain.slurm.steps import srun_log, start_step, step_argv, write_script

_POLL_S = 0.5
_LAST_WORDS = 12  # lines of srun's


@dataclass(slots=True)
class Signals:
    """Those that have arrived; a handler does nothing else."""

    seen: list[str]

    @staticmethod
    def watch() -> Signals:
        signals = Signals([])

        def note(number: int, frame: FrameType | None) -> None:
            signals.seen.append(signal.Signals(number).name)

        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGXCPU, signal.SIGHUP):
            signal.signal(number, note)
        return signals


def drive(plan: JobPlan, agent_args: tuple[str, ...] = (), environ: Mapping[str, str] | None = None) -> int:
    """Runs the job to its end inside this allocation; the exit code of the batch script. Raises UsageError outside of
    an allocation, or where another Slurm job has taken the run."""
    environ = os.environ if environ is None else environ
    here = slurm_job(environ)
    if here is None:
        raise UsageError(
            "launch --batch: SLURM_JOB_ID and SLURM_JOB_NODELIST are not set. It is for a Slurm job's script"
        )
    signals = Signals.watch()
    control = RunDir(plan.run_dir).control(plan.job_id)
    newest = owners.newest_owner(control)
    if newest is not None and newest.is_nobody:
        raise UsageError(f"{plan.run_dir}: job {plan.job_id} was given up before Slurm was known to have it")
    owner = owners.claim(control, environ, here.nodes[: plan.nodes], newest)
    if owner is None:
        raise UsageError(f"{plan.run_dir}: another Slurm job has just taken this run")
    if (code := begin(plan, owner)) is not None:
        return code
    agent_args = (*agent_args, "--incarnation", str(owner.number))
    write_script(plan, agent_args)
    return _Step(plan, here, owner, signals, environ).run()


def begin(plan: JobPlan, owner: Owner) -> int | None:
    """Prepares the control directory for this incarnation; the exit code of a job that is over already."""
    run = RunDir(plan.run_dir)
    control = run.control(plan.job_id)
    ended = read_json(control.ended)
    if ended is not None and int(ended["exit_code"]) != exits.STOPPED:
        return int(ended["exit_code"])
    write_atomic(control.incarnation, str(owner.number), 0o600)  # from here on agents of earlier ones end
    if ended is not None:
        os.replace(control.ended, control.path / f"ended-{owner.number - 1:04d}.json")
    for record in control.path.glob("node-*.json"):
        record.unlink()  # whoever serves a node from now on puts itself down anew
    if owner.number > 1:
        _forget_stop(control)
        append_event(run, "requeued", restart=owner.restart, slurm_job_id=owner.slurm_job_id)
    (run.path / "logs").mkdir(exist_ok=True)
    return None


def _forget_stop(control: Control) -> None:
    """The stop of an earlier incarnation was for that one. What it has learned of the run's progress stays."""
    path = control.path / "memory.json"
    memory = read_json(path)
    if memory is not None and memory.get("stop") is not None:
        write_atomic(path, json.dumps({**memory, "stop": None}), 0o600)


class _Step:
    """One srun, from its start to the end of all agents."""

    def __init__(
        self, plan: JobPlan, here: SlurmJob, owner: Owner, signals: Signals, environ: Mapping[str, str]
    ) -> None:
        self._plan = plan
        self._here = here
        self._owner = owner
        self._signals = signals
        self._environ = environ
        self._control = RunDir(plan.run_dir).control(plan.job_id)

    def run(self) -> int:
        argv = step_argv(self._plan, self._owner.nodes, self._here.cpus_per_node)
        log = srun_log(self._plan)
        said_before = log.stat().st_size if log.exists() else 0
        srun = start_step(argv, log, self._environ)
        while srun.liveness() == "alive":
            time.sleep(_POLL_S)
        ended = read_json(self._control.ended)
        if ended is not None:
            return int(ended["exit_code"])
        words = log.read_bytes()[said_before:].decode(errors="replace").splitlines()[-_LAST_WORDS:]
        print("\n".join(["every agent ended without a word; srun said:", *words]), file=sys.stderr, flush=True)
        return exits.FAILED
