"""Back end of ranks that mpirun, or srun --mpi, has started: `dtrain run` on each of them. The first rank of a machine
is its node and starts an agent there; the others lend it their cores. MPI itself only tells who is where
(launcher/mpiranks.py), and starts no node again: what mpirun ends, a second mpirun goes on with.
"""

from __future__ import annotations

import os
import re
import signal
import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass

from dtrain.cluster.agents import agents
from dtrain.cluster.backends import Loss
from dtrain.cluster.errors import UsageError
from dtrain.cluster.interfaces import LOOPBACK, Interface, facing, resolve
from dtrain.cluster.jobplan import JobPlan
from dtrain.cluster.ports import PortRange, ports_of_no_connection
from dtrain.cluster.procs import Liveness
from dtrain.cluster.rundir import FRESH_S, RunDir, silent_s, write_once
from dtrain.cluster.unscheduled import Unscheduled
from dtrain.cluster.zygote import Zygote

_LOST_S = 60.0  # one that tells of death, where the machines can't be asked
_DEATH_S = 5.0
_HOW = "its ranks are started by mpirun: `mpirun -n 4 dtrain run {config}` (or srun --mpi=pmix)"

# What tells a process its place among an MPI job's ranks: a worker, of which there are others, would believe it.
_TASK_PLACE = re.compile(
    r"(PMI|PMI2|PMIX|OMPI|PRTE|HYDRA|HYDI|MPI|MPIEXEC|MPIR|MV2|I_MPI)_\w+|SLURM_(PROCID|LOCALID|NODEID)"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class MpiBackend(Unscheduled):
    agent_args: tuple[str, ...] = ()

    def render(self, plan: JobPlan) -> str:
        return f"# {_HOW.format(config=plan.config)}\n"

    def check(self, plan: JobPlan) -> None:
        raise UsageError(f"cluster.backend: mpi: {_HOW.format(config=os.path.relpath(plan.config))}")

    def preload(self, plan: JobPlan) -> Zygote | None:
        return None

    def submit(self, plan: JobPlan, zygote: Zygote | None = None) -> None:
        self.check(plan)

    def start_node(self, plan: JobPlan, node_rank: int) -> bool:
        return False

    def state(self, plan: JobPlan, max_age_s: float = 0.0) -> Liveness:
        """From the processes of this machine, and from the run directory: nobody can be asked for the other ones."""
        control = RunDir(plan.run_dir).control(plan.job_id)
        if control.ended.exists():
            return "gone"
        found = {process.liveness() for process in agents(plan)}
        if "alive" in found:
            return "alive"
        if "unknown" not in found:
            return "gone"
        age_s = silent_s(control)
        return "alive" if age_s < FRESH_S else "gone" if age_s > _LOST_S else "unknown"

    def stop(self, plan: JobPlan) -> None:
        """The coordinator finds the file; agents of this machine are told at once."""
        write_once(RunDir(plan.run_dir).control(plan.job_id).stop(0), "asked for by a person", 0o600)
        for process in agents(plan):
            process.kill(signal.SIGTERM)

    def kill(self, plan: JobPlan) -> None:
        """Those of this machine; without them mpirun ends the others."""
        for process in agents(plan):
            process.end_session()
        deadline = time.monotonic() + _DEATH_S
        while any(process.liveness() == "alive" for process in agents(plan)) and time.monotonic() < deadline:
            time.sleep(0.02)

    def clear(self, plan: JobPlan) -> None:
        pass

    def lose_node(self, plan: JobPlan, node_rank: int, reason: str, *, enough: bool, alive: bool) -> Loss:
        """Most MPIs end the job when a machine is lost; where they do not, it goes on with the others if it can."""
        return Loss(follows="rest" if enough else "nothing")

    def worker_environ(self, environ: Mapping[str, str]) -> dict[str, str]:
        return {name: value for name, value in environ.items() if not _TASK_PLACE.fullmatch(name)}

    def ports(self, plan: JobPlan) -> PortRange | None:
        return plan.port_range or ports_of_no_connection()

    def interface(self, plan: JobPlan) -> Interface:
        if plan.nodes == 1 and plan.interface == "auto":
            return LOOPBACK
        own = socket.gethostname()
        return facing(plan.interface, resolve(own), [host for host in plan.hosts if host != own])
