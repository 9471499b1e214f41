"""Whole runs of scripts on 2 nodes: those that know nothing of dtrain, unchanged, with the numbers that torchrun gives;
and the example that asks for more, killed, stopped and launched again."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from dtrain.cluster.rundir import RunDir, read_json, read_jsonl

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]

REPO = Path(__file__).parent.parent
SCRIPTS = Path(__file__).parent / "assets" / "scripts"
DTRAIN = [sys.executable, "-m", "dtrain.launcher.cli"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--log-dir", "logs", "--nproc-per-node", "2"]


class Job:
    """One run directory, launched any number of times."""

    def __init__(self, folder: Path, script: str, *words: str) -> None:
        self.run = RunDir(folder / "run")
        self._config = folder / "cfg.yaml"
        self._config.write_text(json.dumps({"script": script, "cluster": {"nodes": 2}}))
        self._words = words
        self._output = folder / "launch.out"

    def launch(self) -> subprocess.Popen[bytes]:
        command: list[str | Path] = [*DTRAIN, "launch", "--run-dir", self.run.path, self._config, *self._words]
        with open(self._output, "ab") as output:
            return subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environ())

    @property
    def output(self) -> str:
        return self._output.read_text()

    def finish(self, process: subprocess.Popen[bytes], timeout_s: float = 300) -> int:
        try:
            return process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            pytest.fail(f"still running after {timeout_s} s\n{self.output}")

    def wait_for_step(self, step: int, process: subprocess.Popen[bytes]) -> None:
        deadline = time.monotonic() + 90
        while not any(record["step"] >= step for record in read_jsonl(self.run.metrics)):
            assert process.poll() is None, self.output
            assert time.monotonic() < deadline, self.output
            time.sleep(0.05)

    def events(self, kind: str) -> list[dict[str, Any]]:
        return [event for event in read_jsonl(self.run.events) if event["type"] == kind]

    def worker(self, global_rank: int) -> psutil.Process:
        job = json.loads(self.run.job.read_text())
        status = read_json(self.run.control(job["job_id"]).status) or {}
        (pid,) = (worker["pid"] for worker in status["workers"] if worker["global_rank"] == global_rank)
        return psutil.Process(pid)


def environ() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1"}


@pytest.fixture
def jobs(tmp_path: Path) -> Iterator[list[Job]]:
    """Those that a test starts; what still goes on at its end is cancelled."""
    made: list[Job] = []
    yield made
    for job in made:
        if job.run.job.exists():
            subprocess.run([*DTRAIN, "cancel", job.run.path], capture_output=True, timeout=60, check=False)


def torchrun(script: Path, *args: str | Path) -> str:
    found = subprocess.run(
        [*TORCHRUN, script, *args], capture_output=True, text=True, env=environ(), timeout=300, check=False
    )
    assert found.returncode == 0, found.stderr[-3000:]
    return found.stdout


@pytest.mark.parametrize(
    ("name", "on_two_nodes"),
    [("ddp_by_hand", ""), ("with_accelerate", ""), ("with_lightning", "--nodes 2 --devices 1")],
)
def test_scripts_run_unchanged(name: str, on_two_nodes: str, tmp_path: Path, jobs: list[Job]) -> None:
    """Lightning wants to be told the number of nodes, by whoever launches it."""
    script = SCRIPTS / f"{name}.py"
    jobs.append(job := Job(tmp_path, f"{script} --out {tmp_path}/ours.json {on_two_nodes}"))
    assert job.finish(job.launch()) == 0, job.output
    torchrun(script, "--out", tmp_path / "theirs.json")
    ours, theirs = (json.loads((tmp_path / f"{who}.json").read_text()) for who in ("ours", "theirs"))
    assert len(ours) == 6
    assert ours == theirs
    assert "workers started plainly" in job.output
    assert "done\n" in job.output


def test_killed_stopped_and_launched_again_it_goes_on(tmp_path: Path, jobs: list[Job]) -> None:
    """The example: a killed worker costs the steps since its last checkpoint, a stop none, and the losses are those of
    torchrun, where nothing happened to it."""
    example = REPO / "examples" / "torchrun_script.py"
    args = ("--steps", "700", "--save-every", "50")
    jobs.append(job := Job(tmp_path, f"{example} {' '.join(args)}"))

    process = job.launch()
    job.wait_for_step(120, process)
    job.worker(1).kill()
    job.wait_for_step(200, process)
    process.send_signal(signal.SIGINT)  # the first Ctrl-C: SIGTERM to every worker
    assert job.finish(process) == 85, job.output
    stopped_at = json.loads((job.run.control(json.loads(job.run.job.read_text())["job_id"]).ended).read_text())["step"]
    (failure,) = job.events("failure")
    assert (failure["kind"], failure["global_rank"], failure["phase"]) == ("signal", 1, "script")

    assert job.finish(job.launch()) == 0, job.output
    starts = [event["from"] and event["from"]["step"] for event in job.events("attempt_started")]
    assert starts[0] is None
    assert starts[1] >= 100
    assert starts[1] % 50 == 0
    assert starts[2] == stopped_at > starts[1]
    records = list(read_jsonl(job.run.metrics))
    assert [record["step"] for record in records] == list(range(1, 701))
    assert {record["attempt"] for record in records} == {1, 2, 3}

    lines = [line.split() for line in torchrun(example, *args).splitlines() if line.startswith("step ")]
    assert [f"{record['loss']:.6g}" for record in records] == [words[3] for words in lines]
    assert job.finish(job.launch()) == 0
    assert "done already: the script ended with 0" in job.output


def test_a_script_that_fails_the_same_way_twice_is_not_tried_again(tmp_path: Path, jobs: list[Job]) -> None:
    (tmp_path / "train.py").write_text(
        "import os, time\n"
        "def train():\n"
        "    print('attempt', os.environ['TORCHELASTIC_RESTART_COUNT'])\n"
        "    if os.environ['RANK'] == '1':\n"
        "        raise KeyError('no such column: price')\n"
        "    time.sleep(60)\n"
        "train()\n"
    )
    jobs.append(job := Job(tmp_path, "train.py"))
    assert job.finish(job.launch()) == 93, job.output
    failure = read_json(job.run.failure)
    assert failure is not None
    assert failure["message"] == "KeyError: 'no such column: price'"
    assert (failure["global_rank"], failure["attempt"], failure["collateral"]) == (1, 2, [0])
    assert failure["where"] == f"{tmp_path}/train.py:5"
    assert "the same exception twice" in job.events("ended")[0]["reason"]
    assert "train.py:5" in job.output


def test_zero_after_a_stop_is_no_end(tmp_path: Path, jobs: list[Job]) -> None:
    """A script that ends well because it was told to stop may not have finished: the next launch runs it again."""
    (tmp_path / "train.py").write_text(
        "import pathlib, signal, sys, time\n"
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))\n"
        "if pathlib.Path('finished').exists():\n"
        "    sys.exit(0)\n"
        "print('working', flush=True)\n"
        "time.sleep(60)\n"
    )
    jobs.append(job := Job(tmp_path, "train.py"))
    process = job.launch()
    deadline = time.monotonic() + 60
    while "working" not in job.output:
        assert time.monotonic() < deadline, job.output
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    assert job.finish(process) == 85, job.output
    (tmp_path / "finished").touch()
    assert job.finish(job.launch()) == 0, job.output
