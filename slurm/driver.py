"""The process that the batch script becomes, on the job's first node: takes the dtrain job over, starts the agents with
srun, waits for the end that they write down, and ends with its exit code. What to do at an end that is no end is
slurm/stops.py's. No training decision is made here.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from types import FrameType

from dtrain.cluster import exits
from dtrain.cluster.deaths import count_death
from dtrain.cluster.errors import UsageError
from dtrain.cluster.jobplan import JobPlan
from dtrain.cluster.procs import EARLY_STOP, STOP_SIGNALS, ProcessId
from dtrain.cluster.restarts import drop_nodes, forget_stop
from dtrain.cluster.rundir import RunDir, append_event, put_end, read_json, write_atomic
from dtrain.slurm import badnodes
from dtrain.slurm import owner as owners
from dtrain.slurm.ending import conclude
from dtrain.slurm.jobenv import SlurmJob, slurm_job
from dtrain.slurm.owner import Owner
from dtrain.slurm.steps import Traces, last_words, srun_log, start_step, step_argv, write_script
from dtrain.slurm.stopping import Stopper

_POLL_S = 0.5
_AGAIN_S = 3.0  # times the deaths so far, before the agents are started again
_LEAVE_S = 5.0  # for agents to leave after the job's end


@dataclass(slots=True)
class Signals:
    """Those that have arrived; a handler does nothing else."""

    seen: list[str]

    @staticmethod
    def watch() -> Signals:
        early = os.environ.pop(EARLY_STOP, None)
        signals = Signals([early] if early else [])

        def note(number: int, frame: FrameType | None) -> None:
            signals.seen.append(signal.Signals(number).name)

        for number in (*STOP_SIGNALS, signal.SIGHUP):
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
    write_script(plan, agent_args, owner.number)
    stopper = Stopper(plan, owner.slurm_job_id, owner.number, signals.seen)
    return conclude(plan, owner, _Step(plan, here, owner, stopper, environ).run())


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
    drop_nodes(control)
    write_atomic(control.note, badnodes.note_text(badnodes.bad_nodes(control)), 0o600)
    if owner.number > 1:
        forget_stop(control)
        append_event(run, "requeued", restart=owner.restart, slurm_job_id=owner.slurm_job_id)
    (run.path / "logs").mkdir(exist_ok=True)
    return None


class _Step:
    """The agents of one incarnation: started by srun, again where all of them die, until the job has ended."""

    def __init__(
        self, plan: JobPlan, here: SlurmJob, owner: Owner, stopper: Stopper, environ: Mapping[str, str]
    ) -> None:
        self._plan = plan
        self._here = here
        self._owner = owner
        self._stopper = stopper
        self._environ = environ
        self._control = RunDir(plan.run_dir).control(plan.job_id)
        self._log = srun_log(plan)

    def run(self) -> int:
        while True:
            said_before = self._log.stat().st_size if self._log.exists() else 0
            self._wait(self._start())
            ended = read_json(self._control.ended)
            if ended is not None:
                return int(ended["exit_code"])
            words = "; ".join(last_words(self._log, said_before)) or "srun said nothing"
            print(f"every agent is gone, and none could say why: {words}", file=sys.stderr, flush=True)
            if self._stopper.asked:
                return exits.STOPPED
            deaths = count_death(self._control, "slurm")
            if deaths > self._plan.max_restarts_without_progress:
                return self._give_up(f"all agents died {deaths} times in a row without a new step: {words}")
            time.sleep(_AGAIN_S * deaths)

    def _start(self) -> ProcessId:
        left_out = self._control.left_out()
        nodes = {rank: name for rank, name in enumerate(self._owner.nodes) if rank not in left_out}
        ranks = tuple(nodes) if left_out else ()
        argv = step_argv(self._plan, list(nodes.values()), self._here.cpus_per_node, ranks=ranks)
        return start_step(argv, self._log, self._environ)

    def _wait(self, srun: ProcessId) -> None:
        """Until the job has ended, or nothing of the agents lives. srun may be gone long before them."""
        traces = Traces(self._plan, self._here.id)
        ended_at = None
        while srun.liveness() == "alive" or (ended_at is None and traces.agents_may_live()):
            self._stopper.poll()
            if ended_at is None and self._control.ended.exists():
                ended_at = time.monotonic()
            if ended_at is not None and time.monotonic() - ended_at > _LEAVE_S:
                return  # it waits for a node that is lost; what is left ends with the Slurm job
            time.sleep(_POLL_S)

    def _give_up(self, reason: str) -> int:
        run = RunDir(self._plan.run_dir)
        put_end(run, self._control, state="failed", exit_code=exits.FAILED, reason=reason, step=0)
        return exits.FAILED
