"""Which run a person means, and what ls, status, logs and cancel say about run directories written by hand."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from dtrain.cluster.errors import UsageError
from dtrain.cluster.jobplan import JobPlan
from dtrain.cluster.procs import ProcessId
from dtrain.cluster.rundir import RunDir, read_json
from dtrain.launcher import cli, labels
from dtrain.launcher.commands.logs import LineParser, merge
from dtrain.launcher.runs import Job, read_job, resolve

STATUS_KEYS = [
    "name", "run_dir", "backend", "job_id", "state", "step", "steps", "attempt", "world_size", "nodes", "nodes_asked",
    "workers", "checkpoint", "reason", "seen_at",
]  # fmt: skip
WORKER = {"global_rank": 0, "local_rank": 0, "node": 0, "host": "h", "pid": 7, "step": 37, "phase": "backward"}


def make_run(path: Path, *, name: str = "toy", job_id: str = "local-1", submitted_at: float = 1000.0) -> Job:
    """A run directory whose job was submitted and whose nodes have left no mark."""
    run = RunDir(path)
    run.control(job_id).path.mkdir(parents=True)
    plan = JobPlan(
        name=name, run_dir=str(path), job_id=job_id, backend="local", nodes=2, procs_per_node=1, gpus_per_node=0,
        threads_per_proc=1, python=sys.executable, argv=("dtrain", "launch", "toy.yaml"), cwd=str(path.parent),
        sys_path=(), env={}, checkpoint_url=str(path / "checkpoints"), workers="warm", max_restarts_without_progress=3,
    )  # fmt: skip
    run.job.write_text(json.dumps({**plan.to_json(), "submitted_at": submitted_at, "steps": 100}))
    job = read_job(path)
    assert job is not None
    return job


def remember(job: Job) -> None:
    plan = job.plan
    labels.remember(labels.Label(name=plan.name, run_dir=plan.run_dir, job_id=plan.job_id, submitted_at=1.0))


def write_status(job: Job, **fields: Any) -> None:
    status = {
        "state": "running", "step": 37, "steps": 100, "attempt": 2, "world_size": 2, "nodes": 2, "workers": [WORKER],
        "checkpoint": 20, "reason": "", "seen_at": 2000.0, **fields,
    }  # fmt: skip
    job.control.status.write_text(json.dumps(status))


def write_ended(job: Job, state: str, exit_code: int, step: int = 40, reason: str = "") -> None:
    ended = {"state": state, "exit_code": exit_code, "reason": reason, "step": step, "at": 2001.0}
    job.control.ended.write_text(json.dumps(ended))


Agent = Callable[[Job, str], subprocess.Popen[str]]


@pytest.fixture
def start_agent() -> Iterator[Agent]:
    """Starts a real process as node 0 of a job; `body` is what it does, with `run` and `control` at hand."""
    started: list[subprocess.Popen[str]] = []

    def start(job: Job, body: str) -> subprocess.Popen[str]:
        head = (
            "import json, os, signal, sys, time\nfrom dtrain.cluster.rundir import *\n"
            f"run = RunDir({str(job.run.path)!r}); control = run.control({job.plan.job_id!r})\n"
        )
        # A session of its own, like an agent: a Ctrl-C at the terminal does not reach it.
        process = subprocess.Popen(
            [sys.executable, "-c", head + body], stdout=subprocess.PIPE, text=True, start_new_session=True
        )
        started.append(process)
        job.control.node(0).write_text(json.dumps(ProcessId.of(process.pid).to_json()))
        assert process.stdout is not None
        assert process.stdout.readline() == "up\n"
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()


IDLE = "print('up', flush=True); time.sleep(60)"
SAVES_ON_TERM = """
def end(*_):
    state, code = ("cancelled", 3) if control.cancel.exists() else ("stopped", 85)
    append_event(run, "stopping", reason="asked to")
    write_once(control.ended, json.dumps({"state": state, "exit_code": code, "reason": "", "step": 41, "at": 1.0}))
    sys.exit(code)
