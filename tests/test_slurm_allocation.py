"""`launch` where a Slurm allocation is already there, on a real cluster: it is used, kept, and usable afterwards. And
what happens to agents inside a job: killed, cut off, begun anew."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import counted
import pytest
import yaml
from slurmcluster import SlurmCluster

from dtrain.cluster.rundir import RunDir, read_json, read_jsonl
from dtrain.slurm.owner import newest_owner

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

DTRAIN = (sys.executable, "-P", "-m", "dtrain.launcher.cli")
PATIENCE_S = 90.0


@pytest.fixture
def folder(slurm: SlurmCluster, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Below the cluster's root, which every node sees; with a config beside the module that it names."""
    made = slurm.root / "work"
    made.mkdir()
    shutil.copy(Path(counted.__file__), made)
    monkeypatch.chdir(made)
    monkeypatch.setenv("TMPDIR", str(slurm.local_disk))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    for name, value in slurm.environ().items():
        monkeypatch.setenv(name, value)
    yield made
    slurm.clear()
    shutil.rmtree(made)


def write_config(folder: Path, steps: int, **more: Any) -> None:
    config = counted.training(steps, checkpoint={"every": 20, "keep": 2}, cluster={"backend": "slurm"}, **more)
    (folder / "cfg.yaml").write_text(yaml.safe_dump(config))


@contextlib.contextmanager
def salloc(folder: Path, *options: str) -> Iterator[dict[str, str]]:
    """The environment of a shell in `salloc -N2`."""
    say = "env -0 >salloc.tmp; mv salloc.tmp salloc; read"
    argv = ["salloc", "-N2", "--time=10", *options, "bash", "-c", say]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stderr=subprocess.DEVNULL) as shell:
        wait_for((folder / "salloc").exists, "the allocation")
        pairs = (folder / "salloc").read_text().split("\0")
        yield os.environ | dict(pair.split("=", 1) for pair in pairs if pair.startswith("SLURM"))
        shell.communicate(b"\n", timeout=PATIENCE_S)


@pytest.fixture
def allocation(folder: Path) -> Iterator[dict[str, str]]:
    with salloc(folder) as environ:
        yield environ


def losses(run: Path) -> list[float]:
    return [record["loss"] for record in read_jsonl(RunDir(run).metrics)]


def wait_for(ready: Callable[[], object], words: str) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not ready():
        assert time.monotonic() < deadline, words
        time.sleep(0.1)


def wait_for_step(run: Path, step: int) -> None:
    """It goes on from there, but not far: until the next step is waited for, or `hurry`."""
    wait_for(RunDir(run).job.exists, f"a job in {run}")
    counted.allow(run, step + counted.AHEAD)
    wait_for(lambda: len(losses(run)) >= step, f"step {step} of {run}: {list(read_jsonl(RunDir(run).events))[-3:]}")


def events(run: Path, kind: str) -> list[dict[str, Any]]:
    return [event for event in read_jsonl(RunDir(run).events) if event["type"] == kind]


def agents(slurm: SlurmCluster, node: str) -> list[int]:
    return [pid for pid, line in slurm.node_processes(node).items() if "dtrain.runtime.agent" in line]


def status(run: Path) -> dict[str, Any]:
    return read_json(RunDir(run).control(job_of(run)).status) or {}


def job_of(run: Path) -> str:
    return str(json.loads(RunDir(run).job.read_text())["job_id"])


def slurm_job_of(run: Path) -> int:
    owner = newest_owner(RunDir(run).control(job_of(run)))
    assert owner is not None
    return int(owner.slurm_job_id)


