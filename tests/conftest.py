"""What holds for every test: a home of its own, and nothing left behind when it ends.

A test that leaves a process, a listening port or a file outside its tmp_path fails, and its processes are ended. With
DTRAIN_CI=1 a skip is a failure too, unless the test is marked `gpu`: there, every component must start.
"""

from __future__ import annotations

import compileall
import contextlib
import gc
import os
import shutil
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Generator, Iterator
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import hypothesis
import psutil
import pytest

if TYPE_CHECKING:
    from kubernetes.client import BatchV1Api, CoreV1Api
    from kubeserver import KubeServer
    from raycluster import RayCluster
    from s3servers import S3Server
    from slurmcluster import SlurmCluster
    from sshhosts import SshHosts

Started = TypeVar("Started")
MARKER = "DTRAIN_TEST_ID"
REPO = Path(__file__).resolve().parent.parent
SETTLE_S = 3.0  # what a killed process may take to be gone; waited only while something is left

# Written by tools around the tests, not by the tests.
TOOLS_FILES = {"__pycache__", ".pytest_cache", ".mypy_cache", ".ruff_cache", ".hypothesis", ".venv", ".coverage"}
TOOLS_TEMP_PREFIXES = ("torchinductor_",)  # torch's compile cache, one a user
# multiprocessing starts one a process and keeps it on purpose.
TOOLS_PROCESSES = ("multiprocessing.resource_tracker",)

# Begun first: what takes minutes must not be alone at the end, while the other test processes have nothing to do. Those
# of Slurm mostly wait: between others that mostly compute.
LONGEST = (
    "test_conformance_slurm.py", "test_conformance_local.py", "test_conformance_ssh.py", "test_conformance_ray.py",
    "test_conformance_kubernetes.py", "test_conformance_mpi.py",
    "test_slurm_requeues.py", "test_any_layout.py", "test_recovery.py", "test_relaunch.py", "test_slurm_losses.py",
    "test_zero.py", "test_verify.py", "test_slurm_allocation.py", "test_computing.py", "test_script_runs.py",
    "test_s3_runs.py", "test_exact.py", "test_s3_faults.py", "test_tensor.py", "test_slurm_runs.py", "test_worker.py",
    "test_ray.py", "test_kubernetes.py", "test_ssh.py", "test_ssh_schedules.py", "test_ray_schedules.py",
    "test_kubeserver.py", "test_kubernetes_url.py", "test_run_url.py",
    "test_huggingface.py", "test_agent_recovery.py", "test_horovod.py",
    "test_hybrids.py", "test_slurm_schedules.py", "test_kubernetes_schedules.py", "test_script_checkpoint.py",
    "test_digits.py", "test_cli_launch.py", "test_pipeline.py", "test_example.py", "test_example_models.py",
    "test_mpi.py",
)  # fmt: skip

# Tests are about behaviour: how long an example takes says something about the machine only.
hypothesis.settings.register_profile("dtrain", deadline=None)
hypothesis.settings.load_profile("dtrain")


@pytest.fixture(autouse=True)
def isolated(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A home, a working and a temporary folder of the test's own, and the check of what it leaves.

    The working folder is tmp_path, so that a relative path lands there. The temporary folder must be empty at the end,
    and has a short name, because a Unix socket's path has room for 107 bytes. Fixtures of a wider scope are set up
    before this one and are not the test's to clean.
    """
    home = tmp_path_factory.mktemp("home")
    temporary = Path(tempfile.mkdtemp(prefix="dt-"))
    test_id = uuid.uuid4().hex
    before = (_pids(), _listening(psutil.Process()), _repository_names())
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        patch.setenv(MARKER, test_id)
        patch.setenv("HOME", str(home))
        patch.setenv("TMPDIR", str(temporary))
        patch.setenv("DTRAIN_SITE", "")  # none of this machine's
        patch.setattr(tempfile, "tempdir", None)
        for name, folder in (("STATE", ".local/state"), ("CONFIG", ".config"), ("CACHE", ".cache")):
            patch.setenv(f"XDG_{name}_HOME", str(home / folder))
        yield
    leaks = _leaked_processes(test_id, before[0]) + _leaked_ports(before[1])
    # Only named, not removed: in the repository it may be somebody's work of this very second.
    leaks += [f"file {REPO / name}" for name in sorted(_repository_names() - before[2])]
    leaks += [f"temporary file {p}" for p in temporary.iterdir() if not p.name.startswith(TOOLS_TEMP_PREFIXES)]
    shutil.rmtree(temporary, ignore_errors=True)
    if leaks:
        pytest.fail("the test left behind:\n  " + "\n  ".join(leaks), pytrace=False)


def _pids() -> set[int]:
    return {int(name) for name in os.listdir("/proc") if name.isdecimal()}


def _new_processes(test_id: str, before: set[int]) -> list[psutil.Process]:
    """Live ones that the test has started: descendants of this process, and whatever carries its id, wherever it hangs
    now. Only those that are new are looked at: to ask all of a machine's takes longer than most tests."""
    mark = f"{MARKER}={test_id}".encode()
    ours = _descendants(os.getpid())
    found = []
    for pid in _pids() - before - (cases.parent_pids() if (cases := sys.modules.get("cases")) else set()):
        with contextlib.suppress(OSError, psutil.Error):
            if pid in ours or mark in Path(f"/proc/{pid}/environ").read_bytes():
                found.append(psutil.Process(pid))
    return [process for process in found if _matters(process)]


def _descendants(pid: int) -> set[int]:
    """By the kernel's own lists; by every process's parent where it keeps none (CONFIG_PROC_CHILDREN)."""
    if not Path(f"/proc/self/task/{os.getpid()}/children").exists():
        return {child.pid for child in psutil.Process(pid).children(recursive=True)}
    found: set[int] = set()
    for thread in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):
            for child in map(int, thread.read_text().split()):
                found |= {child} | _descendants(child)
    return found


