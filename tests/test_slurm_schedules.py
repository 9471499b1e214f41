"""100 random schedules against a real Slurm: clients killed at any moment, commands of Slurm that fail, hang or lose
their answers, slurmctld stopped and hung, two launches at once, run directories used again, cancels in between. Some of
them drive whole command lines, `dtrain launch cfg.yaml` and the like, the others what these ask and write. When things
calm down no Slurm job is without its run, none is doubled, and no run was ever taken for gone while it lived.
"""

from __future__ import annotations

import json
import os
import random
import re
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from clients import Client, Clients, failures_of
from slurmfaults import FAULTS, write_sleeper, write_wrappers

from dtrain.slurm.records import JobRecord, parse_scontrol

if TYPE_CHECKING:
    from slurmcluster import SlurmCluster

ASSETS = Path(__file__).parent / "assets"
SCHEDULES = int(os.environ.get("DTRAIN_SLURM_SCHEDULES", "100"))
SEED = int(os.environ.get("DTRAIN_SLURM_SEED", "0")) or random.SystemRandom().randrange(1, 1 << 30)
AT_ONCE = 20
WHOLE = 10  # every so many-th schedule drives whole command lines
JOB_S = 900.0  # longer than the test: a job that ends by itself proves nothing
OVER = ("failed", "stopped", "cancelled", "done")


@dataclass
class Schedule:
    number: int
    seed: int
    run_dir: Path
    python: str
    config: Path  # of a run whose job only sleeps
    wrappers: Path
    clients: Clients
    log: list[str] = field(default_factory=list)
    said_over: dict[str, str] = field(default_factory=dict)  # job id -> the state in which it was first called over

    @property
    def is_whole(self) -> bool:
        return self.number % WHOLE == 0

    def play(self) -> None:
        rng = random.Random(self.seed)
        for _ in range(rng.randint(2, 4)):
            action = rng.choices(("launch", "kill", "twice", "cancel", "status"), (3, 5, 2, 1, 2))[0]
            if action == "launch":
                self._wait(self._launch(rng))
            elif action == "kill":
                self._kill(rng, self._launch(rng))
            elif action == "twice":
                first, second = self._launch(rng), self._launch(rng)
                self._kill(rng, first) if rng.random() < 0.5 else self._wait(first)
                self._wait(second)
            elif action == "cancel":
                self._wait(self._start(rng, "cancel", faulty=rng.random() < 0.5))
            else:
                self.look(rng, faulty=True)

    def look(self, rng: random.Random, *, faulty: bool) -> dict[str, object]:
        said = self._wait(self._start(rng, "status", faulty=faulty))
        found = re.search(r"^{.*}$", said, re.MULTILINE)
        status = json.loads(found[0]) if found else {}
        if status.get("state") in OVER:
            self.said_over.setdefault(str(status["job_id"]), f"{status['state']}: {status['reason']}")
        return dict(status)

    def launch_in_calm(self) -> None:
        """So that Slurm has accepted a job of whole command lines at least once, whatever the storm did."""
        self._wait(self._start(random.Random(0), "launch", faulty=False))

    def settle(self) -> dict[str, object]:
        """The state after the storm, when Slurm answers and nothing is on its way any more."""
        deadline = time.monotonic() + 40
        while True:
            status = self.look(random.Random(0), faulty=False)
            if status.get("state") != "unknown" and "being submitted" not in str(status.get("reason")):
                return status
            assert time.monotonic() < deadline, f"schedule {self.number} does not settle: {status}"
            time.sleep(0.5)

    def _launch(self, rng: random.Random) -> Client:
        return self._start(rng, "launch", faulty=rng.random() < 0.7)

    def _start(self, rng: random.Random, action: str, *, faulty: bool) -> Client:
        environ = {}
        if faulty:
            for command in ("SBATCH", "SQUEUE", "SCONTROL", "SCANCEL"):
                if rng.random() < (0.6 if command == "SBATCH" else 0.3):
                    environ[f"FAULT_{command}"] = rng.choice(FAULTS)
        faults = " ".join(f"{key}={value}" for key, value in environ.items())
        self.log.append(f"{time.strftime('%H:%M:%S')} {action} {faults}")
        environ["PATH"] = f"{self.wrappers}:{os.environ['PATH']}" if environ else os.environ["PATH"]
        words = self._command_line(action) if self.is_whole else (action, str(self.run_dir), self.python)
        return self.clients.start(words, environ, whole=self.is_whole)

    def _command_line(self, action: str) -> tuple[str, ...]:
        if action == "launch":
            return ("launch", "--detach", "--run-dir", str(self.run_dir), str(self.config))
        return (action, {"status": "--json", "cancel": "--grace=20"}[action], str(self.run_dir))

    def _kill(self, rng: random.Random, client: Client) -> None:
        time.sleep(rng.uniform(0.0, rng.choice((2.0, 4.0, 8.0) if self.is_whole else (0.15, 0.5, 2.0))))
        client.kill()
        self.log.append("  killed")
        self._wait(client)

    def _wait(self, client: Client) -> str:
        said = client.wait()
        self.log.append(f"  {time.strftime('%H:%M:%S')} {said[-500:]}")
        return said


