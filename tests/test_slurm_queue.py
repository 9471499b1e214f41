"""What a login node knows of its Slurm jobs: submission, states in words, silence, requeues, cancelling, and how rarely
slurmctld is asked. On a real Slurm, with jobs that only sleep."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import slurmclient
from slurmfaults import write_sleeper, write_wrappers

from dtrain.cluster import exits
from dtrain.cluster.errors import UnclearError, UsageError
from dtrain.cluster.slurmconfig import SlurmConfig
from dtrain.launcher import follow as following
from dtrain.launcher.cli import main
from dtrain.launcher.follow import ASK_BACKEND_S, bookmark, follow, patience_s
from dtrain.launcher.runs import Job, read_job, resolve
from dtrain.launcher.screen import PlainScreen
from dtrain.launcher.state import read_status
from dtrain.launcher.submit import submit
from dtrain.slurm import client, queue, standing, submission
from dtrain.slurm.batch import BatchBackend
from dtrain.slurm.client import environment, is_no_answer, last_words, script_options
from dtrain.slurm.limits import over_limits, parse_partitions
from dtrain.slurm.owner import note_submission
from dtrain.slurm.queue import Snapshot, look
from dtrain.slurm.records import JobRecord
from dtrain.slurm.waiting import ending_words, waiting_words

if TYPE_CHECKING:
    from slurmcluster import SlurmCluster

Launch = Callable[..., Job]


# ---- pure ----


def test_the_environment_changes_nothing_that_the_script_says() -> None:
    given = {
        "PATH": "/bin", "SLURM_CONF": "/c", "SLURM_JOB_ID": "7", "SQUEUE_FORMAT": "%i", "SBATCH_PARTITION": "mine",
        "SBATCH_ACCOUNT": "mine", "SBATCH_WAIT": "1", "SBATCH_ARRAY_INX": "1-9", "SBATCH_NO_REQUEUE": "1",
        "SBATCH_TIMELIMIT": "1", "SBATCH_MEM_PER_CPU": "1G",
    }  # fmt: skip
    script = "#!/bin/bash\n#SBATCH --partition=main\n#SBATCH --requeue\n#SBATCH --time=5\n#SBATCH --mem=1G\necho\n"
    assert environment(given, script_options(script)) == {"PATH": "/bin", "SLURM_CONF": "/c", "SBATCH_ACCOUNT": "mine"}
    assert "SBATCH_PARTITION" in environment(given)


@pytest.mark.parametrize(
    ("words", "code", "open_end"),
    [
        ("sbatch: error: Batch job submission failed: Invalid partition name specified", 1, False),
        ("sbatch: error: Batch job submission failed: Unable to contact slurm controller (connect failure)", 1, True),
        ("sbatch: error: Batch job submission failed: Socket timed out on send/recv operation", 1, True),
        ("slurm_load_jobs error: Zero Bytes were transmitted or received", 1, True),
        ("slurm_load_jobs error: Invalid job id specified", 1, False),
        ("", 1, True),
        ("sbatch: error: killed", -9, True),
    ],
)
def test_no_answer_is_told_from_no(words: str, code: int, open_end: bool) -> None:
    assert is_no_answer(words, code) == open_end


def test_the_last_words_are_what_is_wrong() -> None:
    said = "sbatch: error: Memory specification can not be satisfied\nsbatch: error: Batch job submission failed: no\n"
    assert last_words(said) == "Memory specification can not be satisfied; Batch job submission failed: no"


@pytest.mark.parametrize(
    ("reason", "words"),
    [
        ("Resources", "Slurm job 7 waits for nodes: first in line (Resources), expected to start at "),
        ("PartitionNodeLimit", "Slurm job 7 never starts: it asks for more nodes than the partition gives"),
        ("JobHeldUser", "`scontrol release 7` lets it go"),
        ("QOSMaxJobsPerUserLimit", "a limit of your account or QOS is reached (QOSMaxJobsPerUserLimit)"),
        ("Nodes required for job are DOWN, DRAINED or reserved", "down, drained or reserved"),
        ("SomethingNew", "waits for SomethingNew"),
    ],
)
def test_reasons_in_words(reason: str, words: str) -> None:
    job = JobRecord(job_id=7, state="PENDING", reason=reason, starts_at=2000.0)
    assert words in waiting_words(job, now=1000.0)


def test_how_a_job_ended_in_words() -> None:
    assert "cluster.slurm.time" in ending_words(JobRecord(job_id=7, state="TIMEOUT"))
    assert "killed by signal 9" in ending_words(JobRecord(job_id=7, state="FAILED", exit_signal=9))
    assert "must lie on a disk that the nodes share" in ending_words(
        JobRecord(job_id=7, state="FAILED", exit_signal=53)
    )
    assert "ended with 2" in ending_words(JobRecord(job_id=7, state="FAILED", exit_code=2))


PARTITIONS = """\
PartitionName=main Default=YES MaxNodes=UNLIMITED MaxTime=UNLIMITED MinNodes=0 State=UP TotalNodes=4
PartitionName=short Default=NO MaxNodes=2 MaxTime=01:00:00 MinNodes=0 State=UP TotalNodes=4
"""


@pytest.mark.parametrize(
    ("nodes", "asked", "complaint"),
    [
        (4, {}, ""),
        (5, {}, "5 nodes, but partition main has 4"),
        (3, {"partition": "short"}, "3 nodes, but partition short gives a job 2 at most"),
        (3, {"partition": "short,main"}, ""),
        (2, {"partition": "short", "time": "2:00:00"}, "2:00:00, but partition short gives 01:00:00 at most"),
        (2, {"partition": "short", "time": "59"}, ""),
        (1, {"partition": "nope"}, "there is no nope. There are: main, short"),
    ],
)
def test_what_a_partition_does_not_give(tmp_path: Path, nodes: int, asked: dict[str, Any], complaint: str) -> None:
    plan = slurmclient.a_plan(tmp_path, "python", nodes=nodes, slurm=SlurmConfig(**asked))
    found = over_limits(plan, parse_partitions(PARTITIONS))
    assert complaint in found
    assert bool(complaint) == bool(found)


def test_silence_is_an_answer_for_a_while() -> None:
    told = Snapshot(asked_at=99.0, answered_at=100.0)
    assert told.is_fresh(max_age_s=10, after=98.0, now=109.0)
    assert not told.is_fresh(max_age_s=10, after=98.0, now=111.0)
    assert not told.is_fresh(max_age_s=10, after=99.5, now=109.0)  # what came after the question is not in the answer
    silent = replace(told, error="no", failed_at=120.0)
    assert silent.is_fresh(max_age_s=10, after=119.0, now=125.0)
    assert not Snapshot().is_fresh(max_age_s=float("inf"), after=0.0, now=100.0)


# ---- on a cluster ----


@pytest.fixture
def calls(slurm: SlurmCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], list[str]]:
    """The commands of Slurm that were called, by this process and its children; here one answers within seconds."""
    for name, value in slurm.environ().items():
        monkeypatch.setenv(name, value)
    log = tmp_path / "calls"
    monkeypatch.setenv("FAULT_LOG", str(log))
    monkeypatch.setenv("PATH", f"{write_wrappers(tmp_path / 'faults')}:{os.environ['PATH']}")
    monkeypatch.setattr(client, "QUESTION_S", 4.0)
    monkeypatch.setattr(submission, "SBATCH_S", 4.0)
    monkeypatch.setattr(standing, "SURE_S", 1.0)
    monkeypatch.setattr(queue, "COMMAND_AGE_S", 0.2)
    return lambda: [line.split()[1] for line in log.read_text().splitlines()] if log.exists() else []


@pytest.fixture
def launch(slurm: SlurmCluster, calls: object, tmp_path: Path) -> Iterator[Launch]:
    """Records a run and submits it; its job sleeps for `seconds`."""

    def do(name: str = "run", seconds: float = 60.0, **changes: Any) -> Job:
        python = write_sleeper(tmp_path / f"sleeper-{name}", seconds)
        job = slurmclient.record(slurmclient.a_plan(tmp_path / name, python, **changes))
        submit(job, None)
        return job

    yield do
    while left := slurm.jobs():
        slurm.run("scancel", *map(str, left), check=False)
        time.sleep(0.3)


def number_of(job: Job) -> int:
    return int(BatchBackend().called(job.plan).removeprefix("Slurm job "))


def state_of(job: Job) -> str:
    return str(read_status(job, look_for_checkpoint=False)["state"])


def wait_for(job: Job, state: str, timeout_s: float = 30.0) -> dict[str, Any]:
    deadline = time.monotonic() + timeout_s
    while (status := read_status(job, look_for_checkpoint=False))["state"] != state:
        assert time.monotonic() < deadline, f"not {state}: {status}"
        time.sleep(0.1)
    return status


def wait_for_script(job: Job) -> None:
    """Slurm calls a job RUNNING before its script has begun."""
    deadline = time.monotonic() + 60.0
    while not (job.run.path / "started").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.e2e
def test_what_slurm_refuses_is_said_in_its_words(launch: Launch, slurm: SlurmCluster) -> None:
    with pytest.raises(UsageError, match="Memory specification can not be satisfied"):
        launch(slurm=SlurmConfig(mem="999G"))
    there = read_job(Path("run").absolute())
    assert there is not None
    status = read_status(there, look_for_checkpoint=False)
    assert (status["state"], "sbatch refused the job: Memory" in status["reason"]) == ("failed", True)
    assert slurm.jobs() == []
    assert state_of(launch()) == "pending"


@pytest.mark.e2e
def test_a_request_for_too_much_is_refused_before_anything_is_written(launch: Launch, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="5 nodes, but partition main has 4"):
        BatchBackend().check(slurmclient.a_plan(tmp_path / "run", "python", nodes=5))
    job = launch(nodes=5)  # without that look: accepted, and waits for ever
    assert "never starts" in wait_for(job, "pending")["reason"]


@pytest.mark.e2e
@pytest.mark.parametrize("fault", ["lost", "silent"])
def test_a_job_whose_number_was_lost_is_found(
    launch: Launch, slurm: SlurmCluster, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    monkeypatch.setenv("FAULT_SBATCH", fault)
    job = launch()
    assert [number_of(job)] == slurm.jobs()


@pytest.mark.e2e
def test_a_squeue_that_prints_nothing_has_not_said_that_there_are_no_jobs(
    launch: Launch, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = launch()
    time.sleep(0.3)
    with monkeypatch.context() as silent:
        silent.setenv("FAULT_SQUEUE", "silent")
        assert state_of(job) == "unknown"


@pytest.mark.e2e
def test_what_did_not_get_through_can_be_launched_again(
    launch: Launch, slurm: SlurmCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAULT_SBATCH", "fail")
    with pytest.raises(Exception, match="Slurm has not accepted the job") as caught:
        launch()
    assert not isinstance(caught.value, UnclearError)
    monkeypatch.delenv("FAULT_SBATCH")
    assert state_of(launch()) == "pending"
    assert len(slurm.jobs()) == 1


@pytest.mark.e2e
def test_a_request_that_arrives_after_it_was_given_up_ends_by_itself(
    launch: Launch, slurm: SlurmCluster, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("FAULT_SBATCH", "fail")
    with pytest.raises(Exception, match="Slurm has not accepted the job"):
        launch()
    script = next(tmp_path.glob("run/control/*/job.sbatch"))
    monkeypatch.delenv("FAULT_SBATCH")
    late = slurm.submit(str(script))
    assert slurm.wait_job(late, "FAILED")["ExitCode"] == "93:0"
    held = slurm.submit("--hold", str(script))
    assert state_of(launch()) == "pending"
    assert slurm.wait_job(held, "CANCELLED")  # whoever sees it, ends it


@pytest.mark.e2e
def test_while_sbatch_lives_the_run_is_being_submitted_whoever_started_it(
    launch: Launch, slurm: SlurmCluster, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    python = write_sleeper(tmp_path / "sleeper", 60)
    code = f"import slurmclient as c, pathlib; c.launch(pathlib.Path('run').absolute(), {python!r})"
    environ = {**os.environ, "PYTHONPATH": str(Path(slurmclient.__file__).parent), "FAULT_SBATCH": "late"}
    killed = subprocess.Popen([sys.executable, "-c", code], env=environ)
    while not list(tmp_path.glob("run/control/*/slurm-intent.json")):
        assert killed.poll() is None
        time.sleep(0.01)
    killed.kill()
    killed.wait()
    job = read_job(tmp_path / "run")
    assert job is not None
    assert read_status(job, look_for_checkpoint=False)["reason"] == "is being submitted"
    assert slurmclient.launch(job.run.path, python) == exits.USAGE
    deadline = time.monotonic() + 60
    while "submitted" in read_status(job, look_for_checkpoint=False)["reason"]:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert state_of(job) in ("pending", "running")
    assert [number_of(job)] == slurm.jobs()


@pytest.mark.e2e
@pytest.mark.parametrize("how", ["stop_controller", "hang_controller"])
def test_a_silent_slurmctld_is_unknown_and_never_gone(launch: Launch, slurm: SlurmCluster, how: str) -> None:
    job = launch()
    slurm.wait_job(number_of(job), "RUNNING")
    (job.control.status).write_text(json.dumps({"state": "running", "step": 5, "seen_at": time.time() - 180}))
    getattr(slurm, how)()
    time.sleep(0.3)
    status = read_status(job, look_for_checkpoint=False)
    assert status["state"] == "unknown"
    assert "slurmctld does not answer" in status["reason"]
    assert "last seen running" in status["reason"]
    assert slurmclient.launch(job.run.path, "python") == exits.USAGE
    assert main(["cancel", str(job.run.path)]) == exits.UNKNOWN
    assert main(["status", str(job.run.path)]) == exits.UNKNOWN
    assert not job.control.cancel.exists()
    slurm.start_controller()
    wait_for(job, "running")
    slurm.stop_controller()
    with pytest.raises(UnclearError):
        launch("other")
    other = read_job(Path("other").absolute())
    assert other is not None
    assert state_of(other) == "unknown"
    slurm.start_controller()
    assert wait_for(other, "failed")["reason"].startswith("was never submitted")


@pytest.mark.e2e
def test_a_job_of_another_script_is_not_ours(launch: Launch, slurm: SlurmCluster, tmp_path: Path) -> None:
    other = launch("other")
    ours = slurmclient.record(slurmclient.a_plan(tmp_path / "run", "python"))
    submission.script_path(ours.plan).write_text("")
    note_submission(ours.control, str(number_of(other)))  # as if Slurm had begun to count anew
    assert wait_for(ours, "failed")["reason"] == f"Slurm does not know job {number_of(other)} any more"
    assert state_of(other) in ("pending", "running")


@pytest.mark.e2e
def test_a_job_that_was_cancelled_by_hand_says_so(launch: Launch, slurm: SlurmCluster) -> None:
    job = launch()
    slurm.wait_job(number_of(job), "RUNNING")
    slurm.run("scancel", "--state=RUNNING", str(number_of(job)))
    status = wait_for(job, "cancelled")
    assert "was cancelled (scancel)" in status["reason"] or status["step"] == 1  # or it could say so itself
    assert slurmclient.launch(job.run.path, job.plan.python) == 0


@pytest.mark.e2e
def test_a_job_that_died_without_a_word_has_slurms(launch: Launch, slurm: SlurmCluster) -> None:
    job = launch()
    wait_for_script(job)
    slurm.run("scancel", "--signal=KILL", "--batch", str(number_of(job)))
    assert wait_for(job, "failed")["reason"].startswith(f"Slurm ended job {number_of(job)} (")
    assert follow(job, PlainScreen(None, io.StringIO()), bookmark(job.run)) == exits.STOPPED


@pytest.mark.e2e
@pytest.mark.parametrize("state", ["pending", "running", "requeued"])
def test_cancel_in_every_state(
    launch: Launch, slurm: SlurmCluster, state: str, capsys: pytest.CaptureFixture[str]
) -> None:
    job = launch(**({"nodes": 5} if state == "pending" else {}))
    if state != "pending":
        wait_for_script(job)
    if state == "requeued":
        slurm.run("scontrol", "requeue", str(number_of(job)))
        wait_for(job, "requeued")
        slurm.wait_job(number_of(job), "PENDING")
    assert main(["cancel", str(number_of(job))]) == exits.DONE
    assert "run: cancelled" in capsys.readouterr().out
    assert state_of(job) == "cancelled"
    assert slurm.jobs() == []
    assert main(["cancel", str(job.run.path)]) == exits.DONE
    assert "over already" in capsys.readouterr().out


@pytest.mark.e2e
def test_a_follower_goes_through_a_requeue_and_shortens_its_hold(
    launch: Launch, slurm: SlurmCluster, monkeypatch: pytest.MonkeyPatch, calls: Callable[[], list[str]]
) -> None:
    monkeypatch.setattr(following, "ASK_BACKEND_S", 0.5)
    job = launch(seconds=4.0)
    wait_for_script(job)
    since = bookmark(job.run)
    slurm.run("scontrol", "requeue", str(number_of(job)))
    screen = io.StringIO()
    assert follow(job, PlainScreen(None, screen), since) == exits.DONE
    assert "stopped, to be started again" in screen.getvalue()
    assert "waits for its start time" in screen.getvalue()
    assert [path.name for path in job.control.path.glob("slurm-hastened-*")] == ["slurm-hastened-0000"]
    assert len((job.run.path / "started").read_text().splitlines()) == 2


@pytest.mark.e2e
def test_a_run_by_its_slurm_number_from_anywhere(
    launch: Launch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = launch()
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    found, _ = resolve(str(number_of(job)), elsewhere)  # no label was written: Slurm tells the script's place
    assert found.plan == job.plan
    with pytest.raises(UsageError, match="99999: no run has this label"):
        resolve("99999", elsewhere)


# ---- how often slurmctld is asked ----


@pytest.mark.e2e
def test_ten_followers_ask_slurmctld_at_most_25_times_in_ten_minutes(
    launch: Launch, calls: Callable[[], list[str]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Real questions by the followers' own rule, on a clock that runs through the ten minutes in seconds. Each run
    waits first, then runs, as its files would tell."""
    monkeypatch.setattr(queue, "COMMAND_AGE_S", 2.0)
    launch()
    before = len(calls())
    clock = [time.time()]
    for tick in range(int(600 / ASK_BACKEND_S)):
        for follower in range(10):
            clock[0] += ASK_BACKEND_S / 10
            quiet_s = tick * ASK_BACKEND_S if tick < 30 + follower else float("inf")
            look(os.getuid(), max_age_s=patience_s(quiet_s), clock=lambda: clock[0])
    asked = len(calls()) - before
    with capsys.disabled():
        print(f"\nten followers in ten minutes: {asked} questions")
    assert 10 < asked <= 25


@pytest.mark.e2e
def test_those_who_ask_at_once_ask_once(
    launch: Launch, calls: Callable[[], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(queue, "COMMAND_AGE_S", 2.0)
    jobs = [launch(f"run-{number}") for number in range(10)]
    time.sleep(2.1)
    before = len(calls())
    with ThreadPoolExecutor(10) as pool:
        assert set(pool.map(state_of, jobs)) <= {"pending", "running"}
    assert len(calls()) - before == 1
    time.sleep(2.1)
    for number in range(10):
        (Path("runs") / f"run-{number}").parent.mkdir(exist_ok=True)
        (Path("runs") / f"run-{number}").symlink_to(Path(f"run-{number}").absolute())
    before = len(calls())
    assert main(["ls"]) == exits.DONE
    assert len(calls()) - before == 1