def _matters(process: psutil.Process) -> bool:
    try:
        alive = process.status() not in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
        return alive and not any(name in " ".join(process.cmdline()) for name in TOOLS_PROCESSES)
    except psutil.Error:
        return False


def _leaked_processes(test_id: str, before: set[int]) -> list[str]:
    _settle(lambda: not _new_processes(test_id, before))
    leaked = _new_processes(test_id, before)
    words = []
    for process in leaked:
        with contextlib.suppress(psutil.Error):
            ports = ", ".join(_listening(process))
            command = " ".join(process.cmdline())[:300]
            words.append(f"process {process.pid}: {command}" + (f", listening on {ports}" if ports else ""))
    for process in leaked:
        with contextlib.suppress(psutil.Error):
            process.kill()
    psutil.wait_procs(leaked, timeout=SETTLE_S)
    return words


def _listening(process: psutil.Process) -> set[str]:
    """`address:port` of the process's listening TCP sockets."""
    with contextlib.suppress(psutil.Error):
        connections = process.net_connections(kind="tcp")
        return {f"{c.laddr.ip}:{c.laddr.port}" for c in connections if c.status == psutil.CONN_LISTEN}
    return set()


def _leaked_ports(before: set[str]) -> list[str]:
    def left() -> set[str]:
        return _listening(psutil.Process()) - before

    if left():
        gc.collect()  # a store or server may hang in a reference cycle
        _settle(lambda: not left())
    return [f"listening port {port} in the test process" for port in sorted(left())]


def _repository_names() -> set[str]:
    return {path.name for path in REPO.iterdir()} - TOOLS_FILES


def _settle(done: Callable[[], bool]) -> None:
    deadline = time.monotonic() + SETTLE_S
    while not done() and time.monotonic() < deadline:
        time.sleep(0.05)


@contextlib.contextmanager
def _started(prefix: str, start: Callable[[Path], contextlib.AbstractContextManager[Started]]) -> Iterator[Started]:
    """What `start` makes in a folder with a short name, for Unix sockets. Where it lacks something its tests are
    skipped, with what is missing."""
    from debian import Missing

    root = Path(tempfile.mkdtemp(prefix=prefix))
    try:
        with start(root) as found:
            yield found
    except Missing as missing:
        pytest.skip(str(missing))
    finally:
        shutil.rmtree(root, ignore_errors=True)


@pytest.fixture(scope="session")
def radosgw_server() -> Iterator[S3Server]:
    """Ceph's S3 gateway, started once. Where it can't be installed its tests are skipped, with what is missing."""
    from radosgw import radosgw

    with _started("rg-", radosgw) as found:
        yield found


@pytest.fixture(scope="session")
def slurm_cluster() -> Iterator[SlurmCluster]:
    """A real Slurm of four nodes with two fake GPUs each, started once a test process, in two seconds. Take `slurm`."""
    from slurmcluster import slurm_cluster

    with _started("sl-", lambda root: slurm_cluster(root, gpus=2)) as found:
        yield found


