"""The tests' Slurm cluster (assets/slurmcluster.py) is what it says: four machines, which die, are cut off, come back.

And it goes without a trace. What runs on it is other files' business.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from slurmcluster import SlurmCluster, slurm_cluster

pytestmark = pytest.mark.slow


def test_four_hosts_that_know_each_other(slurm: SlurmCluster) -> None:
    talk = "hostname; getent hosts node4; ls /proc | grep -c '^[0-9]'; touch $0/$(hostname)"
    lines = slurm.run("srun", "-N4", "--label", "sh", "-c", talk, str(slurm.local_disk)).stdout.splitlines()
    said = {rank: [line[3:] for line in lines if line.startswith(f"{rank}:")] for rank in range(4)}
    assert [words[0] for words in said.values()] == slurm.nodes
    assert {words[1].split()[0] for words in said.values()} == {slurm.address("node4")}
    assert all(int(words[2]) < 20 for words in said.values()), "each machine has processes of its own"
    for name in slurm.nodes:
        assert {path.name for path in slurm.disk_of(name).iterdir()} & set(slurm.nodes) == {name}


def test_gpus_are_dealt_out(slurm: SlurmCluster) -> None:
    given = slurm.run("srun", "-n2", "--gpus-per-task=1", "printenv", "CUDA_VISIBLE_DEVICES").stdout.split()
    assert sorted(given) == ["0", "1"]


def test_a_power_failure_takes_a_node_down_until_it_boots(slurm: SlurmCluster) -> None:
    job = slurm.submit("-wnode3", "--no-requeue", "--wrap", "sleep 300")
    slurm.wait_job(job, "RUNNING")
    until(lambda: sleeping(slurm, "node3"))
    slurm.kill_node("node3")
    assert slurm.node_processes("node3") == {}
    assert slurm.wait_job(job, "NODE_FAIL")["Reason"] == "NodeDown"
    assert slurm.states()["node3"].startswith("down")
    slurm.boot_node("node3")
    slurm.wait_idle()
    # From a node, not from here: the others know its new network card.
    assert slurm.run("srun", "-N4", "hostname").stdout.count("node") == 4
    job = slurm.submit("-N4", "--output=out", "--wrap", "srun hostname", as_user="nobody")
    slurm.wait_job(job, "COMPLETED")
    assert (slurm.home("nobody") / "out").read_text().count("node3") == 1


def test_a_job_outlives_its_slurmd_but_not_a_long_cut(slurm: SlurmCluster) -> None:
    job = slurm.submit("-wnode2", "--no-requeue", "--wrap", "sleep 300")
    slurm.wait_job(job, "RUNNING")
    until(lambda: sleeping(slurm, "node2"))
    slurm.kill_slurmd("node2")
    slurm.start_slurmd("node2")
    assert slurm.job(job)["JobState"] == "RUNNING"
    slurm.cut("node2")
    slurm.wait_job(job, "NODE_FAIL")
    assert sleeping(slurm, "node2"), "the old job goes on"
    slurm.heal("node2")
    slurm.restore()
    slurm.wait_idle()
    until(lambda: not sleeping(slurm, "node2"))


@pytest.mark.parametrize("how", ["stop", "crash", "hang"])
def test_a_job_outlives_the_controller(slurm: SlurmCluster, how: str) -> None:
    before = time.time()
    job = slurm.submit("--wrap", "sleep 300")
    slurm.wait_job(job, "RUNNING")
    if how == "crash":
        slurm.wait_saved(before)
    if how == "hang":
        slurm.hang_controller()
    else:
        slurm.stop_controller(crash=how == "crash")
    assert slurm.run("scontrol", "show", "job", str(job), check=False).returncode != 0
    slurm.start_controller()
    # What was saved last may be older than the job's start.
    assert slurm.job(job)["JobState"] == "RUNNING" or how == "crash"
    slurm.run("scancel", str(job))


def test_an_ordinary_user(slurm: SlurmCluster) -> None:
    script = slurm.home("nobody") / "job.sh"
    script.write_text("#!/bin/sh\nid -un\necho $HOME\nsrun id -un\n")
    job = slurm.submit("-N2", "--output=out", str(script), as_user="nobody")
    slurm.wait_job(job, "COMPLETED")
    assert (slurm.home("nobody") / "out").read_text().split() == [
        "nobody",
        str(slurm.home("nobody")),
        "nobody",
        "nobody",
    ]
    assert slurm.run(sys.executable, "-c", "import dtrain.cluster.errors", as_user="nobody").stderr == ""


def test_clear_gives_back_a_clean_cluster(slurm: SlurmCluster) -> None:
    slurm.drain("node1")
    slurm.kill_node("node2")
    slurm.kill_slurmd("node3")
    slurm.cut("node4")
    slurm.home("nobody").joinpath("file").touch()
    job = slurm.submit("--wrap", "sleep 300")
    slurm.stop_controller()
    assert slurm.clear() == [job]
    assert set(slurm.states().values()) == {"idle"}
    assert list(slurm.home("nobody").iterdir()) == []


def test_two_clusters_at_once_and_nothing_left_of_the_second(slurm: SlurmCluster) -> None:
    root = Path(tempfile.mkdtemp(prefix="sl-"))
    with slurm_cluster(root, nodes=2) as other:
        assert other.submit("-N2", "--wrap", "sleep 300") == 1, "job ids of its own"
        assert other.run("srun", "-N2", "hostname").returncode == 0
        assert slurm.jobs() == []
        until(lambda: sleeping(other, "node1"))
        pids = {pid for name in other.nodes for pid in other.node_processes(name)}
        link = network_link(other.address("node1"))
        assert link in psutil.net_if_addrs()
    assert not any(map(alive, pids))
    assert link not in psutil.net_if_addrs()
    assert str(root) not in Path("/proc/mounts").read_text()
    root.rmdir()  # empty


def test_the_cluster_ends_with_its_process() -> None:
    root = Path(tempfile.mkdtemp(prefix="sl-"))
    program = (
        "import os, pathlib, sys\nfrom slurmcluster import SlurmCluster\n"
        "cluster = SlurmCluster(pathlib.Path(sys.argv[1]), nodes=1)\ncluster.start()\n"
        "cluster.submit('--wrap', 'sleep 300')\nprint(cluster.address('node1'), flush=True)\nos.kill(os.getpid(), 9)\n"
    )
    environ = {"PATH": os.environ["PATH"], "PYTHONPATH": str(Path(__file__).parent / "assets")}
    done = subprocess.run([sys.executable, "-c", program, str(root)], env=environ, capture_output=True, text=True)
    assert done.returncode == -9, done.stderr
    link = network_link(done.stdout.strip())
    pids = [int((root / "run" / f"{name}.pid").read_text()) for name in ("node1", "ctl")]
    # The kernel takes machines and networks down in its own time.
    until(lambda: link not in psutil.net_if_addrs() and not any(map(alive, pids)))
    shutil.rmtree(root)


def sleeping(cluster: SlurmCluster, node: str) -> bool:
    return "sleep 300" in cluster.node_processes(node).values()


def network_link(address: str) -> str:
    return f"dtrain{address.split('.')[2]}"


def alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def until(reached: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not reached():
        assert time.monotonic() < deadline
        time.sleep(0.05)
