"""What a Slurm back end does on the nodes of its job: the network interface, and an agent in a dead one's place."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence

from dtrain.cluster.errors import DtrainError, UsageError
from dtrain.cluster.interfaces import LOOPBACK, Interface, list_interfaces, pick
from dtrain.cluster.jobplan import JobPlan
from dtrain.cluster.rundir import RunDir, read_json
from dtrain.slurm.badnodes import bad_nodes, note_bad
from dtrain.slurm.client import ask, run
from dtrain.slurm.ending import conclude
from dtrain.slurm.jobenv import slurm_job, step_environ
from dtrain.slurm.owner import newest_owner
from dtrain.slurm.steps import end_srun, srun_log, start_step, step_argv
from dtrain.slurm.stopping import look

_SCONTROL_S = 5
_START_S = 30.0  # for an agent to appear
_POLL_S = 0.1
_PROBE_S = 10.0  # for a process to be started on a node; one that is dead is known to srun only later


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
            if candidate.address == address and not _is_loopback(address):
                return candidate
    for other in others:
        for candidate in found:
            if candidate.address == _way_to(other):
                return candidate
    if plan.nodes == 1:
        return next((candidate for candidate in found if not _is_loopback(candidate.address)), LOOPBACK)
    raise UsageError(
        f"auto: node {here or socket.gethostname()} does not know at which of its addresses the others reach it. "
        f"There are: {', '.join(map(str, found))}. Name one, or a range of addresses like 10.0.0.0/8."
    )


def _addresses(node: str) -> Iterator[str]:
    """Of a node as Slurm calls it: by its name, then by Slurm's own record of it."""
    yield from _resolve(node)
    given = _node_addr(node)
    if given and given != node:
        yield from _resolve(given)


def _resolve(name: str) -> list[str]:
    try:
        answers = socket.getaddrinfo(name, None, type=socket.SOCK_STREAM) if name else []
    except OSError:
        return []
    return list(dict.fromkeys(str(answer[4][0]) for answer in answers))


def _node_addr(node: str) -> str:
    """NodeAddr of Slurm's configuration; "" where it can't be asked."""
    if not node:
        return ""
    try:
        said = subprocess.run(
            ["scontrol", "-o", "show", "node", node], capture_output=True, text=True, timeout=_SCONTROL_S
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return ""
    return next((word.partition("=")[2] for word in said.split() if word.startswith("NodeAddr=")), "")


def _way_to(node: str) -> str:
    """Our address on the way to another node. Nothing is sent: connecting a UDP socket only asks the routing table."""
    for address in _addresses(node):
        with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_DGRAM) as probe:
            try:
                probe.connect((address, 9))
                mine = str(probe.getsockname()[0])
            except OSError:
                continue
            if not _is_loopback(mine):
                return mine
    return ""


def _is_loopback(address: str) -> bool:
    return address.startswith("127.") or address == "::1"


def start_node(plan: JobPlan, node_rank: int, clock: Callable[[], float] = time.monotonic) -> bool:
    """Another agent on the machine of `node_rank`, inside the same allocation. Its predecessor, should it only sleep or
    be cut off, finds that the node is no longer its own. Returns when it has put itself down; False where it could not
    be started in time, or there is no srun: in a container's image."""
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
    argv = step_argv(plan, [owner.nodes[node_rank]], here.cpus_per_node, node_rank=node_rank, overlap=True)
    srun = start_step(argv, srun_log(plan), os.environ)
    deadline = clock() + _START_S
    while srun.liveness() == "alive":
        if control.node(node_rank).exists():
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


def give_back(plan: JobPlan, node_ranks: Sequence[int], reason: str) -> bool:
    """Notes the nodes as lost; True where the job is then submitted anew: by the driver, or by `clear` where the driver
    is lost with its node."""
    control = RunDir(plan.run_dir).control(plan.job_id)
    owner = newest_owner(control)
    if owner is None or plan.slurm.on_stop == "none":
        return False
    note_bad(control, [owner.nodes[rank] for rank in node_ranks], reason, owner.number)
    return True


def clear(plan: JobPlan) -> None:
    """After the job's last word, on the node that coordinated it. What is left of a job ends with its allocation, by
    the driver; where that is lost somebody else has to do its part."""
    control = RunDir(plan.run_dir).control(plan.job_id)
    owner, ended = newest_owner(control), read_json(control.ended)
    if owner is None or ended is None:
        return
    bad = bad_nodes(control).get(owner.nodes[0])
    if bad is None or bad.incarnation != owner.number:
        return
    conclude(plan, owner, int(ended["exit_code"]))
    with contextlib.suppress(DtrainError):
        ask("scancel", owner.slurm_job_id)  # or Slurm, once it knows of the dead node, starts this one again too
