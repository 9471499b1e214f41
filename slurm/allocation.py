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
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from dtrain.cluster.errors import DtrainError, UsageError
from dtrain.cluster.interfaces import Interface
from dtrain.cluster.jobplan import JobPlan
from dtrain.cluster.ports import PortRange, ports_of_no_connection
from dtrain.cluster.procs import Liveness, ProcessId
from dtrain.cluster.rundir import Control, RunDir, read_json, write_atomic, write_once
from dtrain.cluster.zygote import Zygote
from dtrain.slurm import jobenv, node, owner
from dtrain.slurm.client import SlurmRefused, SlurmUnreachable, ask
from dtrain.slurm.driver import begin
from dtrain.slurm.jobenv import SlurmJob, slurm_job
from dtrain.slurm.steps import agent_script, end_srun, list_steps, srun_log, start_step, step_argv, write_script

_FRESH_S = 10.0  # an age of status.json, which is written every second, that still tells of life
_DEATH_S = 10.0  # for a step to be gone
_POLL_S = 0.2
_GPUS = (re.compile(r"\bTresPerNode=\S*?gpu(?::[^:,\s]+)*?:(\d+)"), re.compile(r"TRES=\S*?gres/gpu=(\d+)"))


def with_gpus(here: SlurmJob) -> SlurmJob:
    """A shell of salloc is on no node, and has no variable of GPUs: then Slurm is asked what the nodes have."""
    if here.gpus_per_node or "SLURMD_NODENAME" in os.environ:
        return here
    try:
        said = ask("scontrol", "-o", "show", "job", here.id)
    except DtrainError:
        return here
    each, in_all = (pattern.search(said) for pattern in _GPUS)
    gpus = int(each[1]) if each else int(in_all[1]) // len(here.nodes) if in_all else 0
    return replace(here, gpus_per_node=gpus)


@dataclass(frozen=True, slots=True, kw_only=True)
class AllocationBackend:
    agent_args: tuple[str, ...] = ()

    @property
    def detaches(self) -> bool:
        return False

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
        process = start_step(argv, srun_log(plan), os.environ)
        write_atomic(control.path / "srun.json", json.dumps(process.to_json()), 0o600)

    def state(self, plan: JobPlan, max_age_s: float = 0.0) -> Liveness:
        control = _control(plan)
        srun = _srun(control)
        here: Liveness = "unknown" if srun is None else srun.liveness()
        if here == "alive":
            return "alive"
        if control.ended.exists():
            return "gone"
        seen_at = (read_json(control.status) or {}).get("seen_at") or 0.0
        if here == "unknown" and time.time() - seen_at < _FRESH_S:
            return "alive"  # srun is of another host; Slurm need not be asked
        try:
            return "alive" if self._steps(plan) else "gone"
        except (SlurmUnreachable, UsageError):
            return "unknown"

    def reason(self, plan: JobPlan) -> str:
        return ""

    def called(self, plan: JobPlan) -> str:
        number = owner.slurm_job_id(_control(plan))
        return f"a step of Slurm job {number}" if number else ""

    def restarts_after_stop(self, plan: JobPlan) -> bool:
        return False

    def hasten(self, plan: JobPlan) -> None:
        pass

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

    def start_node(self, plan: JobPlan, node_rank: int) -> bool:
        return node.start_node(plan, node_rank)

    def clear(self, plan: JobPlan) -> None:
        pass  # a step ends with all that its tasks have started

    def give_back(self, plan: JobPlan, nodes: Sequence[int], reason: str) -> bool:
        return False

    def worker_environ(self, environ: Mapping[str, str]) -> dict[str, str]:
        return jobenv.worker_environ(environ)

    def ports(self, plan: JobPlan) -> PortRange | None:
        return plan.port_range or ports_of_no_connection()

    def interface(self, plan: JobPlan) -> Interface:
        return node.interface(plan)


def _here() -> SlurmJob:
    here = slurm_job(os.environ)
    if here is None:
        raise UsageError("this process is in no Slurm allocation any more. Launch again, from inside of one.")
    return here


def _control(plan: JobPlan) -> Control:
    return RunDir(plan.run_dir).control(plan.job_id)


def _srun(control: Control) -> ProcessId | None:
    """What stands above srun, on the host where the launch was typed."""
    record = read_json(control.path / "srun.json")
    return None if record is None else ProcessId.from_json(record)
