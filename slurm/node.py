"""What a Slurm back end does on the nodes of its job: the network interface, and an agent in a dead one's place."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import time
from collections.abc import Callable, Iterator, Mapping

from dtrain.cluster import exits
from dtrain.cluster.backends import Loss, too_few
from dtrain.cluster.errors import DtrainError, UsageError
from dtrain.cluster.interfaces import LOOPBACK, Interface, is_loopback, list_interfaces, pick, resolve, way_to
from dtrain.cluster.jobplan import JobPlan
from dtrain.cluster.ports import PortRange, ports_of_no_connection
from dtrain.cluster.rundir import RunDir, read_json
from dtrain.slurm.badnodes import bad_nodes, note_bad
from dtrain.slurm.client import ask, run, script_options
from dtrain.slurm.ending import arrange, own_script, spare_nodes
from dtrain.slurm.jobenv import slurm_job, step_environ, worker_environ
from dtrain.slurm.owner import Owner, newest_owner
from dtrain.slurm.steps import end_srun, srun_log, start_step, step_argv
from dtrain.slurm.stopping import look

_SCONTROL_S = 5.0
_START_S = 30.0  # for an agent to appear
_POLL_S = 0.1
_PROBE_S = 10.0  # for a process to be started on a node; one that is dead is known to srun only later


class NodeSide:
    """The part of a back end that is asked on the nodes: the same in a job of its own and in somebody's allocation."""

    __slots__ = ()

    def start_node(self, plan: JobPlan, node_rank: int) -> bool:
        return start_node(plan, node_rank)

    def worker_environ(self, environ: Mapping[str, str]) -> dict[str, str]:
        return worker_environ(environ)

    def ports(self, plan: JobPlan) -> PortRange | None:
        return plan.port_range or ports_of_no_connection()

    def interface(self, plan: JobPlan) -> Interface:
        return interface(plan)


def interface(plan: JobPlan) -> Interface:
    """The one that Slurm's name for this node leads to; without such, the one on the way to another node. Raises
    UsageError."""
    found = list_interfaces()
    if plan.interface != "auto":
        return pick(plan.interface, found)
    here = os.environ.get("SLURMD_NODENAME", "")
    job = slurm_job(os.environ)
    others = [name for name in (job.nodes if job else ()) if name != here]
    for address in _addresses(here):
        for candidate in found:
            if candidate.address == address and not is_loopback(address):
                return candidate
    for other in others:
        way = _way_to(other)
        for candidate in found:
            if candidate.address == way:
                return candidate
    if plan.nodes == 1:
        return next((candidate for candidate in found if not is_loopback(candidate.address)), LOOPBACK)
    raise UsageError(
        f"auto: node {here or socket.gethostname()} does not know at which of its addresses the others reach it. "
        f"There are: {', '.join(map(str, found))}. Name one, or a range of addresses like 10.0.0.0/8."
    )


def _addresses(node: str) -> Iterator[str]:
    """Of a node as Slurm calls it: by its name, then by Slurm's own record of it."""
    yield from resolve(node)
    given = _node_addr(node)
    if given and given != node:
        yield from resolve(given)


def _node_addr(node: str) -> str:
    """NodeAddr of Slurm's configuration; "" where it can't be asked."""
    if not node:
        return ""
    try:
        said = ask("scontrol", "-o", "show", "node", node, timeout_s=_SCONTROL_S)
    except DtrainError:
        return ""
    return next((word.partition("=")[2] for word in said.split() if word.startswith("NodeAddr=")), "")


def _way_to(node: str) -> str:
    """Our address on the way to another node."""
    ways = (way_to(address) for address in _addresses(node))
    return next((way for way in ways if way and not is_loopback(way)), "")


