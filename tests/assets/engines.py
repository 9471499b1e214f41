"""The engines of the conformance suite: what a config says to have one, what it holds, and what can be done to it. The
cells that are none by design stand in dtrain.launcher.conformance.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from dtrain.cluster.backends import get_backend

if TYPE_CHECKING:
    from kubeserver import KubeServer
    from raycluster import RayCluster
    from slurmcluster import SlurmCluster
    from sshhosts import SshHosts

MPIRUN = shutil.which("mpiexec", path=str(Path(sys.executable).parent)) or ""


# A Ray job that has all CPUs of four nodes.
_HOLD = """
import ray, time
ray.init(address="auto", log_to_driver=False)
@ray.remote(num_cpus=1)
class Held:
    def there(self): pass
held = [Held.remote() for _ in range(4)]
ray.get([one.there.remote() for one in held])
print("held", flush=True)
time.sleep(600)
"""


def _nothing() -> list[str]:
    return []


@contextmanager
def _as_it_is() -> Iterator[None]:
    yield


@dataclass(frozen=True, slots=True, kw_only=True)
class Engine:
    """Runs have two nodes of two workers, but under mpirun, which has one machine here. `before`: words in front of
    dtrain. `left`: what of ours the engine still holds. `silent`: it does not answer for a while. `full`: it has no
    room. `lose`: power failure of the machine of one of these agents, which `restore` ends. `again`: it starts the job
    again. `procs`: workers of a node, in tests to which their number is nothing."""

    name: str
    cluster: Mapping[str, Any]
    environ: Mapping[str, str] = field(default_factory=dict)
    before: tuple[str, ...] = ()
    nodes: int = 2
    procs: int = 2
    left: Callable[[], list[str]] = _nothing
    silent: Callable[[], AbstractContextManager[None]] = _as_it_is
    full: Callable[[], AbstractContextManager[None]] = _as_it_is
    lose: Callable[[Sequence[int], Sequence[str]], None] | None = None
    restore: Callable[[], None] | None = None
    again: Callable[[], None] | None = None

    @property
    def command(self) -> str:
        return "run" if self.before else "launch"

    @property
    def detaches(self) -> bool:
        return get_backend(self.name).detaches


def local() -> Engine:
    return Engine(name="local", cluster={}, procs=1, lose=lambda agents, hosts: os.kill(agents[1], signal.SIGKILL))


def mpi() -> Engine:
    """Raises LookupError where there is none."""
    if not MPIRUN:
        raise LookupError("pip install mpi4py mpich")
    return Engine(name="mpi", cluster={}, before=(MPIRUN, "-n", "4"), nodes=1)


def ssh(hosts: SshHosts) -> Engine:
    """Two machines and a spare one."""

    def cut_off(*names: str) -> None:
        for name in names:
            if name in hosts.running:
                hosts.cut_off(name)

    def lose(agents: Sequence[int], names: Sequence[str]) -> None:
        cut_off("node2")
        os.kill(agents[1], signal.SIGKILL)

    def restore() -> None:
        for name in hosts.ports:
            if name not in hosts.running:
                hosts.boot(name)

    @contextmanager
    def silent() -> Iterator[None]:
        cut_off("node1", "node2")
        try:
            yield
        finally:
            restore()

    named = {"hosts": list(hosts.ports), "options": hosts.options}
    return Engine(
        name="ssh", cluster={"backend": "ssh", "ssh": named}, silent=silent, lose=lose, restore=restore, procs=1
    )  # fmt: skip


def slurm(cluster: SlurmCluster) -> Engine:
    @contextmanager
    def silent() -> Iterator[None]:
        cluster.hang_controller()
        try:
            yield
        finally:
            cluster.start_controller()

    @contextmanager
    def full() -> Iterator[None]:
        job = cluster.submit("-N4", "--exclusive", "-o", "/dev/null", "--wrap", "sleep 600")
        cluster.wait_job(job, "RUNNING")
        try:
            yield
        finally:
            cluster.run("scancel", str(job))

    def left() -> list[str]:
        return [f"Slurm job {job}" for job in cluster.jobs()]

    def again() -> None:
        (job,) = cluster.jobs()
        cluster.run("scontrol", "requeue", str(job))
        deadline = time.monotonic() + 60
        while cluster.job(job)["JobState"] != "PENDING" and time.monotonic() < deadline:
            time.sleep(0.1)
        cluster.run("scontrol", "update", f"JobId={job}", "StartTime=now", check=False)

    return Engine(
        name="slurm", cluster={"backend": "slurm"}, environ=cluster.environ(), left=left, silent=silent, full=full,
        lose=lambda agents, hosts: cluster.kill_node(hosts[1]), restore=cluster.restore, again=again,
        procs=1,
    )  # fmt: skip


def ray(cluster: RayCluster) -> Engine:
    """Its head, where the Jobs API is, is not lost."""

    @contextmanager
    def silent() -> Iterator[None]:
        found = [psutil.Process(pid) for pid in cluster._pids(0)]
        dashboard = [process for process in found if any("dashboard.py" in word for word in process.cmdline())]
        assert dashboard
        for process in dashboard:
            process.suspend()
        try:
            yield
        finally:
            for process in dashboard:
                process.resume()

    @contextmanager
    def full() -> Iterator[None]:
        from ray.job_submission import JobSubmissionClient

        client = JobSubmissionClient(cluster.url)
        job = client.submit_job(entrypoint=shlex.join([sys.executable, "-c", _HOLD]))
        cluster.wait_for(lambda: "held" in client.get_job_logs(job), "actors on all CPUs")
        try:
            yield
        finally:
            client.stop_job(job)
            cluster.wait_for(lambda: str(client.get_job_status(job)) == "STOPPED", "end of these actors")

    def lose(agents: Sequence[int], hosts: Sequence[str]) -> None:
        cluster.kill_node(next(node for node in (1, 2, 3) if set(agents) & set(cluster._pids(node))))

    return Engine(
        name="ray", cluster={"backend": "ray", "cpus_per_node": 1, "ray": {"address": cluster.url}}, left=cluster.kept,
        silent=silent, full=full, lose=lose, restore=cluster.restore, procs=1,
    )  # fmt: skip


def kubernetes(server: KubeServer, volume: Path, secret: str) -> Engine:
    """Pods see of this machine's files those below `volume`. What hands a node's loss on is the launch that follows."""

    @contextmanager
    def silent() -> Iterator[None]:
        server.faults.go_down()
        try:
            yield
        finally:
            server.faults.come_up()

    @contextmanager
    def full() -> Iterator[None]:
        for name in server.nodes:
            server.cordon(name)
        try:
            yield
        finally:
            for name in server.nodes:
                server.uncordon(name)

    def left() -> list[str]:
        found = [one for kind in ("jobs", "pods", "services") for one in server.store.objects(kind)]
        return [f"{one['kind']} {one['metadata']['name']}" for one in found]

    def pod_of(host: str) -> Mapping[str, Any]:
        return next(pod for pod in server.pods() if pod["spec"]["hostname"] == host)

    def restore() -> None:
        for name in server.nodes:
            server.boot_node(name)

    def again() -> None:
        server.evict(server.pods()[0]["metadata"]["name"])

    asked = {
        "image": "dtrain:1", "user": 0, "grace_s": 20, "keep_s": 1, "secret": secret,
        "volumes": {str(volume): f"host:{volume}"},
    }  # fmt: skip
    return Engine(
        name="kubernetes", cluster={"backend": "kubernetes", "kubernetes": asked},
        environ={"KUBECONFIG": str(server.kubeconfig)}, left=left, silent=silent, full=full,
        lose=lambda agents, hosts: server.kill_node(pod_of(hosts[1])["spec"]["nodeName"]), restore=restore, again=again,
        procs=1,
    )  # fmt: skip


def marked(mark: str) -> list[psutil.Process]:
    """Live processes whose environment has this text, on whichever simulated machine."""
    found = []
    for pid in psutil.pids():
        with contextlib.suppress(OSError, psutil.Error):
            if mark.encode() in Path(f"/proc/{pid}/environ").read_bytes():
                process = psutil.Process(pid)
                if process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
    return found
