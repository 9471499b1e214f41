"""The srun that puts an agent on each node, and the one that puts a new agent in a dead one's place. The command lines
are pure; what is started outlives who started it, because a signal to the batch script must not end the step.
"""

from __future__ import annotations

import shlex
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from dtrain.cluster.jobplan import JobPlan
from dtrain.cluster.nodescript import node_script
from dtrain.cluster.procs import ProcessId
from dtrain.cluster.rundir import RunDir, write_atomic
from dtrain.slurm.container import python_folders, wrap
from dtrain.slurm.jobenv import step_environ
from dtrain.slurm.options import srun_options

# srun answers SIGTERM by killing the step at once (22.05), where Slurm wants it to save and end; and which processes of
# a job get that signal differs by Slurm's way of tracking them. So a shell that is deaf to it stands above srun, in a
# session of its own. What it says at the end is srun's exit code.
_DETACHED = 'trap "" HUP INT TERM; ("$@"; echo "srun ended with $?") </dev/null >>"$0" 2>&1 & echo $!'


def script_path(plan: JobPlan) -> Path:
    return RunDir(plan.run_dir).control(plan.job_id).path / "node.sh"


def srun_log(plan: JobPlan) -> Path:
    return RunDir(plan.run_dir).path / "logs" / "srun.log"


def write_script(plan: JobPlan, agent_args: Sequence[str]) -> None:
    """What each task runs: `node.sh [NODE_RANK]`; without one the task's place in its step is the node's rank."""
    write_atomic(script_path(plan), agent_script(plan, agent_args), 0o600)


def agent_script(plan: JobPlan, agent_args: Sequence[str]) -> str:
    # -P: a folder `dtrain` in the working directory must not shadow the installed package.
    where = ("--run-dir", plan.run_dir, "--job-id", plan.job_id)
    agent = (plan.python, "-P", "-m", "dtrain.runtime.agent", *where, *agent_args, "--node-rank")
    logs = RunDir(plan.run_dir).path / "logs"
    first = (
        'set -- "${1:-$SLURM_NODEID}"\n'
        f"exec >>{shlex.quote(str(logs))}/agent-$1.log 2>&1 </dev/null\n"
        f"cd {shlex.quote(plan.cwd)} 2>/dev/null || cd /\n"
    )
    return first + node_script(plan, agent)


def step_argv(
    plan: JobPlan, nodes: Sequence[str], cpus: int, *, node_rank: int | None = None, overlap: bool = False
) -> tuple[str, ...]:
    """One task on each of `nodes`; the agent of `node_rank` on the only one, where that is given."""
    count = len(nodes)
    rank = () if node_rank is None else (str(node_rank),)
    container = wrap(plan, python_folders(plan.python))
    return (
        "srun",
        f"--nodes={count}",
        f"--ntasks={count}",
        "--ntasks-per-node=1",
        f"--cpus-per-task={cpus}",
        "--distribution=block",
        f"--nodelist={','.join(nodes)}",
        "--cpu-bind=none",
        "--mpi=none",
        "--kill-on-bad-exit=0",
        "--no-kill",
        "--unbuffered",
        "--input=none",
        "--export=ALL",
        *(("--overlap",) if overlap else ()),
        "--job-name=dtrain",
        *srun_options(plan.slurm),
        *container.srun,
        *container.before,
        "bash",
        str(script_path(plan)),
        *rank,
    )


def start_step(argv: Sequence[str], log: Path, environ: Mapping[str, str]) -> ProcessId:
    """The process that stands above srun; `log` gets what srun says."""
    started = subprocess.run(
        ["bash", "-c", _DETACHED, str(log), *argv],
        env=step_environ(environ),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        start_new_session=True,
    )
    return ProcessId.of(int(started.stdout))
