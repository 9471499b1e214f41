"""`dtrain run`: what mpirun, or srun --mpi, starts as many times as there are to be ranks. The first rank prepares the
run as a launch does; the first one of each machine is its node, and runs an agent; all wait for the end."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import time
from contextlib import ExitStack
from dataclasses import replace
from types import FrameType

from dtrain.cluster import exits
from dtrain.cluster.errors import UsageError
from dtrain.cluster.jobplan import JobPlan
from dtrain.cluster.nodescript import registering_script
from dtrain.cluster.procs import STOP_SIGNALS, die_with_parent
from dtrain.cluster.rundir import RunDir, read_json, write_atomic
from dtrain.launcher.commands.launch import add_run_arguments
from dtrain.launcher.follow import Bookmark, follow
from dtrain.launcher.launching import prepare
from dtrain.launcher.mpiranks import Machines, Ranks
from dtrain.launcher.runs import Job
from dtrain.launcher.screen import make_screen

_POLL_S = 0.2
_LEAVE_S = 15.0  # for an agent to leave after the job's end

HELP = (
    "Under mpirun, or srun --mpi: `mpirun -n 4 dtrain run cfg.yaml`. Trains what the config describes on the ranks "
    "that are there, whatever cluster.nodes says; continues it as launch does."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_run_arguments(parser)
    parser.set_defaults(
        batch=True, here=False, dry_run=False, detach=False, submit=False, job_id=None, allocation=None, backend="mpi"
    )


def run(args: argparse.Namespace) -> int:
    """The job's exit code on the first rank. The others end with 0 all the same: a rank that does not has mpirun kill
    those that still have something to say."""
    ranks = Ranks()
    try:
        machines = ranks.machines()
    except UsageError:
        ranks.close()
        if ranks.rank > 0:
            return exits.DONE  # one says it
        raise
    with ExitStack() as held:
        if ranks.rank > 0:
            said = json.loads(ranks.hear())
            ranks.close()
            if said is not None:
                _take_part(JobPlan.from_json(said), machines, ranks.rank)
            return exits.DONE
        try:
            outcome = prepare(_fitted(args, machines), held)
        except BaseException:
            ranks.tell("null")
            ranks.close()
            raise
        if isinstance(outcome, int):
            ranks.tell("null")
            ranks.close()
            return outcome
        return _lead(outcome, machines, ranks)


def _fitted(args: argparse.Namespace, machines: Machines) -> argparse.Namespace:
    """The config is to ask for what is there."""
    args.nodes = len(machines.hosts)
    gpus = min(machines.gpus_per_node, machines.procs_per_node)
    words = [f"cluster.procs_per_node={machines.procs_per_node}", f"cluster.gpus_per_node={gpus}"]
    args.argv = ("mpirun", "-n", str(machines.procs_per_node * args.nodes), *args.argv)
    args.overrides = [*args.overrides, *words]
    return args


def _lead(prepared: tuple[Job, Bookmark], machines: Machines, ranks: Ranks) -> int:
    job, since = prepared
    plan = replace(job.plan, hosts=machines.hosts)
    job = replace(job, plan=plan)
    record = read_json(job.run.job)
    assert record is not None
    write_atomic(job.run.job, json.dumps({**record, **plan.to_json()}, indent=2) + "\n")
    (job.run.path / "logs").mkdir(exist_ok=True)
    write_atomic(job.control.script, registering_script(plan, ()), 0o600)
    ranks.tell(json.dumps(plan.to_json()))
    ranks.close()
    node = _Node(plan, 0, machines)
    try:
        return follow(job, make_screen(job.steps), since)
    finally:
        node.wait(_LEAVE_S)


def _take_part(plan: JobPlan, machines: Machines, rank: int) -> None:
    """A node's first rank has the node's agent; the others are there to be counted."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # mpirun may send it to all: what it means, the first rank decides
    if rank in machines.leaders:
        _Node(plan, machines.leaders.index(rank), machines).wait()
        return
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)  # who is told to stop is the node
    control = RunDir(plan.run_dir).control(plan.job_id)
    while control.path.is_dir() and not control.ended.exists():
        time.sleep(_POLL_S)


class _Node:
    """An agent as a child of this process, which takes it along however it ends: mpirun kills what it has started."""

    def __init__(self, plan: JobPlan, node_rank: int, machines: Machines) -> None:
        with contextlib.suppress(OSError):  # a cgroup may hold each rank to its own
            os.sched_setaffinity(0, machines.cores[node_rank])  # all ranks' of this machine
        run, parent = RunDir(plan.run_dir), os.getpid()
        script = str(run.control(plan.job_id).script)
        with open(run.agent_log(node_rank), "ab") as output:
            self._process = subprocess.Popen(
                ["bash", script, str(node_rank)], stdin=subprocess.DEVNULL, stdout=output, stderr=output,
                start_new_session=True, preexec_fn=lambda: die_with_parent(parent),
            )  # fmt: skip
        for number in STOP_SIGNALS:
            signal.signal(number, self._pass_on)

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        if self._process.poll() is None:
            self._process.send_signal(number)

    def wait(self, limit_s: float | None = None) -> None:
        try:
            self._process.wait(limit_s)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
