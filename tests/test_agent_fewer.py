"""Real agents with a toy worker, on nodes that are lost for good: the job goes on with fewer, and who comes back late
does no harm."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fragile
import psutil
import pytest
from toyjob import FOREVER, ToyJob, start_job

from dtrain.runtime.control import find_coordinator

pytestmark = pytest.mark.e2e

ASSETS = str(Path(__file__).parent / "assets")
Make = Callable[..., ToyJob]


@pytest.fixture
def launch(tmp_path: Path) -> Iterator[Make]:
    jobs: list[ToyJob] = []

    def start(script: dict[str, Any], **changes: Any) -> ToyJob:
        changes = {"backend": fragile.NAME, "procs_per_node": 1, **changes}
        jobs.append(start_job(tmp_path, script, backend_class=fragile.FragileBackend, **changes))
        return jobs[-1]

    yield start
    for job in jobs:
        job.backend.kill(job.plan)


def lose(job: ToyJob, *nodes: int, by: signal.Signals = signal.SIGKILL) -> None:
    for node in nodes:
        (job.run.path / f"dead-{node}").touch()
    for process in [process for node in nodes for process in job.session(node)]:
        with contextlib.suppress(psutil.NoSuchProcess):  # an agent takes its workers along
            process.send_signal(by)


def teams(job: ToyJob) -> list[list[int]]:
    return [event["node_ranks"] for event in job.events("attempt_started")]


def test_a_job_goes_on_with_the_nodes_that_are_left(launch: Make) -> None:
    """Of four it can use 4, 2 or 1: what is left over stands by, its loss is no failure, and it steps in."""
    job = launch(FOREVER, nodes=4, fewer_nodes=(1, 2))
    job.until_training()
    lose(job, 3)
    job.until_training(attempt=2)
    status = job.status()
    assert (status["nodes"], status["nodes_asked"], status["world_size"]) == (2, 4, 2)
    assert [(worker["node"], worker["global_rank"]) for worker in status["workers"]] == [(0, 0), (1, 1)]
    assert "without node 3: node 3 can't be reached" in status["reason"]
    (event,) = job.events("node_left_out")
    assert (event["node"], event["nodes"], event["nodes_asked"], event["spare"]) == (3, 2, 4, 1)

    lose(job, 1)
    job.until_training(attempt=3)
    lose(job, 0)  # which coordinates
    job.until_training(attempt=4)
    assert teams(job) == [[0, 1, 2, 3], [0, 1], [0, 2], [2]]
    assert job.coordinator() == 2
    starts = [event["from"]["step"] for event in job.events("attempt_started")[1:]]
    assert starts == sorted(starts)
    job.backend.stop(job.plan)
    assert job.until_ended()["exit_code"] == 85


def test_a_spare_node_may_be_lost(launch: Make) -> None:
    job = launch(FOREVER, nodes=3, fewer_nodes=(1,))
    job.until_training()
    lose(job, 1)
    job.until_training(attempt=2)
    lose(job, 2)
    job.until(lambda: len(job.events("node_lost")) == 2, "the loss of the spare node")
    reached = job.status()["step"]
    job.until(lambda: job.status()["step"] > reached + 5, "further steps")
    assert teams(job) == [[0, 1, 2], [0]]
    job.backend.stop(job.plan)
    assert job.until_ended()["exit_code"] == 85


def test_a_node_that_was_left_out_and_wakes_up_ends(launch: Make) -> None:
    """It neither joins again nor takes the job over."""
    job = launch(FOREVER, nodes=2, fewer_nodes=(1,))
    job.until_training()
    address = find_coordinator(job.files)
    assert address is not None
    late = 1 - address.node_rank
    members = job.session(late)
    lose(job, late, by=signal.SIGSTOP)
    job.until_training(attempt=2)
    for process in members:
        process.send_signal(signal.SIGCONT)
    _, alive = psutil.wait_procs(members, timeout=60)
    assert not [process for process in alive if process.status() != psutil.STATUS_ZOMBIE]
    assert f"goes on without node {late}" in (job.run.path / "logs" / f"agent-{late}.log").read_text()
    assert find_coordinator(job.files) == address
    assert teams(job) == [[0, 1], [1 - late]]
    job.backend.stop(job.plan)
    assert job.until_ended()["exit_code"] == 85


def test_too_few_are_left(launch: Make) -> None:
    job = launch(FOREVER, nodes=2, why_not_fewer="shard 2 needs 2 ranks")
    job.until_training()
    lose(job, 1)
    ended = job.until_ended()
    assert ended["exit_code"] == 85
    assert ended["reason"] == ("node 1 can't be reached (shard 2 needs 2 ranks); the job is started anew without it")


def test_a_node_whose_workers_die_twice_is_done_without(launch: Make) -> None:
    faults = [{"attempt": attempt, "rank": 1, "step": 8, "do": "SIGBUS"} for attempt in (1, 2)]
    job = launch({**FOREVER, "faults": faults}, nodes=3, fewer_nodes=(1, 2))
    job.until_training(attempt=3)
    assert teams(job) == [[0, 1, 2], [0, 1, 2], [0, 2]]
    (event,) = job.events("node_left_out")
    assert event["reason"] == "node 1 failed 2 times in a row, the last time rank 1: killed by SIGBUS (signal 7)"
    # also where that coordinated
    job.until(lambda: all(p.status() == psutil.STATUS_ZOMBIE for p in job.session(1)), "the end of its agent")
    job.backend.stop(job.plan)
    assert job.until_ended()["exit_code"] == 85