def start_node(plan: JobPlan, node_rank: int, clock: Callable[[], float] = time.monotonic) -> bool:
    """Another agent on the machine of `node_rank`, inside the same allocation. Its predecessor, should it only sleep or
    be cut off, finds that the node is no longer its own. Returns when it has put itself down, or the job is to stop;
    False where it could not be started in time, or there is no srun: in a container's image."""
    if shutil.which("srun") is None:
        return False
    control = RunDir(plan.run_dir).control(plan.job_id)
    owner, here = newest_owner(control), slurm_job(os.environ)
    if owner is None or here is None or owner.slurm_job_id != here.id:
        return False
    if look(here.id) is None:
        # Slurm is silent, or it is we who are cut off: then this node must not fence the others. Tried again later.
        return True
    control.node(node_rank).unlink(missing_ok=True)
    if not _is_reached(owner.nodes[node_rank]):
        return False
    argv = step_argv(plan, [owner.nodes[node_rank]], here.cpus_per_node, ranks=[node_rank], overlap=True)
    srun = start_step(argv, srun_log(plan), os.environ)
    deadline = clock() + _START_S
    while srun.liveness() == "alive":
        if control.node(node_rank).exists() or control.stop(owner.number).exists():
            return True
        if clock() > deadline:
            if plan.setup:
                return True  # which may take its time
            end_srun(srun)
        time.sleep(_POLL_S)
    return control.node(node_rank).exists()


def _is_reached(name: str) -> bool:
    """Whether Slurm can start a process on a node of this job."""
    argv = ["srun", "--overlap", "--nodes=1", "--ntasks=1", f"--nodelist={name}", "--cpu-bind=none", "--mpi=none"]
    code, _, _ = run([*argv, "--input=none", "--job-name=probe", "true"], step_environ(os.environ), _PROBE_S)
    return code == 0


def lose_node(plan: JobPlan, node_rank: int, reason: str, *, enough: bool, alive: bool) -> Loss:
    """Notes a job's node as bad. With --no-kill Slurm leaves the job its other nodes; else, or where they are too few,
    the job is submitted anew: by the driver, or by `clear` where the driver is lost with its node."""
    control = RunDir(plan.run_dir).control(plan.job_id)
    owner = newest_owner(control)
    if owner is None:
        return Loss(follows="nothing")
    survives = keeps_other_nodes(plan, owner)
    # Without the first node a job has no batch script: nobody would see to its time limit, or to what comes after it.
    rest = survives and enough and node_rank > 0
    note = too_few(plan) if survives and not enough else ""
    can_resubmit = plan.slurm.on_stop != "none" and (not alive or spare_nodes(plan, look(owner.slurm_job_id)) > 0)
    if not rest and not can_resubmit:
        return Loss(follows="nothing", note=note)
    note_bad(control, owner.nodes[node_rank], reason, owner.number, went_on=rest, alive=alive)
    return Loss(follows="rest" if rest else "anew", note=note)


def keeps_other_nodes(plan: JobPlan, owner: Owner) -> bool:
    """Whether the job was submitted with --no-kill, as far as its script says."""
    if plan.slurm.no_kill:
        return True
    try:
        return "no-kill" in script_options(own_script(plan, owner).read_text())
    except (DtrainError, OSError):
        return False


def clear(plan: JobPlan) -> None:
    """After the job's last word, on the node that coordinated it. What is left of a job ends with its allocation, by
    the driver; where that is lost somebody else has to do its part."""
    control = RunDir(plan.run_dir).control(plan.job_id)
    owner, ended = newest_owner(control), read_json(control.ended)
    if owner is None or ended is None:
        return
    bad = bad_nodes(control).get(owner.nodes[0])
    if bad is None or bad.incarnation != owner.number or bad.alive:
        return
    if int(ended["exit_code"]) == exits.STOPPED:
        ending = arrange(plan, owner)
        if ending is None or ending.action in ("leave", "requeue"):
            return  # it is this Slurm job that goes on with the run
    with contextlib.suppress(DtrainError):
        ask("scancel", owner.slurm_job_id)  # or Slurm, once it knows of the dead node, starts this one again too
