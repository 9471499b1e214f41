"""What Slurm prints, of several versions: tests/assets/slurm. Those of 22.05 were printed by a cluster, the others put
together from published listings with other names and numbers."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from dtrain.slurm.records import (
    OLDEST,
    JobRecord,
    SlurmVersion,
    classify,
    parse_sacct,
    parse_scontrol,
    parse_squeue,
    parse_version,
)

SAMPLES = Path(__file__).parent / "assets" / "slurm"


@pytest.fixture(autouse=True)
def _utc(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("TZ", "UTC")
    time.tzset()
    yield
    monkeypatch.undo()
    time.tzset()


def sample(name: str) -> str:
    return (SAMPLES / f"{name}.txt").read_text()


def job(name: str) -> JobRecord:
    (record,) = parse_scontrol(sample(f"scontrol-{name}"))
    return record


def test_a_running_job_of_20_11() -> None:
    run = "/work/ada/runs/bytes-gpt"
    assert job("20.11") == JobRecord(
        job_id=10804568, name="bytes-gpt", user="ada", state="RUNNING", partition="gpu", may_requeue=False,
        nodes="gpu[01-02,04-05]", num_nodes=4, batch_host="gpu01",
        command=f"{run}/control/slurm-20210809-143015-1a2b/job.sbatch", stdout=f"{run}/logs/slurm-10804568.log",
        excluded="gpu[03,07]",
        submitted_at=1628519417.0, starts_at=1628519418.0, ends_at=1628692218.0,
    )  # fmt: skip


def test_a_job_of_23_11_that_waits() -> None:
    """No nodes yet, though some are planned; a comment that looks like a state."""
    record = job("23.11")
    assert (record.state, record.phase, record.restarts) == ("PENDING", "pending", 2)
    assert record.reason == "ReqNodeNotAvail, UnavailableNodes:gpu[01-02]"
    assert (record.nodes, record.num_nodes, record.batch_host) == ("", 2, "")


def test_an_interactive_job_of_24_05() -> None:
    record = job("24.05")
    assert (record.exit_code, record.exit_signal, record.reason) == (0, 9, "RaisedSignal:9(Killed)")
    assert (record.command, record.stdout) == ("/bin/bash", "")


def test_a_job_of_25_05_in_a_folder_with_a_blank() -> None:
    record = job("25.05")
    assert record.command == "/work/ada/runs/my run/control/slurm-20260617-133940-1a2b/job.sbatch"
    assert record.stdout == "/work/ada/runs/my run/logs/slurm-44977164.log"
    assert (record.state, record.phase, record.reason) == ("NODE_FAIL", "over", "NodeDown")


def test_many_records_of_22_05() -> None:
    records = parse_scontrol(sample("scontrol-22.05"))
    assert [(record.job_id, record.state, record.reason) for record in records] == [
        (1, "PENDING", "JobHeldUser"),
        (2, "RUNNING", ""),
        (2, "PENDING", "BeginTime"),
        (2, "CANCELLED", "BeginTime"),
        (3, "PENDING", "JobHeldUser"),
        (4, "PENDING", "JobHeldUser"),
        (5, "RUNNING", ""),
        (6, "RUNNING", ""),
        (7, "FAILED", "NonZeroExitCode"),
    ]
    blanks, running, requeued, _, first, second, *_, failed = records
    assert (blanks.name, blanks.command) == ("big run", "/home/ada/my train.sbatch cfg.yaml a=b c")
    assert (running.nodes, running.num_nodes, running.restarts) == ("node[1-2]", 2, 0)
    assert (requeued.nodes, requeued.restarts, requeued.may_requeue) == ("", 1, True)
    assert [(half.het_job_id, half.het_offset, half.name) for half in (first, second)] == [
        (3, 0, "het.sbatch"),
        (3, 1, "het.sbatch"),
    ]
    assert [record.array_job_id for record in records[6:8]] == [5, 5]
    assert (failed.exit_code, failed.command) == (3, "")


def test_the_long_form_says_the_same() -> None:
    (record,) = parse_scontrol(sample("scontrol-22.05-long"))
    assert record == parse_scontrol(sample("scontrol-22.05"))[2]


@pytest.mark.parametrize("evil", ["x JobState=COMPLETED Reason=None", "x\nJobId=9 JobState=FAILED", "a=b", "é"])
def test_names_and_comments_do_not_change_the_state(evil: str) -> None:
    text = sample("scontrol-23.11").replace("JobName=bytes-gpt", f"JobName={evil}").replace("=mine", f"={evil}")
    (record,) = parse_scontrol(text)
    assert (record.job_id, record.name, record.state) == (568939, evil, "PENDING")
    assert record.command.endswith("/job.sbatch")


def test_a_job_without_a_command_is_read_all_the_same() -> None:
    text = re.sub(r" Command=\S+", "", sample("scontrol-23.11")).replace("=mine", "=x JobState=FAILED")
    (record,) = parse_scontrol(text)
    assert (record.state, record.command) == ("PENDING", "")


@pytest.mark.parametrize("text", ["", "slurm_load_jobs error: Invalid job id specified\n", "No jobs in the system\n"])
def test_no_job(text: str) -> None:
    assert parse_scontrol(text) == []


def test_squeue() -> None:
    waiting, running = parse_squeue(sample("squeue-22.05"))
    assert (waiting.job_id, waiting.state, waiting.reason, waiting.starts_at) == (1, "PENDING", "JobHeldUser", None)
    assert (running.nodes, running.reason, running.command) == ("node[1-2]", "", "/home/ada/my train.sbatch")
    assert running.ends_at is not None
    assert running.starts_at is not None
    assert running.ends_at - running.starts_at == 600


def test_a_command_with_anything_in_it() -> None:
    line = "7|RUNNING|N/A|N/A|N/A|n1|None|/a|b\n8|x"
    (record,) = parse_squeue(line)
    assert record.command == "/a|b\n8|x"
    (wait,) = parse_squeue("7|PENDING|N/A|N/A|N/A||Nodes required for job are DOWN, DRAINED|/a\n")
    assert wait.reason == "Nodes required for job are DOWN, DRAINED"


def test_sacct_tells_each_start_of_a_job() -> None:
    records = parse_sacct(sample("sacct-23.11"))
    assert [(r.job_id, r.state, r.reason, r.nodes) for r in records] == [
        (568939, "NODE_FAIL", "", "gpu[01-02]"),
        (568939, "CANCELLED", "by 100232", "gpu[03-04]"),
        (568940, "PENDING", "", ""),
    ]


@pytest.mark.parametrize(
    ("phase", "states"),
    [
        ("pending", "PENDING CONFIGURING REQUEUED REQUEUE_HOLD SPECIAL_EXIT"),
        ("running", "RUNNING SUSPENDED STOPPED SIGNALING RESIZING"),
        ("completing", "COMPLETING STAGE_OUT"),
        ("over", "COMPLETED FAILED CANCELLED+ TIMEOUT PREEMPTED NODE_FAIL OUT_OF_MEMORY BOOT_FAIL DEADLINE REVOKED"),
    ],
)
def test_phases(phase: str, states: str) -> None:
    assert {classify(state) for state in states.split()} == {phase}


def test_a_state_that_nobody_knows_is_alive() -> None:
    assert {classify("EXPEDITING"), classify("")} == {"running"}
    assert classify("CANCELLED by 1000") == "over"


def test_versions() -> None:
    assert parse_version("slurm-wlm 22.05.8\n") == SlurmVersion(22, 5, 8)
    assert parse_version("slurm 23.11.10-2") == SlurmVersion(23, 11, 10)
    assert str(parse_version("slurm 25.05.0-0rc1")) == "25.05.0"
    assert parse_version("bash: sbatch: command not found") is None
    assert SlurmVersion(20, 2, 7) < OLDEST < SlurmVersion(22, 5)


def test_times_are_those_of_this_host(monkeypatch: pytest.MonkeyPatch) -> None:
    before = job("20.11").starts_at
    monkeypatch.setitem(os.environ, "TZ", "UTC-2")
    time.tzset()
    assert before is not None
    assert job("20.11").starts_at == before - 7200