signal.signal(signal.SIGTERM, end)
print("up", flush=True)
time.sleep(60)
"""
DEAF = "signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True); time.sleep(60)"


class TestResolve:
    def test_by_directory_label_and_job_id_from_anywhere(self, tmp_path: Path) -> None:
        job = make_run(tmp_path / "somewhere" / "toy-dir")
        remember(job)
        elsewhere = tmp_path / "elsewhere"
        elsewhere.mkdir()
        for text in (str(job.run.path), "toy", "local-1"):
            found, remark = resolve(text, elsewhere)
            assert (found, remark) == (job, "") or (found.plan, remark) == (job.plan, "")
        assert resolve("toy-dir", tmp_path / "somewhere")[0].plan == job.plan

    def test_runs_nearby_are_found_without_a_registry(self, tmp_path: Path) -> None:
        job = make_run(tmp_path / "runs" / "toy")
        assert resolve("toy", tmp_path)[0].plan == job.plan

    def test_a_folder_of_runs_by_its_own_name(self, tmp_path: Path) -> None:
        job = make_run(tmp_path / "runs" / "renamed")
        assert resolve("renamed", tmp_path)[0].plan == job.plan

    def test_of_several_the_newest_and_says_so(self, tmp_path: Path) -> None:
        remember(make_run(tmp_path / "a", submitted_at=2000.0))
        remember(make_run(tmp_path / "b", job_id="local-2", submitted_at=1000.0))
        job, remark = resolve("toy", tmp_path)
        assert job.run.path == tmp_path / "a"
        assert str(tmp_path / "b") in remark

    def test_an_earlier_job_id_leads_to_its_run(self, tmp_path: Path) -> None:
        job = make_run(tmp_path / "runs" / "toy", job_id="local-2")
        job.run.control("local-1").path.mkdir()
        found, remark = resolve("local-1", tmp_path)
        assert found.plan == job.plan
        assert "local-2" in remark

    def test_near_names(self, tmp_path: Path) -> None:
        remember(make_run(tmp_path / "a", name="bytes-gpt"))
        with pytest.raises(UsageError, match=r"Similar: bytes-gpt\."):
            resolve("byte-gpt", tmp_path)
        with pytest.raises(UsageError, match=r"no run has this label.*Known labels: bytes-gpt\."):
            resolve("unlike", tmp_path)
        with pytest.raises(UsageError, match="no run has this label"):
            resolve("../..", tmp_path)

    def test_registry_lines_that_are_not_ours_and_lost_runs_are_passed_over(self, tmp_path: Path) -> None:
        job = make_run(tmp_path / "a")
        remember(job)
        (tmp_path / "runs" / "broken").mkdir(parents=True)
        (tmp_path / "runs" / "broken" / "job.json").write_text('{"name": 3')
        with open(labels.registry(), "a") as file:
            file.write('{"name": "gone", "run_dir": "/nowhere", "job_id": "x", "submitted_at": 5}\nno json\n{"a": 1}\n')
        assert resolve("toy", tmp_path)[0].plan == job.plan


def test_the_registry_is_where_state_belongs() -> None:
    assert labels.registry({"XDG_STATE_HOME": "/s", "HOME": "/h"}) == Path("/s/dtrain/runs.jsonl")
    assert labels.registry({"HOME": "/h"}) == Path("/h/.local/state/dtrain/runs.jsonl")


class TestStatus:
    def test_json_is_the_documented_object(
        self, tmp_path: Path, start_agent: Agent, capsys: pytest.CaptureFixture[str]
    ) -> None:
        job = make_run(tmp_path / "runs" / "toy")
        write_status(job)
        start_agent(job, IDLE)
        assert cli.main(["status", "toy", "--json"]) == 0
        status = json.loads(capsys.readouterr().out)
        assert list(status) == STATUS_KEYS
        assert (status["state"], status["step"], status["steps"], status["attempt"]) == ("running", 37, 100, 2)
        assert status["workers"] == [WORKER]
        assert status["checkpoint"] == 20

    def test_all_nodes_dead(self, tmp_path: Path, start_agent: Agent, capsys: pytest.CaptureFixture[str]) -> None:
        job = make_run(tmp_path / "runs" / "toy")
        write_status(job)
        agent = start_agent(job, IDLE)
        agent.kill()
        agent.wait()
        assert cli.main(["status", "toy", "--json"]) == 0
        status = json.loads(capsys.readouterr().out)
        assert (status["state"], status["step"], status["workers"]) == ("failed", 37, [])
        assert status["reason"].startswith("all nodes died")

    def test_a_job_of_another_host_is_unknown(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        job = make_run(tmp_path / "runs" / "toy")
        elsewhere = {"pid": 1, "started": 1, "boot": "b", "host": "another-host"}
        job.control.node(0).write_text(json.dumps(elsewhere))
        assert cli.main(["status", "toy"]) == 4
        assert "toy: unknown" in capsys.readouterr().out
        assert cli.main(["cancel", "toy"]) == 4
        assert not job.control.cancel.exists()

    def test_the_page(self, tmp_path: Path, start_agent: Agent, capsys: pytest.CaptureFixture[str]) -> None:
        job = make_run(tmp_path / "runs" / "toy")
        write_status(job, seen_at=time.time())
        start_agent(job, IDLE)
        failure = {
            "kind": "exception", "global_rank": 1, "node": 1, "attempt": 1, "step": 12, "phase": "forward",
            "message": "ValueError: x", "where": "m.py:3", "evidence": ["long"], "collateral": [0],
        }  # fmt: skip
        job.run.failure.write_text(json.dumps(failure))
        assert cli.main(["status", "toy"]) == 0
        page = capsys.readouterr().out
        assert page.startswith("toy: running (seen ")
        assert "step         37 of 100" in page
        assert "rank 0       node 0 (h, pid 7)  step 37  backward" in page
        assert "FAILURE: rank 1 on node 1, step 12, in forward: raised an exception" in page
        assert "long" not in page

    def test_unknown_run_is_a_usage_error(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert cli.main(["status", "nothing"]) == 2
        assert "dtrain ls" in capsys.readouterr().err


def test_ls(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["ls"]) == 0
    assert "No runs" in capsys.readouterr().out
    first, second = make_run(tmp_path / "runs" / "a"), make_run(tmp_path / "far" / "b", name="b", submitted_at=3000.0)
    remember(second)
    write_ended(first, "done", 0, step=100)
    write_ended(second, "stopped", 85)
    assert cli.main(["ls"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:3] for line in lines] == [
        ["RUN", "STATE", "STEP"],
        ["b", "stopped", "40/100"],
        ["toy", "done", "100/100"],
    ]
    assert cli.main(["ls", "--json"]) == 0
    assert [list(status) for status in json.loads(capsys.readouterr().out)] == [STATUS_KEYS, STATUS_KEYS]


class TestLogs:
    def write(self, job: Job, attempt: int, node: int, *lines: str) -> None:
        path = job.run.log(attempt, node)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(f"{line}\n" for line in lines))

    def test_nodes_are_merged_by_time(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        job = make_run(tmp_path / "runs" / "toy")
        self.write(job, 1, 0, "[0 10:00:00.000] old")
        self.write(job, 2, 0, "[0 10:00:01.000] a", "[0 10:00:03.500] c", "no tag")
        self.write(job, 2, 1, "[1 10:00:02.000] b", "[1 10:00:04.000] d")
        assert cli.main(["logs", "toy"]) == 0
        out = capsys.readouterr().out.splitlines()
        assert [line.split("] ")[-1] for line in out] == ["a", "b", "c", "no tag", "d"]
        assert cli.main(["logs", "toy", "--rank", "1"]) == 0
        assert capsys.readouterr().out.splitlines() == ["[1 10:00:02.000] b", "[1 10:00:04.000] d"]
        assert cli.main(["logs", "toy", "--attempt", "1"]) == 0
        assert capsys.readouterr().out == "[0 10:00:00.000] old\n"
        assert cli.main(["logs", "toy", "--rank", "5"]) == 0
        nothing = capsys.readouterr()
        assert nothing.out == ""
        assert nothing.err.startswith("toy: rank 5 has not printed anything in attempt 2\n")
        assert "metrics.jsonl" in nothing.err
        assert cli.main(["logs", "toy", "--attempt", "7"]) == 2
        assert "Attempts with one: 1, 2." in capsys.readouterr().err

    def test_midnight(self) -> None:
        before, after = "[date 2026-12-31 +0100]", "[date 2027-01-01 +0100]"
        files = [
            [before, "[0 23:59:59.000] a", after, "[0 00:00:01.000] d"],
            [before, "[1 23:59:59.500] b", after, "[1 00:00:02.000] e", "[1 23:00:00.000] f"],
            [after, "[2 00:00:00.500] c"],
        ]
        assert [line.text[-1] for line in merge(LineParser().parse(file) for file in files)] == list("abcdef")

    def test_hosts_in_two_time_zones(self) -> None:
        files = [["[date 2026-12-31 +0100]", "[0 10:00:00.000] b"], ["[date 2026-12-31 +0000]", "[1 08:59:59.000] a"]]
        assert [line.text[-1] for line in merge(LineParser().parse(file) for file in files)] == ["a", "b"]

    def test_nothing_yet(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        make_run(tmp_path / "runs" / "toy")
        assert cli.main(["logs", "toy"]) == 2
        assert "no worker has written anything yet" in capsys.readouterr().err

    def test_following_ends_with_the_run(
        self, tmp_path: Path, start_agent: Agent, capsys: pytest.CaptureFixture[str]
    ) -> None:
        job = make_run(tmp_path / "runs" / "toy")
        self.write(job, 1, 0, "[0 10:00:00.000] first")
        body = """
