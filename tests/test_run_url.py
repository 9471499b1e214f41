"""Whole runs whose run directory is an s3:// URL, on nodes that share nothing else: the curve of a run in a folder,
whatever dies, and wherever the person asks from."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
from launched import CONFIG, DTRAIN, STEPS, Launched
from s3servers import S3Server, moto, rclone

from dtrain.cluster import exits
from dtrain.cluster.rundir import RunDir

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]

BUCKET = "dtrain-runs"


@pytest.fixture
def away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """The environment of another machine's client: nothing of the run is there."""
    for name in ("cache", "state"):
        monkeypatch.setenv(f"XDG_{name.upper()}_HOME", str(tmp_path / name))
    elsewhere = {"XDG_CACHE_HOME": str(tmp_path / "cache2"), "XDG_STATE_HOME": str(tmp_path / "state2")}
    return elsewhere


def asked(job: Launched, *words: str, environ: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    command = [DTRAIN, words[0], job.run.place, *words[1:]]
    variables = {**os.environ, **job.environ, **(environ or {})}
    return subprocess.run(command, capture_output=True, text=True, env=variables, timeout=120, check=False)


@contextlib.contextmanager
def launched(server: S3Server, directory: Path) -> Iterator[Launched]:
    config = directory / "cfg.json"
    config.write_text(json.dumps(CONFIG))
    server.make_bucket(BUCKET)
    with server.environment():
        job = Launched(run=RunDir(f"s3://{BUCKET}/runs/hurt"), config=config)
        try:
            yield job
        finally:
            asked(job, "cancel", "--grace", "5")


def test_whatever_dies_the_curve_is_that_of_a_run_in_a_folder(tmp_path: Path, away: dict[str, str]) -> None:
    """A worker, a node, the coordinator's node, the launching process; followed, stopped and continued elsewhere."""
    whole = Launched(run=RunDir(tmp_path / "whole"), config=tmp_path / "cfg.json")
    with moto() as server, launched(server, tmp_path) as hurt:
        assert whole.finish(f"checkpoint.url=file://{tmp_path}/checkpoints") == 0, whole.said
        process = hurt.launch()
        hurt.until_step(6)
        os.kill(hurt.worker(1), signal.SIGKILL)
        hurt.until(lambda: hurt.attempts() >= 2, "attempt 2 after the loss of a worker")
        hurt.until_step(11)
        os.kill(hurt.agent(1), signal.SIGKILL)
        hurt.until(lambda: hurt.attempts() >= 3, "attempt 3 after the loss of a node")
        hurt.until_step(16)
        process.kill()
        process.wait()
        os.kill(hurt.agent(0), signal.SIGKILL)
        hurt.until(lambda: hurt.attempts() >= 4, "attempt 4 after the loss of the coordinator's node")
        assert hurt.finish() == exits.USAGE  # a second launch, while the job is alive
        hurt.until_step(22)
        os.kill(hurt.agent(0), signal.SIGTERM)
        followed = asked(hurt, "attach", environ=away)
        assert followed.returncode == exits.STOPPED, followed
        status = json.loads(asked(hurt, "status", "--json", environ=away).stdout)
        assert (status["state"], status["run_dir"]) == ("stopped", hurt.run.place)
        code = subprocess.run(
            [DTRAIN, "launch", hurt.config, "--run-dir", hurt.run.place],
            env={**os.environ, **PATHS, **away},
            check=False,
        ).returncode
        assert code == 0
        hurt.until(lambda: hurt.steps() == STEPS, "the last step, seen from the first machine")
        assert hurt.curve() == whole.curve()
        steps = [event["step"] for event in hurt.events("checkpoint_committed")]
        assert steps[-1] == STEPS


PATHS = {"PYTHONPATH": str(Path(__file__).parent / "assets"), "OMP_NUM_THREADS": "1"}


def test_two_launches_are_one_job_and_it_is_cancelled(tmp_path: Path, away: dict[str, str]) -> None:
    """On a server that can't create only what is absent; what workers print is shown elsewhere, each line once."""
    objects = tmp_path / "objects"
    objects.mkdir()
    with rclone(objects) as server, launched(server, tmp_path) as job:
        words = ("--detach", "train.steps=100000")
        both = [job.launch(*words)]
        command = [DTRAIN, "launch", str(job.config), "--run-dir", job.run.place, *words]
        both.append(subprocess.Popen(command, env={**os.environ, **PATHS, **away}, stderr=subprocess.DEVNULL))
        codes = sorted(job.wait(process) for process in both)
        assert codes == [0, exits.USAGE], job.said
        job.until_step(8)
        assert len(job.events("submitted")) == 1
        done = asked(job, "cancel", environ=away)
        assert done.returncode == 0, done
        job.until(lambda: job.events("ended"), "the end")
        assert job.events("ended")[-1]["state"] == "cancelled"
        assert len(job.events("attempt_started")) == 1


def test_a_store_that_is_away_for_a_while_costs_nothing_but_time(tmp_path: Path, away: dict[str, str]) -> None:
    with moto() as server, launched(server, tmp_path) as job:
        process = job.launch()
        job.until_step(8)
        with server.away():
            time.sleep(20)
        assert job.wait(process) == 0, job.said
        assert job.attempts() == 1
        assert [step for step, _, _ in job.curve()] == list(range(1, STEPS + 1))


PRINTER = """
import os, time
for number in range(3000):
    print(f"rank {os.environ['RANK']} says {number}", flush=number % 10 == 0)
    time.sleep(0.001)
"""


def test_each_line_that_is_printed_is_shown_once_elsewhere(tmp_path: Path, away: dict[str, str]) -> None:
    with moto() as server, launched(server, tmp_path) as job:
        (tmp_path / "printer.py").write_text(PRINTER)
        job.config.write_text(json.dumps({"script": str(tmp_path / "printer.py"), "cluster": {"nodes": 2}}))
        assert job.finish("--detach") == 0, job.said
        followed = asked(job, "logs", "-f", environ=away)
        assert followed.returncode == 0, followed
        for shown in (followed.stdout, asked(job, "logs").stdout):
            for rank in range(2):
                said = re.findall(rf"rank {rank} says (\d+)", shown)
                assert said == [str(number) for number in range(3000)]