def test_three_launches_in_one_allocation_one_interrupted_one_with_a_frozen_agent(
    slurm: SlurmCluster, folder: Path, allocation: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_config(folder, 60)
    launch = [*DTRAIN, "launch", "cfg.yaml"]
    whole = subprocess.run([*launch, "--name", "whole"], env=allocation, capture_output=True, text=True, check=False)
    assert whole.returncode == 0, whole.stdout + whole.stderr
    assert "2 nodes x 1 process" in whole.stdout
    control = RunDir(folder / "runs/whole").control(job_of(folder / "runs/whole"))
    records = [read_json(control.node(node)) or {} for node in (0, 1)]
    assert [record.get("host") for record in records] == slurm.nodes[:2]

    slow = {**allocation, "COUNTED_STEP_S": "0.1"}
    broken = subprocess.Popen([*launch, "--name", "broken"], env=slow, stdout=subprocess.PIPE, text=True)
    wait_for_step(folder / "runs/broken", 5)
    broken.send_signal(signal.SIGINT)
    said = broken.communicate(timeout=PATIENCE_S)[0]
    assert broken.returncode == 85, said
    assert 5 <= len(losses(folder / "runs/broken")) < 60
    assert slurm.job(int(allocation["SLURM_JOB_ID"]))["JobState"] == "RUNNING"

    again = subprocess.Popen([*launch, "--name", "broken"], env=slow, stdout=subprocess.PIPE, text=True)
    wait_for_step(folder / "runs/broken", len(losses(folder / "runs/broken")) + 5)
    assert set(counted.samples(folder / "runs/broken").values()) == {1}, "a stop repeats nothing"
    (frozen,) = agents(slurm, slurm.nodes[1])
    attempts = len(events(folder / "runs/broken", "attempt_started"))
    os.kill(frozen, signal.SIGSTOP)  # another takes its place, and it must not hold the step for ever
    wait_for(lambda: len(events(folder / "runs/broken", "attempt_started")) > attempts, "another in its place")
    (folder / "runs/broken" / counted.HURRY).touch()
    said = again.communicate(timeout=PATIENCE_S)[0]
    assert again.returncode == 0, said
    assert losses(folder / "runs/broken") == losses(folder / "runs/whole")
    for name, value in allocation.items():
        if name.startswith("SLURM_JOB"):
            monkeypatch.setenv(name, value)
    assert slurm.run("srun", "-N2", "hostname").stdout.split() != []
    wait_for(lambda: not [pid for node in slurm.nodes for pid in agents(slurm, node)], "agents that stay")


def test_an_allocation_that_loses_a_node_is_used_with_the_other(slurm: SlurmCluster, folder: Path) -> None:
    """Its first one, and again by the next launch; the environment of the shell still names both."""
    write_config(folder, 60)
    launch = [*DTRAIN, "launch", "cfg.yaml"]
    with salloc(folder, "--no-kill") as environ:
        slow = {**environ, "COUNTED_STEP_S": "0.1"}
        hit = subprocess.Popen([*launch, "--name", "hit"], env=slow, stdout=subprocess.PIPE, text=True)
        wait_for_step(folder / "runs/hit", 5)
        slurm.kill_node(slurm.nodes[0])
        (folder / "runs/hit" / counted.HURRY).touch()
        said = hit.communicate(timeout=2 * PATIENCE_S)[0]
        assert hit.returncode == 0, said
        assert "goes on with 1 of 2 nodes: node 0 can't be reached" in said
        steps = [record["step"] for record in read_jsonl(RunDir(folder / "runs/hit").metrics)]
        assert steps == list(range(1, 61))
        number = int(environ["SLURM_JOB_ID"])
        wait_for(lambda: "[" not in slurm.job(number)["NodeList"], "Slurm's notice of the loss")
        again = subprocess.run([*launch, "--name", "again"], env=environ, capture_output=True, text=True, check=False)
        assert again.returncode == 0, again.stdout + again.stderr
        assert "1 node x 1 process" in again.stdout


def test_the_second_interrupt_kills_and_leaves_the_allocation(
    slurm: SlurmCluster, folder: Path, allocation: dict[str, str]
) -> None:
    write_config(folder, 10_000, train={"steps": 10_000, "seed": 3})
    environ = {**allocation, "COUNTED_STEP_S": "60"}  # the first step does not end
    launch = subprocess.Popen(
        [*DTRAIN, "launch", "cfg.yaml", "--name", "stuck"], env=environ, stdout=subprocess.PIPE, text=True
    )
    wait_for(lambda: events(folder / "runs/stuck", "workers_started"), "workers")
    launch.send_signal(signal.SIGINT)
    wait_for(lambda: events(folder / "runs/stuck", "stopping"), "the first interrupt")
    launch.send_signal(signal.SIGINT)
    said = launch.communicate(timeout=PATIENCE_S)[0]
    assert launch.returncode == 130, said
    assert "killed by Ctrl-C" in said
    wait_for(lambda: not [pid for node in slurm.nodes for pid in agents(slurm, node)], "agents that stay")
    assert slurm.job(int(allocation["SLURM_JOB_ID"]))["JobState"] == "RUNNING"


def test_too_small_an_allocation_is_said(folder: Path, allocation: dict[str, str]) -> None:
    write_config(folder, 60)
    refused = subprocess.run(
        [*DTRAIN, "launch", "cfg.yaml", "--nodes", "3"], env=allocation, capture_output=True, text=True, check=False
    )
    assert refused.returncode == 2
    assert "this allocation" in refused.stderr
    assert "has 2 nodes" in refused.stderr
    assert not (folder / "runs").exists()


def test_submit_from_inside_makes_a_job_of_its_own(
    slurm: SlurmCluster, folder: Path, allocation: dict[str, str]
) -> None:
    write_config(folder, 10)
    launch = [*DTRAIN, "launch", "cfg.yaml", "--nodes", "2", "--name", "own", "--submit", "--detach"]
    said = subprocess.run(launch, env=allocation, capture_output=True, text=True, check=False)
    assert said.returncode == 0, said.stdout + said.stderr
    (number,) = set(slurm.jobs()) - {int(allocation["SLURM_JOB_ID"])}
    assert f"Slurm job {number}" in said.stdout
    assert slurm.wait_job(number, "COMPLETED", timeout_s=PATIENCE_S)["NumNodes"] == "2"
    assert len(losses(folder / "runs/own")) == 10


SCRIPT = f"""\
#!/bin/bash
#SBATCH --nodes=2 --ntasks-per-node=1 --time=10 --requeue --open-mode=append --output=slurm.out
exec {" ".join(DTRAIN)} launch --batch "$@"
"""


def test_plain_sbatch_and_a_second_job_on_the_same_run(slurm: SlurmCluster, folder: Path) -> None:
    """Composed in the job; agents that are killed come back, that of the coordinator too; a requeue goes on where it
    was, and what is left of the first start can't take part."""
    write_config(folder, 120)
    (folder / "train.sbatch").write_text(SCRIPT)
    submit = ("--export=ALL,COUNTED_STEP_S=0.05", "train.sbatch", "cfg.yaml", "name=hand")
    number, run = slurm.submit(*submit), folder / "runs/hand"
    wait_for_step(run, 25)
    second = slurm.submit(*submit)
    ended = slurm.wait_job(second, "FAILED", timeout_s=PATIENCE_S)
    assert ended["ExitCode"] == "93:0"
    assert f"Slurm job {number}" in (folder / "slurm.out").read_text()

    for rank in (1, 0):
        owner = newest_owner(RunDir(run).control(job_of(run)))
        assert owner is not None
        attempts = len(events(run, "attempt_started"))
        (pid,) = agents(slurm, owner.nodes[rank])
        os.kill(pid, signal.SIGKILL)
        wait_for(lambda n=attempts: len(events(run, "attempt_started")) > n, "a new attempt")  # type: ignore[misc]
        wait_for_step(run, len(losses(run)) + 5)

    slurm.run("scontrol", "requeue", str(number))
    wait_for(lambda: slurm.job(number)["JobState"] == "PENDING", "the requeue")
    assert (read_json(RunDir(run).control(job_of(run)).ended) or {})["state"] == "stopped"
    (run / counted.HURRY).touch()
    slurm.run("scontrol", "update", f"JobId={number}", "StartTime=now")
    assert slurm.wait_job(number, "COMPLETED", timeout_s=PATIENCE_S)["ExitCode"] == "0:0"
    assert [event["restart"] for event in events(run, "requeued")] == [1]
    assert len(losses(run)) == 120


def test_a_node_that_was_cut_off_has_no_part_in_the_next_start(slurm: SlurmCluster, folder: Path) -> None:
    write_config(folder, 10_000)
    (folder / "train.sbatch").write_text(SCRIPT)
    number = slurm.submit("--export=ALL,COUNTED_STEP_S=0.05", "train.sbatch", "cfg.yaml", "name=cut")
    run = folder / "runs/cut"
    wait_for_step(run, 25)
    first = newest_owner(RunDir(run).control(job_of(run)))
    assert first is not None
    slurm.cut(first.nodes[1])

    def second_start() -> bool:
        slurm.run("scontrol", "update", f"JobId={slurm_job_of(run)}", "StartTime=now", check=False)
        newest = newest_owner(RunDir(run).control(job_of(run)))
        return newest is not None and newest.number > 1

    wait_for(second_start, "a second start")
    wait_for_step(run, len(losses(run)) + 10)
    second = newest_owner(RunDir(run).control(job_of(run)))
    assert second is not None
    assert first.nodes[1] not in second.nodes
    slurm.heal(first.nodes[1])
    wait_for(lambda: not agents(slurm, first.nodes[1]), "the agent of the first start stays")
    attempts = {record["attempt"] for record in list(read_jsonl(RunDir(run).metrics))[-10:]}
    wait_for_step(run, len(losses(run)) + 10)
    assert {record["attempt"] for record in list(read_jsonl(RunDir(run).metrics))[-10:]} == attempts
    assert len(agents(slurm, second.nodes[0])) == 1
    slurm.run("scancel", "--quiet", str(number), str(slurm_job_of(run)), check=False)