@pytest.fixture
def slurm(slurm_cluster: SlurmCluster) -> Iterator[SlurmCluster]:
    """The cluster, clean: controller up, every node idle, no job, homes empty. A test that leaves a job fails.

    0.2 s before and after a test that breaks nothing; after one that leaves nodes dead or cut off, about two seconds.
    """
    slurm_cluster.clear()
    yield slurm_cluster
    slurm_cluster.restore()
    _settle(lambda: not slurm_cluster.jobs())  # the end of a run is told before its batch script has ended
    if left := slurm_cluster.clear():
        pytest.fail(f"the test left behind: slurm job {', '.join(map(str, left))}", pytrace=False)


@pytest.fixture(scope="session")
def ssh_hosts() -> Iterator[SshHosts]:
    """Three machines that ssh reaches, on loopback. Take each as you found it: a test that cuts one off boots it."""
    from sshhosts import ssh_hosts

    with _started("ssh-", ssh_hosts) as found:
        yield found


@pytest.fixture(scope="session")
def ray_nodes() -> Iterator[RayCluster]:
    """A real Ray of four nodes with a CPU each, started once a test process, which takes half a minute. Take `ray`."""
    from raycluster import ray_cluster

    with _started("ray-", ray_cluster) as found:
        yield found


@pytest.fixture
def ray(ray_nodes: RayCluster) -> Iterator[RayCluster]:
    """The cluster, every node alive, no job. A test that leaves a job, an actor or a placement group fails."""
    ray_nodes.clear()
    yield ray_nodes
    ray_nodes.restore()
    _settle(lambda: not ray_nodes.kept() and not ray_nodes.jobs())  # a job's driver sees its end a moment later
    kept = ray_nodes.kept()
    if left := ray_nodes.clear() + kept:
        pytest.fail(f"the test left behind in Ray: {', '.join(left)}", pytrace=False)


@pytest.fixture(scope="session")
def kube_cluster() -> Iterator[KubeServer]:
    """A Kubernetes of four nodes with two GPUs each, started once a test process, in a second. Take `kubernetes`."""
    from kubeserver import kube_server

    with _started("ku-", kube_server) as found:
        yield found


@pytest.fixture
def kubernetes(kube_cluster: KubeServer) -> Iterator[KubeServer]:
    """The cluster, clean: every node up, no object of a user's, no fault. A test that leaves a Job or a Pod fails."""
    kube_cluster.clear()
    yield kube_cluster
    _settle(lambda: not kube_cluster.pods())  # they end after their Job
    if left := [one for one in kube_cluster.clear() if one.startswith(("Job", "Pod", "Service"))]:
        pytest.fail(f"the test left behind: {', '.join(left)}", pytrace=False)


@pytest.fixture
def batch(kubernetes: KubeServer) -> Iterator[BatchV1Api]:
    """Kubernetes' Jobs, by the official client, with an ordinary user's rights."""
    from kubernetes.client import BatchV1Api

    with kubernetes.client(admin=False) as client:
        yield BatchV1Api(client)


@pytest.fixture
def core(kubernetes: KubeServer) -> Iterator[CoreV1Api]:
    """Its pods, services and so on, likewise."""
    from kubernetes.client import CoreV1Api

    with kubernetes.client(admin=False) as client:
        yield CoreV1Api(client)


@cache
def _has_gpu() -> bool:
    smi = shutil.which("nvidia-smi")
    return smi is not None and subprocess.run([smi, "-L"], capture_output=True).returncode == 0


def pytest_configure(config: pytest.Config) -> None:
    """Bytecode, as an installation has it: hundreds of processes that the tests start would compile all of dtrain anew,
    where the environment says that Python is to write none."""
    if not hasattr(config, "workerinput"):
        for name in ("cluster", "launcher", "runtime", "slurm", "strategies"):
            compileall.compile_dir(REPO / name, quiet=2)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST))


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not _has_gpu():
        pytest.skip("needs an NVIDIA GPU: `nvidia-smi -L` finds none")


def _refuse_skip(report: pytest.TestReport | pytest.CollectReport) -> None:
    if os.environ.get("DTRAIN_CI") == "1" and report.outcome == "skipped" and not hasattr(report, "wasxfail"):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        report.outcome = "failed"
        report.longrepr = f"{reason}\nDTRAIN_CI=1: every component must start here, so a skip is a failure"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if item.get_closest_marker("gpu") is None:
        _refuse_skip(report)
    cluster = getattr(item, "funcargs", {}).get("slurm")
    if report.failed and report.when == "call" and cluster is not None:
        report.sections.append(("Slurm, when the test failed", cluster.words()))
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    report = yield
    _refuse_skip(report)
    return report
