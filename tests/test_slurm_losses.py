"""Nodes of a real Slurm that lose power or that spoil every attempt: the run ends right without a person."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import counted
import pytest
from countedrun import BATCH, Run
from slurmclient import a_plan, record
from slurmcluster import SlurmCluster

from dtrain.cluster.rundir import RunDir, read_json
from dtrain.slurm import node
from dtrain.slurm.badnodes import note_bad
from dtrain.slurm.owner import claim, newest_owner
from dtrain.slurm.stopping import write_stopped

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.timeout(900)]

STEPS = 150


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, slurm_cluster: SlurmCluster) -> list[tuple[Any, ...]]:
    """(step, loss, norm of the gradients) of STEPS steps on the local back end, with three nodes throughout."""
    run = Run(slurm_cluster, tmp_path_factory.mktemp("undisturbed"), STEPS, nodes=3)
    run.launch("--backend", "local", "checkpoint.every=1000", step_s=0.0)
    return run.numbers()


@pytest.fixture
def run(tmp_path: Path, slurm: SlurmCluster) -> Callable[..., Run]:
    return lambda steps, **cluster: Run(slurm, tmp_path / "hit", steps, **cluster)


def nodes_of(run: Run) -> tuple[str, ...]:
    """Slurm's names, by node rank, of the job's newest start."""
    job = read_json(RunDir(run.dir).job)
    assert job is not None
    owner = newest_owner(RunDir(run.dir).control(str(job["job_id"])))
    assert owner is not None
    return owner.nodes


def lose(run: Run, node_rank: int) -> str:
    """Waits for the next step; prints how long that took, and when Slurm knew."""
    slurm, name, attempts = run.slurm, nodes_of(run)[node_rank], len(run.events("attempt_started"))
    run.wait_step(run.step + 1)  # it trains, and goes on to do so
    slurm.kill_node(name)
    began, noticed = time.monotonic(), 0.0
    reached = run.step

    def goes_on() -> bool:
        nonlocal noticed
        if not noticed and slurm.states()[name].startswith("down"):
            noticed = time.monotonic() - began
        return len(run.events("attempt_started")) > attempts and run.step > reached

    counted.allow(run.dir, reached + counted.AHEAD)
    run.wait(f"a step without {name}", goes_on)
    what = "the batch host" if node_rank == 0 else f"node {node_rank}"
    knew = f"after {noticed:.1f} s" if noticed else "later"
    print(
        f"  {what}: next step {time.monotonic() - began:.1f} s after the kill; Slurm called it down {knew}", flush=True
    )
    return name


def bring_back(slurm: SlurmCluster, name: str) -> None:
    """Not before Slurm knows that it was away: a run without it is often the quicker one, and a node that comes back
    unnoticed stays in its job."""
    slurm.wait_state(name, "down*", "down")
    slurm.boot_node(name)
    slurm.wait_state(name, "idle")


def status(run: Run) -> dict[str, Any]:
    words = [sys.executable, "-P", "-m", "dtrain.launcher.cli", "status", str(run.dir), "--json"]
    said = subprocess.run(words, env={**os.environ, **run.slurm.environ()}, capture_output=True, check=False).stdout
    found: dict[str, Any] = json.loads(said)
    return found


def test_each_node_in_turn(run: Callable[..., Run], slurm: SlurmCluster, undisturbed: list[tuple[Any, ...]]) -> None:
    """Three nodes and a spare one: those that train are lost one after the other, the one of the batch script too.
    The numbers are, bit for bit, those of a run to which nothing happens."""
    hit = run(STEPS, nodes=3)
    hit.launch("--detach")
    hit.wait_step(12)
    print("\nSlurmdTimeout 3 s:")
    for node_rank in (2, 1, 0):
        name = lose(hit, node_rank)
        bring_back(slurm, name)
    hit.wait_done()
    assert hit.numbers() == undisturbed
    assert set(hit.samples()) == set(range(STEPS * BATCH))


def test_fewer_nodes_go_on_where_slurm_lets_them(
    run: Callable[..., Run], slurm: SlurmCluster, undisturbed: list[tuple[Any, ...]]
) -> None:
    """With --no-kill the same Slurm job goes on without a node, until it loses its batch script. Two nodes' sums are
    rounded otherwise than three's."""
    hit = run(STEPS, nodes=3, slurm={"no_kill": True})
    hit.launch("--detach")
    hit.wait_step(12)
    print("\n--no-kill:")
    lost = lose(hit, 2)
    found = status(hit)
    assert (found["state"], found["nodes"], found["nodes_asked"], found["world_size"]) == ("running", 2, 3, 2)
    assert "without node 2" in found["reason"]
    assert hit.events("requeued") == []
    (left_out,) = hit.events("node_left_out")
    assert (left_out["node"], left_out["nodes"]) == (2, 2)
    bring_back(slurm, lost)
    lose(hit, 0)
    assert [event["nodes"] for event in hit.events("attempt_started")][1:] == [2, 3]
    hit.wait_done()
    assert [number for number, *_ in hit.numbers()] == list(range(1, STEPS + 1))
    for numbers, expected in zip(hit.numbers(), undisturbed, strict=True):
        assert numbers == pytest.approx(expected, rel=1e-4)
    assert set(hit.samples()) == set(range(STEPS * BATCH))


