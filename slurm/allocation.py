"""Back end of a `launch` inside of a Slurm allocation (salloc, a batch script, a notebook's job): the agents are one
step of it, started by an srun that outlives the terminal. The allocation stays: only the step ends with the run.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import time
from dataclasses import dataclass, replace

from dtrain.cluster.backends import Loss, too_few
from dtrain.cluster.errors import DtrainError, UsageError
from dtrain.cluster.jobplan import JobPlan
from dtrain.cluster.procs import Liveness, ProcessId
from dtrain.cluster.rundir import Control, RunDir, read_json, tells_of_life, write_atomic, write_once
from dtrain.cluster.unscheduled import Unscheduled
from dtrain.cluster.zygote import Zygote
from dtrain.slurm import owner
from dtrain.slurm.client import SlurmRefused, SlurmUnreachable, ask
from dtrain.slurm.driver import begin
from dtrain.slurm.hostlist import expand
from dtrain.slurm.jobenv import SlurmJob, slurm_job
from dtrain.slurm.node import NodeSide
from dtrain.slurm.records import parse_scontrol
from dtrain.slurm.steps import agent_script, end_srun, list_steps, srun_log, start_step, step_argv, write_script

_DEATH_S = 10.0  # for a step to be gone
_POLL_S = 0.2
_GPUS = (re.compile(r"\bTresPerNode=\S*?gpu(?::[^:,\s]+)*?:(\d+)"), re.compile(r"TRES=\S*?gres/gpu=(\d+)"))


def as_it_is(here: SlurmJob) -> SlurmJob:
    """What Slurm says of the allocation now. One made with --no-kill may have fewer nodes than its variables tell; a
    shell of salloc, which is on no node, has no variable of GPUs."""
    try:
        said = ask("scontrol", "-o", "show", "job", here.id)
    except DtrainError:
        return here
    listed = {node for record in parse_scontrol(said) if record.nodes for node in expand(record.nodes)}
    nodes = tuple(node for node in here.nodes if node in listed) or here.nodes
    if here.gpus_per_node or "SLURMD_NODENAME" in os.environ:
        return replace(here, nodes=nodes)
    each, in_all = (pattern.search(said) for pattern in _GPUS)
    gpus = int(each[1]) if each else int(in_all[1]) // len(nodes) if in_all else 0
    return replace(here, nodes=nodes, gpus_per_node=gpus)


@dataclass(frozen=True, slots=True, kw_only=True)
class AllocationBackend(NodeSide, Unscheduled):
    agent_args: tuple[str, ...] = ()

    def render(self, plan: JobPlan) -> str:
        here = _here()
        argv = step_argv(plan, here.nodes[: plan.nodes], here.cpus_per_node, overlap=True)
        script = agent_script(plan, self.agent_args)
        return f"# node.sh, on each node of Slurm job {here.id}:\n{script}\n# here:\n{shlex.join(argv)}\n"

    def check(self, plan: JobPlan) -> None:
        _here()

    def preload(self, plan: JobPlan) -> Zygote | None:
        return None

    def submit(self, plan: JobPlan, zygote: Zygote | None = None) -> None:
        here, control = _here(), _control(plan)
        mine = owner.claim(control, os.environ, here.nodes[: plan.nodes], None)
        if mine is None:
            raise UsageError(f"{plan.run_dir}: job {plan.job_id} was started already")
        begin(plan, mine)
        write_script(plan, self.agent_args, mine.number)
        argv = step_argv(plan, mine.nodes, here.cpus_per_node, overlap=True)
        process = start_step(argv, srun_log(plan), os.environ, until=control.ended)
        write_atomic(control.path / "srun.json", json.dumps(process.to_json()), 0o600)

    def state(self, plan: JobPlan, max_age_s: float = 0.0) -> Liveness:
        control = _control(plan)
        srun = _srun(control)
        here: Liveness = "unknown" if srun is None else srun.liveness()
        if here == "alive":
            return "alive"
        if control.ended.exists():
            return "gone"
        if here == "unknown" and tells_of_life(control):
            return "alive"  # srun is of another host; Slurm need not be asked
        try:
            return "alive" if self._steps(plan) else "gone"
        except (SlurmUnreachable, UsageError):
            return "unknown"

    def called(self, plan: JobPlan) -> str:
        number = owner.slurm_job_id(_control(plan))
        return f"a step of Slurm job {number}" if number else ""

    def stop(self, plan: JobPlan) -> None:
        control = _control(plan)
        mine = owner.newest_owner(control)
        if mine is not None:
            write_once(control.stop(mine.number), "asked for by a person", 0o600)
        with contextlib.suppress(SlurmUnreachable):  # the coordinator finds the file, a moment later
            for step in self._steps(plan):
                with contextlib.suppress(SlurmRefused):  # it is over
                    ask("scancel", "--signal=TERM", step)

    def kill(self, plan: JobPlan) -> None:
        with contextlib.suppress(SlurmUnreachable):
            for step in self._steps(plan):
                with contextlib.suppress(SlurmRefused):
                    ask("scancel", step)
        deadline = time.monotonic() + _DEATH_S
        while self.state(plan) == "alive" and time.monotonic() < deadline:
            time.sleep(_POLL_S)
        if (srun := _srun(_control(plan))) is not None:
            end_srun(srun)

    def _steps(self, plan: JobPlan) -> list[str]:
        number = owner.slurm_job_id(_control(plan))
        return list_steps(plan, number) if number else []

    def clear(self, plan: JobPlan) -> None:
        """A step ends with all that its tasks have started, when each task has ended: a frozen agent in whose place
        another was started, by a step of its own, would keep its step and hold on to the allocation, and srun waits for
        the task of a node that is lost. The caller's own step goes too, which has nothing left to do."""
        with contextlib.suppress(SlurmUnreachable):
            steps = self._steps(plan)
            for step in steps if len(steps) > 1 or _control(plan).left_out() else ():
                with contextlib.suppress(SlurmRefused):
                    ask("scancel", step)

    def lose_node(self, plan: JobPlan, node_rank: int, reason: str, *, enough: bool, alive: bool) -> Loss:
        """Slurm does not say whether the allocation was made with --no-kill; where it was not, Slurm will end it."""
        if enough:
            doomed = not (alive or plan.slurm.no_kill or "SALLOC_NO_KILL" in os.environ)
            note = " (Slurm ends the allocation for it soon, unless that was made with --no-kill)" if doomed else ""
            return Loss(follows="rest", note=note)
        return Loss(follows="nothing", note=too_few(plan))


def _here() -> SlurmJob:
    here = slurm_job(os.environ)
    if here is None:
        raise UsageError("this process is in no Slurm allocation any more. Launch again, from inside of one.")
    return as_it_is(here)


def _control(plan: JobPlan) -> Control:
    return RunDir(plan.run_dir).control(plan.job_id)


def _srun(control: Control) -> ProcessId | None:
    """What stands above srun, on the host where the launch was typed."""
    record = read_json(control.path / "srun.json")
    return None if record is None else ProcessId.from_json(record)
