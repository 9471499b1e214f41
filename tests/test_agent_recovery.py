"""Real agents with a toy worker: what dies, who notices, what goes on, and that nothing is left behind."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
from toyjob import FOREVER, ToyJob, start_job

from dtrain.cluster.rundir import read_json
from dtrain.runtime import control

pytestmark = pytest.mark.e2e

Make = Callable[..., ToyJob]


@pytest.fixture
def launch(tmp_path: Path) -> Iterator[Make]:
    """launch(script, nodes=2, workers="warm") starts a job; whatever still runs at the end is killed."""
    jobs: list[ToyJob] = []

    def start(script: dict[str, Any], **changes: Any) -> ToyJob:
        jobs.append(start_job(tmp_path, script, **changes))
        return jobs[-1]

    yield start
    for job in jobs:
        job.backend.kill(job.plan)


def script(**changes: Any) -> dict[str, Any]:
    return {"steps": 20, "step_s": 0.01, "commit_every": 5, **changes}


def test_a_job_that_meets_no_trouble(launch: Make) -> None:
    job = launch(script())
    ended = job.until_ended()
    assert (ended["state"], ended["exit_code"], ended["step"]) == ("done", 0, 20)
    assert len(job.events("attempt_started")) == 1
    assert job.events("workers_started")[0]["warm"] is True
    status = read_json(job.files.status)
    assert status is not None
    assert (status["state"], status["step"], status["checkpoint"], status["world_size"]) == ("done", 20, 20, 4)
    assert "[3 " in job.run.log(1, 1).read_text()


@pytest.mark.parametrize("workers", ["warm", "exec"])
def test_a_killed_worker_costs_one_attempt(launch: Make, workers: str) -> None:
    job = launch(script(faults=[{"attempt": 1, "rank": 3, "step": 12, "do": "SIGKILL"}]), workers=workers)
    assert job.until_ended()["state"] == "done"
    started = job.events("attempt_started")
    assert [event["attempt"] for event in started] == [1, 2]
    assert started[1]["from"] == {"step": 10, "attempt": 1}
    assert [event["warm"] for event in job.events("workers_started")] == [workers == "warm"] * 2
    failure = read_json(job.run.failure)
    assert failure is not None
    assert (failure["kind"], failure["global_rank"], failure["node"], failure["step"]) == ("signal", 3, 1, 12)
    assert failure["collateral"] == [0, 1, 2]
    assert "SIGKILL" in failure["message"]
    assert not job.events("node_lost")


def test_an_exception_is_shown_with_its_traceback(launch: Make) -> None:
    job = launch(script(faults=[{"attempt": 1, "rank": 2, "step": 3, "do": "raise"}]))
    assert job.until_ended()["state"] == "done"
    failure = job.events("failure")[0]
    assert (failure["kind"], failure["global_rank"], failure["phase"]) == ("exception", 2, "forward")
    assert failure["message"].startswith("ValueError: bad sample")
    assert "toyworker.py:" in failure["where"]
    assert any("in _fail" in line for line in failure["evidence"])
    assert "Traceback" in job.run.log(1, 1).read_text()


def test_victims_are_not_blamed(launch: Make) -> None:
    faults = [{"attempt": 1, "rank": 0, "step": 6, "do": "victim"}, {"attempt": 1, "rank": 3, "step": 6, "do": "exit"}]
    job = launch(script(faults=faults))
    job.until_ended()
    failure = job.events("failure")[0]
    assert (failure["global_rank"], failure["kind"], failure["evidence"]) == (3, "exit", ["last words"])


def test_the_same_exception_twice_ends_with_93(launch: Make) -> None:
    job = launch(script(faults=[{"rank": 1, "step": 7, "do": "raise"}]))
    ended = job.until_ended()
    assert (ended["state"], ended["exit_code"]) == ("failed", 93)
    assert len(job.events("attempt_started")) == 2
    assert "twice at step 7" in ended["reason"]


def test_a_failure_that_would_come_again_is_not_tried_again(launch: Make) -> None:
    ended = (job := launch(script(faults=[{"rank": 1, "step": 1, "do": "usage"}]))).until_ended()
    assert (ended["exit_code"], len(job.events("attempt_started"))) == (93, 1)


def test_restarts_without_progress_are_bounded(launch: Make) -> None:
    job = launch(script(faults=[{"rank": 1, "step": 2, "do": "SIGSEGV"}]), max_restarts_without_progress=2)
    ended = job.until_ended()
    assert (ended["state"], ended["exit_code"]) == ("failed", 1)
    assert len(job.events("attempt_started")) == 4  # the first one made progress: it reached step 2


def test_a_damaged_checkpoint_is_passed_over(launch: Make) -> None:
    faults = [
        {"attempt": 1, "rank": 1, "step": 12, "do": "SIGKILL"},
        {"attempt": 2, "rank": 0, "step": 11, "do": "corrupt"},
    ]
    job = launch(script(faults=faults), max_restarts_without_progress=0)
    assert job.until_ended()["state"] == "done"
    assert job.events("attempt_started")[2]["from"] == {"step": 5, "attempt": 1}
    passed = job.events("checkpoint_passed_over")
    assert [(event["step"], event["attempt"]) for event in passed] == [(10, 1)]


def test_stop_saves_and_ends_with_85_and_a_new_job_goes_on(launch: Make) -> None:
    job = launch({**FOREVER, "commit_every": 100_000})
    job.until(lambda: job.events("workers_started"), "workers")
    job.until(lambda: job.status()["step"] > 3, "some steps")
    job.backend.stop(job.plan)
    ended = job.until_ended()
    assert (ended["state"], ended["exit_code"]) == ("stopped", 85)
    committed = job.events("checkpoint_committed")
    assert [event["step"] for event in committed] == [ended["step"]]
    assert not job.events("failure")


def test_cancel_ends_with_3(launch: Make) -> None:
    job = launch(FOREVER)
    job.until_training()
    job.files.cancel.touch()
    job.backend.stop(job.plan)
    ended = job.until_ended()
    assert (ended["state"], ended["exit_code"]) == ("cancelled", 3)


@pytest.mark.parametrize("when", ["at once", "when a node has joined"])
def test_stop_before_any_worker_runs(launch: Make, when: str) -> None:
    job = launch(FOREVER)
    if when != "at once":
        job.until(lambda: job.events("node_joined"), "a node")
    job.backend.stop(job.plan)
    assert job.until_ended()["exit_code"] == 85


@pytest.mark.parametrize("workers", ["warm", "exec"])
def test_stop_while_the_workers_start(launch: Make, workers: str) -> None:
    job = launch({**FOREVER, "start_s": 0.3}, workers=workers)
    job.until(lambda: list(job.run.path.glob("logs/a0001/*")), "the first worker")
    job.backend.stop(job.plan)
    ended = job.until_ended()
    assert (ended["exit_code"], ended["reason"]) == (85, "stopped on request")


def test_the_killed_launching_process_is_not_missed(launch: Make, tmp_path: Path) -> None:
    job = launch(script(), submit=False)
    text = "import sys, time; from pathlib import Path; from dtrain.cluster.jobplan import JobPlan; import json\n"
    text += "from dtrain.cluster.local import LocalBackend\n"
    text += "plan = JobPlan.from_json(json.loads(Path('job.json').read_text()))\n"
    text += "LocalBackend(agent_args=tuple(sys.argv[1:])).submit(plan); print('submitted', flush=True); time.sleep(600)"
    argv = [sys.executable, "-c", text, *job.backend.agent_args]
    with subprocess.Popen(argv, cwd=tmp_path, stdout=subprocess.PIPE) as launcher:
        assert launcher.stdout is not None
        launcher.stdout.readline()
        launcher.kill()
    assert job.until_ended()["state"] == "done"


def test_workers_that_do_not_stop_are_killed(launch: Make) -> None:
    job = launch({**FOREVER, "faults": [{"rank": 2, "step": 20, "do": "deaf"}]}, timings={"stop_s": 0.5})
    job.until_training()
    time.sleep(0.5)
    job.backend.stop(job.plan)
    assert job.until_ended()["exit_code"] == 85


@pytest.mark.parametrize("victim", ["node 1", "coordinator"])
def test_a_killed_agent_takes_its_node_along_and_is_replaced(launch: Make, victim: str) -> None:
    job = launch(FOREVER, nodes=3, procs_per_node=1)
    job.until_training()
    coordinator = job.coordinator()
    node = coordinator if victim == "coordinator" else next(n for n in (1, 2) if n != coordinator)
    members = job.session(node)
    assert len(members) == 3  # agent, warm parent, worker
    killed = job.agent(node)
    for process in members:
        if process.pid != killed.pid:
            process.suspend()  # so that nobody but the kernel can end them
    os.kill(killed.pid, signal.SIGKILL)
    _, alive = psutil.wait_procs(members, timeout=60)
    assert not [process for process in alive if process.status() != psutil.STATUS_ZOMBIE]
    job.until_training(attempt=2)
    failure = job.events("failure")[-1]
    assert (failure["kind"], failure["node"], failure["global_rank"]) == ("node_lost", node, None)
    assert job.agent(node) != killed
    assert len(job.events("attempt_started")) == 2
    job.backend.stop(job.plan)
    assert job.until_ended()["exit_code"] == 85


def test_every_node_killed_one_after_the_other(launch: Make) -> None:
    job = launch(FOREVER)
    for attempt, node in enumerate((0, 1, 0), start=1):
        job.until_training(attempt)
        os.kill(job.agent(node).pid, signal.SIGKILL)
    job.until_training(4)
    job.backend.stop(job.plan)
    assert job.until_ended()["exit_code"] == 85


@pytest.mark.parametrize("node", [0, 1])
def test_a_frozen_node_that_wakes_up_does_no_harm(launch: Make, node: int) -> None:
    job = launch(FOREVER)
    job.until_training()
    frozen, members = job.agent(node), job.session(node)
    for process in members:
        process.suspend()
    job.until_training(attempt=2)
    assert job.agent(node) != frozen
    for process in members:
        with contextlib.suppress(psutil.NoSuchProcess):  # the agent, first to wake up, ends the others
            process.resume()
    _, alive = psutil.wait_procs(members, timeout=60)
    assert not [process for process in alive if process.status() != psutil.STATUS_ZOMBIE]
    before = len(job.events("checkpoint_committed"))
    job.until(lambda: len(job.events("checkpoint_committed")) > before + 1, "further checkpoints")
    assert [event["attempt"] for event in job.events("attempt_started")] == [1, 2]
    job.backend.stop(job.plan)
    assert job.until_ended()["exit_code"] == 85


def test_a_frozen_node_is_gone_when_the_job_has_ended(launch: Make) -> None:
    job = launch(FOREVER)
    job.until_training()
    members = job.session(1)
    for process in members:
        process.suspend()
    job.until_training(attempt=2)
    job.backend.stop(job.plan)
    job.until_ended()
    _, alive = psutil.wait_procs(members, timeout=60)
    assert not [process for process in alive if process.status() != psutil.STATUS_ZOMBIE]


def test_what_a_worker_started_is_gone_with_it(launch: Make) -> None:
    job = launch({**FOREVER, "faults": [{"attempt": 1, "rank": 1, "step": 3, "do": "child"}]})
    job.until_training(attempt=2)
    child = int((job.run.path / "child").read_text())
    assert not psutil.pid_exists(child) or psutil.Process(child).status() == psutil.STATUS_ZOMBIE
    job.backend.stop(job.plan)
    job.until_ended()


@pytest.mark.parametrize("workers", ["warm", "exec"])
def test_many_restarts_leave_no_descriptors_and_no_processes(launch: Make, workers: str) -> None:
    # The second attempt lasts long enough to be looked at.
    steps = [6, *(500 + 6 * number for number in range(2, 8))]
    faults = [{"attempt": n, "rank": 1, "step": step, "do": "SIGKILL"} for n, step in enumerate(steps, start=1)]
    job = launch({**FOREVER, "step_s": 0.01, "faults": faults}, workers=workers)

    def use() -> list[tuple[int, int]]:
        """Of each node: its processes, and the descriptors of those that live on, agent and warm parent."""
        nodes = [job.session(node) for node in (0, 1)]
        lasting = [[p for p in each if p.name().startswith(("dtrain-node", "dtrain-warm"))] for each in nodes]
        return [(len(each), sum(p.num_fds() for p in last)) for each, last in zip(nodes, lasting, strict=True)]

    def steady() -> list[tuple[int, int]]:
        """The least of several looks: a status file or a log that is being written is open for a moment."""
        looks = []
        for _ in range(8):
            looks.append(use())
            time.sleep(0.02)
        return [min(look[node] for look in looks) for node in (0, 1)]

    job.until_training(attempt=2)
    before = steady()
    assert all(descriptors > 8 for _, descriptors in before)
    job.until_training(attempt=8)
    job.until(lambda: steady() == before, f"what the second attempt had, {before}")
    job.backend.stop(job.plan)
    assert job.until_ended()["exit_code"] == 85


def test_stacks_also_of_a_stopped_rank(launch: Make) -> None:
    job = launch({**FOREVER, "faults": [{"rank": 1, "step": 8, "do": "hang"}, {"rank": 2, "step": 8, "do": "SIGSTOP"}]})
    job.until_training()
    job.until(lambda: min((worker["step"] for worker in job.status()["workers"]), default=0) == 8, "step 8")
    stacks = control.request(job.plan.run_dir, "toy-1", "stack")["stacks"]
    assert set(stacks) == {"0", "1", "2", "3"}
    assert "in _meet" in stacks["0"]
    assert "in _fail" in stacks["1"]
    assert "no answer" in stacks["2"]
    assert "step 8" in stacks["2"]
    assert control.request(job.plan.run_dir, "toy-1", "stop") == {"stopping": True}
    assert job.until_ended()["exit_code"] == 85


def test_an_agent_of_an_earlier_job_ends(launch: Make) -> None:
    job = launch(FOREVER)
    job.until_training()
    late = replace(job.plan, job_id="toy-0")
    old = job.run.control("toy-0")
    old.path.mkdir(mode=0o700)
    job.backend.start_node(late, 1)
    log = job.run.path / "logs" / "agent-1.log"
    job.until(lambda: "started for toy-0" in log.read_text(), "the late agent's last words")
    assert job.backend.state(job.plan) == "alive"
    job.backend.stop(job.plan)
    assert job.until_ended()["exit_code"] == 85


@pytest.mark.parametrize("what", ["run directory", "control directory"])
def test_a_removed_run_takes_its_processes_along(launch: Make, tmp_path: Path, what: str) -> None:
    job = launch(FOREVER, run_dir=str(tmp_path / "run"))
    job.until_training()
    members = job.session(0) + job.session(1)
    logs = [open(path) for path in sorted(job.run.path.glob("logs/agent-*.log"))]  # noqa: SIM115
    shutil.rmtree(job.run.path if what == "run directory" else job.files.path, ignore_errors=True)
    _, alive = psutil.wait_procs(members, timeout=60)
    assert not [process for process in alive if process.status() != psutil.STATUS_ZOMBIE]
    for log in logs:
        assert "is gone" in log.read()
        log.close()
