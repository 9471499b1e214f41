"""What Slurm's variables say of the job that this process runs in. The one place that reads SLURM_* for ourselves."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from dtrain.cluster.errors import UsageError
from dtrain.slurm.hostlist import expand

# What shapes a step and was meant for the job's own steps: srun reads each as if it had been typed.
_STEP_SHAPE = re.compile(
    r"SLURM_(NTASKS\w*|NPROCS|NNODES|TASKS_PER_NODE|CPUS_PER_TASK|CPUS_PER_GPU|TRES_PER_TASK|GPUS|GPUS_PER_(NODE|TASK|SOCKET)"
    r"|GPU_BIND|GPU_FREQ|GRES|GRES_FLAGS|MEM_PER_(CPU|NODE|GPU)|MEM_BIND\w*|CPU_BIND\w*|DISTRIBUTION|DIST_\w+|HOSTFILE|EXACT"
    r"|EXCLUSIVE|OVERLAP|OVERCOMMIT|THREADS_PER_CORE|CORE_SPEC|HINT|THREAD_SPEC|STDOUTMODE|STDERRMODE|STDINMODE|OPEN_MODE"
    r"|LABELIO|UNBUFFEREDIO|KILL_BAD_EXIT|NO_KILL|WAIT|EXPORT_ENV|MPI_TYPE|PROLOG|EPILOG|TASK_PROLOG|TASK_EPILOG|MULTI_PROG"
    r"|REMOTE_CWD|WORKING_DIR|RELATIVE|RESV_PORTS|TIMELIMIT|IMMEDIATE|PTY_\w+|SRUN_REDUCE_TASK_EXIT_MSG|NODELIST|DEBUG)"
    r"|SRUN_\w+"
)
# What tells a process its place among a step's tasks, to MPI libraries and frameworks too, which would believe it.
_TASK_PLACE = re.compile(
    r"SLURM_(PROCID|LOCALID|NODEID|GTIDS|TASK_PID|NTASKS\w*|NPROCS|TASKS_PER_NODE|STEP_\w+|STEPID|SRUN_\w+|DISTRIBUTION"
    r"|DIST_\w+|CPU_BIND\w*|MEM_BIND\w*|LAUNCH_NODE_IPADDR|PRIO_PROCESS|UMASK|MPI_TYPE|CPUS_PER_TASK|PTY_\w+)"
    r"|SRUN_\w+|PMI_\w+|PMI2_\w+|PMIX_\w+|SLURM_PMI\w*|OMPI_COMM_\w+"
)


_PATH = "/usr/local/bin:/usr/bin:/bin"


@dataclass(frozen=True, slots=True, kw_only=True)
class SlurmJob:
    """The allocation around this process."""

    id: str
    restart: int
    nodes: tuple[str, ...]  # Slurm's names, in the order of node ranks
    cpus_per_node: int  # of the node that has the fewest
    gpus_per_node: int

    @property
    def incarnation(self) -> str:
        return f"{self.id}.{self.restart}"


def slurm_job(environ: Mapping[str, str]) -> SlurmJob | None:
    """None outside of an allocation. Raises UsageError where the variables make no sense."""
    job_id = environ.get("SLURM_JOB_ID")
    listed = environ.get("SLURM_JOB_NODELIST") or environ.get("SLURM_NODELIST")
    if not job_id or not listed:
        return None
    try:
        nodes = expand(listed)
    except ValueError as error:
        raise UsageError(f"SLURM_JOB_NODELIST: {error}") from error
    return SlurmJob(
        id=job_id,
        restart=int(environ.get("SLURM_RESTART_COUNT") or 0),
        nodes=tuple(nodes),
        cpus_per_node=fewest_cpus(environ.get("SLURM_JOB_CPUS_PER_NODE") or environ.get("SLURM_CPUS_ON_NODE") or "1"),
        gpus_per_node=_gpus(environ),
    )


def fewest_cpus(text: str) -> int:
    """Of SLURM_JOB_CPUS_PER_NODE, like `72(x2),36`. Raises UsageError."""
    counts = [re.fullmatch(r"(\d+)(\(x\d+\))?", part.strip()) for part in text.split(",")]
    if not all(counts):
        raise UsageError(f"SLURM_JOB_CPUS_PER_NODE={text}: not a list of numbers as Slurm writes it")
    return min(int(count.group(1)) for count in counts if count is not None)


def _gpus(environ: Mapping[str, str]) -> int:
    """SLURM_GPUS_ON_NODE is a number; SLURM_JOB_GPUS lists them. Both tell of the node where we are."""
    given = environ.get("SLURM_GPUS_ON_NODE", "")
    if given.isdigit():
        return int(given)
    listed = environ.get("SLURM_JOB_GPUS") or environ.get("SLURM_STEP_GPUS") or ""
    return len([name for name in listed.split(",") if name])


def step_environ(environ: Mapping[str, str]) -> dict[str, str]:
    """What srun is started with: its own options come from the command line only. HOSTNAME, which Slurm puts into a
    batch script's environment, would be the first node's on all of them, and is for each node's shell to set. A job
    submitted with --export=NONE has no PATH, by which srun finds bash."""
    kept = {name: value for name, value in environ.items() if not _STEP_SHAPE.fullmatch(name) and name != "HOSTNAME"}
    return {"PATH": _PATH, **kept}


def worker_environ(environ: Mapping[str, str]) -> dict[str, str]:
    """What the workers may inherit of their agent's variables: nothing by which they would take themselves for a task
    of the step, of which there is one a node."""
    return {name: value for name, value in environ.items() if not _TASK_PLACE.fullmatch(name)}