print("up", flush=True)
time.sleep(0.5)
with open(run.log(1, 0), "a") as file:
    file.write("[0 10:00:01.000] second\\n")
run.log(2, 0).parent.mkdir()
run.log(2, 0).write_text("[0 10:00:02.000] of the next attempt\\n")
write_once(control.ended, "{}")
"""
        start_agent(job, body)
        assert cli.main(["logs", "toy", "-f"]) == 0
        texts = [line.split("] ")[-1] for line in capsys.readouterr().out.splitlines()]
        assert texts == ["first", "second", "of the next attempt"]


class TestCancel:
    def test_marks_first_then_asks(
        self, tmp_path: Path, start_agent: Agent, capsys: pytest.CaptureFixture[str]
    ) -> None:
        job = make_run(tmp_path / "runs" / "toy")
        agent = start_agent(job, SAVES_ON_TERM)
        assert cli.main(["cancel", "toy"]) == 0
        assert agent.wait(timeout=60) == 3
        assert "toy: cancelled at step 41" in capsys.readouterr().out

    def test_kills_what_does_not_answer(
        self, tmp_path: Path, start_agent: Agent, capsys: pytest.CaptureFixture[str]
    ) -> None:
        job = make_run(tmp_path / "runs" / "toy")
        write_status(job)
        agent = start_agent(job, DEAF)
        assert cli.main(["cancel", "toy", "--grace", "0.5"]) == 0
        assert agent.wait(timeout=60) == -signal.SIGKILL
        ended = read_json(job.control.ended)
        assert ended is not None
        assert (ended["state"], ended["exit_code"], ended["step"]) == ("cancelled", 3, 37)
        assert "killed" in capsys.readouterr().out

    def test_what_is_over_stays_as_it_is(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        job = make_run(tmp_path / "runs" / "toy")
        write_ended(job, "done", 0)
        assert cli.main(["cancel", "toy"]) == 0
        assert "over already: done at step 40" in capsys.readouterr().out
        assert not job.control.cancel.exists()


def test_stack_of_a_run_that_is_over(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_ended(make_run(tmp_path / "runs" / "toy"), "done", 0)
    assert cli.main(["stack", "toy"]) == 2
    assert "toy is done" in capsys.readouterr().err