def _judge(schedule: Schedule, status: dict[str, object], jobs: list[JobRecord]) -> list[str]:
    """What is wrong with the end of a schedule."""
    mine = [job for job in jobs if job.command.startswith(f"{schedule.run_dir}/control/")]
    alive = [job for job in mine if job.phase in ("pending", "running")]
    state, job_id = status.get("state", "nothing"), str(status.get("job_id"))
    wrong = []
    if doubled := [command for command, count in Counter(job.command for job in mine).items() if count > 1]:
        wrong.append(f"submitted twice: {doubled}")
    if len(alive) > 1:
        wrong.append(f"{len(alive)} Slurm jobs live: {[(job.job_id, job.command) for job in alive]}")
    if orphans := [job.command for job in alive if Path(job.command).parent.name != job_id]:
        wrong.append(f"without a run: {orphans}, the run's job is {job_id}")
    if alive and state not in ("pending", "running"):
        wrong.append(f"called {state} ({status.get('reason')}), but {alive[0].job_id} is {alive[0].state}")
    if not alive and state in ("pending", "running"):
        wrong.append(f"called {state} ({status.get('reason')}), but no Slurm job lives")
    if false := [(job, schedule.said_over[job]) for job in schedule.said_over if _lives(job, alive)]:
        wrong.append(f"called over, and lives: {false}")
    return wrong


def _lives(job_id: str, alive: list[JobRecord]) -> bool:
    return any(Path(job.command).parent.name == job_id for job in alive)


def _storm(slurm: SlurmCluster, rng: random.Random, calm: threading.Event) -> None:
    while not calm.wait(rng.uniform(3, 8)):
        rng.choice((slurm.stop_controller, slurm.hang_controller))()
        calm.wait(rng.uniform(0.5, 4))
        slurm.start_controller()


def write_config(folder: Path, python: str) -> Path:
    folder.mkdir()
    (folder / "train.py").write_text("print(1)\n")
    (folder / "cfg.yaml").write_text(f"script: train.py\ncluster: {{backend: slurm, python: {python}}}\n")
    return folder / "cfg.yaml"


@pytest.fixture
def schedules(slurm: SlurmCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Schedule]]:
    for name, value in slurm.environ().items():
        monkeypatch.setenv(name, value)
    python = write_sleeper(tmp_path / "sleeper", JOB_S)
    config = write_config(tmp_path / "whole", python)
    wrappers = write_wrappers(tmp_path / "faults")
    clients = Clients(tmp_path)
    # Every fifth takes the directory, and the name, of the one five before it.
    places = [number - 5 if number % 5 == 4 and number > 5 else number for number in range(SCHEDULES)]
    yield [
        Schedule(number, SEED + number, tmp_path / f"run-{place}", python, config, wrappers, clients)
        for number, place in enumerate(places)
    ]
    clients.close()
    while left := slurm.jobs():
        slurm.run("scancel", *map(str, left), check=False)
        time.sleep(0.5)


@pytest.mark.e2e
def test_no_schedule_loses_or_doubles_a_job(
    slurm: SlurmCluster, schedules: list[Schedule], capsys: pytest.CaptureFixture[str]
) -> None:
    with capsys.disabled():
        print(f"\nseed {SEED} (DTRAIN_SLURM_SEED repeats it, DTRAIN_SLURM_SCHEDULES={SCHEDULES})")
    calm = threading.Event()
    storm = threading.Thread(target=_storm, args=(slurm, random.Random(SEED), calm))
    storm.start()
    began_at = time.monotonic()
    try:
        with ThreadPoolExecutor(AT_ONCE) as pool:
            list(pool.map(Schedule.play, schedules))
    finally:
        calm.set()
        storm.join()
    slurm.start_controller()
    played_s = time.monotonic() - began_at
    schedules[0].launch_in_calm()
    with ThreadPoolExecutor(4) as pool:
        ends = list(pool.map(Schedule.settle, schedules))
    time.sleep(1.0)  # what was cancelled on sight is gone
    jobs = parse_scontrol(slurm.run("scontrol", "-o", "show", "job").stdout)
    judged = [_judge(schedule, end, jobs) for schedule, end in zip(schedules, ends, strict=True)]
    failures = failures_of(schedules, judged)
    with capsys.disabled():
        accepted = {job.command.partition("/control/")[0] for job in jobs if "/control/" in job.command}
        by_command_line = {str(schedule.run_dir) for schedule in schedules if schedule.is_whole} & accepted
        print(
            f"{len(schedules)} schedules in {played_s:.0f} s, jobs in {len(accepted)} run directories, "
            f"{len(by_command_line)} of whole command lines; {len(failures)} schedules wrong"
        )
    assert not failures, "\n".join(failures)
    assert by_command_line, "\n".join(schedules[0].log)
