"""The srun that puts an agent on each node, and the one that puts a new agent in a dead one's place. The command lines
are pure; what is started outlives who started it, because a signal to the batch script must not end the step.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from dtrain.cluster.jobplan import JobPlan
from dtrain.cluster.nodescript import agent_argv, node_script
from dtrain.cluster.procs import ProcessId, clear_session, session_members
from dtrain.cluster.rundir import RunDir, read_json, write_atomic
from dtrain.slurm.client import SlurmRefused, SlurmUnreachable, ask
from dtrain.slurm.container import python_folders, wrap
from dtrain.slurm.jobenv import step_environ
from dtrain.slurm.options import srun_options
from dtrain.slurm.queue import show_job

_SILENCE_S = 5.0  # of the coordinator, which writes its status every second
_LOOK_S = 5.0  # between two questions to Slurm
_END_S = 2.0  # for srun to end its step
_POLL_S = 0.05

# srun answers SIGTERM by killing the step at once (22.05), where Slurm wants it to save and end; and which processes of
# a job get that signal differs by Slurm's way of tracking them. So a shell that is deaf to it stands above srun, in a
# session of its own. What it says at the end is srun's exit code.
_DETACHED = 'trap "" HUP INT TERM USR1 USR2 XCPU; ("$@"; echo "srun ended with $?") </dev/null >>"$0" 2>&1 & echo $!'
# The same, but srun is ended some seconds after the job ($1 exists then): it waits for a lost node's task while
# that is away (22.05), even if its step was cancelled. `read` from a silent pipe is a sleep without a process.
_UNTIL_ENDED = """trap "" HUP INT TERM USR1 USR2 XCPU; ended=$1; shift
(exec 3<> <(:)
 "$@" 3<&- & srun=$!
 (until [ -e "$ended" ]; do read -t 2 -u 3; done; read -t 5 -u 3; kill -KILL $srun) & watch=$!
 wait $srun; code=$?; kill -KILL $watch 2>/dev/null; echo "srun ended with $code") </dev/null >>"$0" 2>&1 & echo $!"""


def srun_log(plan: JobPlan) -> Path:
    return RunDir(plan.run_dir).path / "logs" / "srun.log"


def write_script(plan: JobPlan, agent_args: Sequence[str], incarnation: int) -> None:
    """What each task runs: `node.sh [NODE_RANK ...]`, the ranks of the step's nodes in its order; without them a task's
    place in its step is the node's rank."""
    control = RunDir(plan.run_dir).control(plan.job_id)
    agent_args = (*agent_args, "--incarnation", str(incarnation))
    write_atomic(control.script, agent_script(plan, agent_args, stop=str(control.stop(incarnation))), 0o600)


def agent_script(plan: JobPlan, agent_args: Sequence[str], *, stop: str = "") -> str:
    logs = RunDir(plan.run_dir).path / "logs"
    first = (
        "export HOSTNAME\n"  # which this bash has found out
        'ranks=("$@"); set -- "${ranks[SLURM_NODEID]:-$SLURM_NODEID}"\n'
        f"exec >>{shlex.quote(str(logs))}/agent-$1.log 2>&1 </dev/null\n"
        f"cd {shlex.quote(plan.cwd)} 2>/dev/null || cd /\n"
    )
    return first + node_script(plan, agent_argv(plan, agent_args), stop=stop)


def step_argv(
    plan: JobPlan, nodes: Sequence[str], cpus: int, *, ranks: Sequence[int] = (), overlap: bool = False
) -> tuple[str, ...]:
    """One task on each of `nodes`, which are those of `ranks`; left out: of the ranks from 0 on."""
    count = len(nodes)
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
        f"--job-name={plan.job_id}",  # by it Slurm's list of steps tells ours from others
        *srun_options(plan.slurm),
        *container.srun,
        *container.before,
        "bash",
        str(RunDir(plan.run_dir).control(plan.job_id).script),
        *map(str, ranks),
    )


def start_step(argv: Sequence[str], log: Path, environ: Mapping[str, str], *, until: Path | None = None) -> ProcessId:
    """The process that stands above srun; `log` gets what srun says. `until`: a file that ends srun."""
    words = [_DETACHED, str(log)] if until is None else [_UNTIL_ENDED, str(log), str(until)]
    started = subprocess.run(
        ["bash", "-c", *words, *argv],
        env=step_environ(environ),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        start_new_session=True,
    )
    return ProcessId.of(int(started.stdout))


def end_srun(above: ProcessId) -> None:
    """For one that waits for a lost node, or for a slurmctld that does not answer. SIGTERM has it end its step; nothing
    happens where it has ended."""
    if above.liveness() != "alive":
        return
    session = os.getsid(above.pid)
    for pid in session_members(session):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGTERM)
    deadline = time.monotonic() + _END_S
    while above.liveness() == "alive" and time.monotonic() < deadline:
        time.sleep(_POLL_S)
    clear_session(session, frozenset())


def is_over(slurm_job_id: str) -> bool:
    """Whether Slurm says so; a job that it does not know any more is. Raises SlurmUnreachable."""
    try:
        records = show_job(slurm_job_id)
    except SlurmRefused:
        return True
    return all(record.phase in ("over", "completing") for record in records)


def list_steps(plan: JobPlan, slurm_job_id: str) -> list[str]:
    """Slurm's numbers, like 17.0, of the job's steps that are not over. Raises SlurmUnreachable."""
    try:
        said = ask("squeue", "--noheader", "--steps", f"--jobs={slurm_job_id}", "--format=%i %j")
    except SlurmRefused:
        return []
    rows = [line.split() for line in said.splitlines()]
    return [row[0] for row in rows if row[1:] == [plan.job_id]]


def last_words(log: Path, offset_bytes: int, lines: int = 4) -> list[str]:
    """The end of what srun has said since, without what every step says."""
    with open(log, "rb") as file:
        file.seek(offset_bytes)
        said = file.read().decode(errors="replace").splitlines()
    return [line for line in said if line.strip() and "lacks support for cpu binding" not in line][-lines:]


class Traces:
    """Whether agents may live that no srun of ours watches: the coordinator writes its status every second, and Slurm
    lists the steps of a job. Where Slurm does not answer they may."""

    def __init__(self, plan: JobPlan, slurm_job_id: str, clock: Callable[[], float] = time.monotonic) -> None:
        self._plan = plan
        self._status = RunDir(plan.run_dir).control(plan.job_id).status
        self._job = slurm_job_id
        self._clock = clock
        self._stamp = self._read_stamp()
        self._changed_at = self._looked_at = clock()
        self._listed = True

    def agents_may_live(self) -> bool:
        now = self._clock()
        stamp = self._read_stamp()
        if stamp != self._stamp:
            self._stamp, self._changed_at = stamp, now
        if now - self._changed_at < _SILENCE_S:
            return True
        if now - self._looked_at >= _LOOK_S:
            self._looked_at = now
            self._listed = self._is_listed()
        return self._listed

    def _read_stamp(self) -> object:
        return (read_json(self._status) or {}).get("seen_at")

    def _is_listed(self) -> bool:
        try:
            return bool(list_steps(self._plan, self._job))
        except SlurmUnreachable:
            return True