@pytest.mark.parametrize("case", ["", "Slurm was quicker", "sbatch is forbidden"])
def test_who_goes_on_when_the_batch_host_is_lost(
    slurm: SlurmCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    """A survivor submits a job in place of the one that is lost, and cancels that one. Unless Slurm has put it back
    into the queue meanwhile, or sbatch is forbidden on nodes: then the old one goes on."""
    for name, value in slurm.environ().items():
        monkeypatch.setenv(name, value)
    plan = a_plan(tmp_path / "lost", sys.executable, nodes=2, cwd=str(tmp_path))
    control = record(plan).run.control(plan.job_id)
    script = control.path / "job.sbatch"
    script.write_text("#!/bin/bash\n#SBATCH -N2 -o /dev/null\nsleep 300\n")
    lost = slurm.submit(str(script))
    slurm.wait_job(lost, "RUNNING")
    owner = claim(control, {"SLURM_JOB_ID": str(lost)}, ["node1", "node2"], None)
    assert owner is not None
    note_bad(control, "node1", "lost", owner.number)
    write_stopped(plan, "node1 was lost")
    if case == "Slurm was quicker":
        slurm.run("scontrol", "requeue", str(lost))
        slurm.wait_job(lost, "PENDING")
    if case == "sbatch is forbidden":
        (tmp_path / "sbatch").write_text("#!/bin/bash\necho 'sbatch: error: Access/permission denied' >&2\nexit 1\n")
        (tmp_path / "sbatch").chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    node.clear(plan)
    if case:
        assert slurm.wait_job(lost, "PENDING")["Restarts"] == "1"
    else:
        slurm.wait_job(lost, "CANCELLED")
    (goes_on,) = slurm.jobs()
    assert (goes_on == lost) == bool(case)
    slurm.run("scancel", str(goes_on))


def test_a_node_with_a_broken_disk_is_excluded(run: Callable[..., Run]) -> None:
    """Slurm finds nothing wrong with it. Its workers fail twice, and the next submission goes without it."""
    steps = 30
    hit = run(steps, setup=['if [ "$HOSTNAME" = node2 ]; then export COUNTED_DISK=/dev/full; fi'])
    hit.launch("--detach")
    hit.wait("the submission without it", lambda: bool(hit.events("requeued")))
    (excluded,) = hit.events("nodes_excluded")
    assert excluded["nodes"] == ["node2"]
    hit.wait_step(1)
    found = status(hit)
    assert "without node2, which failed 2 times: node 1 failed 2 times in a row" in found["reason"]
    assert "No space left on device" in found["reason"]
    assert "node2" not in nodes_of(hit)
    hit.wait_done()
    assert len(hit.events("failure")) == 2
    assert [number for number, *_ in hit.numbers()] == list(range(1, steps + 1))
