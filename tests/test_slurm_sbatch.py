"""What a real sbatch makes of our scripts: header lines say what was meant, and the log lands where we say."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from slurmcluster import SlurmCluster

from dtrain.cluster.jobplan import JobPlan
from dtrain.cluster.rundir import RunDir
from dtrain.cluster.slurmconfig import SlurmConfig
from dtrain.launcher.doctor import scheduler
from dtrain.launcher.doctor.finding import Finding
from dtrain.slurm.options import directive, log_pattern
from dtrain.slurm.records import SlurmVersion, parse_scontrol, parse_version
from dtrain.slurm.script import render_by_hand, render_script

pytestmark = pytest.mark.slow

VALUES = [
    "two words", "it's", 'say "hi"', "back\\slash", "\\n", "$HOME", "$(touch /tmp/owned)", "`id`", "a#b", " # c", "a,b",
    "é ü 日本", "-x", "=x", "%j %%", '\\"', "end\\", " lead", "trail ", "#SBATCH", ":", "[1-2]",
]  # fmt: skip


@pytest.fixture
def folder(slurm: SlurmCluster) -> Iterator[Path]:
    """Below the cluster's root, which every node sees."""
    made = slurm.root / "scripts"
    made.mkdir()
    yield made
    shutil.rmtree(made)


def a_plan(folder: Path, **changes: object) -> JobPlan:
    plan = JobPlan(
        name="run", run_dir=str(folder / "run"), job_id="slurm-1", backend="slurm", nodes=1, procs_per_node=1,
        gpus_per_node=0, threads_per_proc=0, python=sys.executable, argv=(), cwd=str(folder), sys_path=(), env={},
        checkpoint_url="c", workers="warm", max_restarts_without_progress=3, config=str(folder / "cfg.yaml"),
    )  # fmt: skip
    return replace(plan, **changes)  # type: ignore[arg-type]


def submit(slurm: SlurmCluster, path: Path, text: str, *options: str) -> int:
    path.write_text(text)
    return int(slurm.run("sbatch", "--parsable", *options, str(path)).stdout)


def test_header_lines_say_what_was_meant(slurm: SlurmCluster, folder: Path) -> None:
    for value in VALUES:
        text = f"#!/bin/bash\n{directive(f'--comment={value}')}\n#SBATCH --hold\ntrue\n"
        job = submit(slurm, folder / "a b.sbatch", text)
        said = slurm.run("scontrol", "-o", "show", "job", str(job)).stdout
        assert f" Comment={value} " in said
        slurm.run("scancel", str(job))


def test_the_script_of_a_launch_asks_for_what_it_says(slurm: SlurmCluster, folder: Path) -> None:
    config = SlurmConfig(
        partition="main", time="1-12:00:00", mem="64", gpus_per_node="2", exclude=",".join(["node4"] * 400),
        no_kill=True, on_stop="none", sbatch={"hold": True, "nice": "7", "exclusive": True, "comment": "a 'b'"},
    )  # fmt: skip
    plan = a_plan(folder, nodes=3, gpus_per_node=2, cpus_per_node=2, slurm=config)
    for text in (render_script(plan, ("true",)), render_by_hand(plan)):
        job = submit(slurm, folder / "job.sbatch", text)
        said = slurm.run("scontrol", "-o", "show", "job", str(job)).stdout
        (record,) = parse_scontrol(said)
        assert (record.name, record.num_nodes, record.may_requeue, record.phase) == ("run", 3, False, "pending")
        for words in ("TimeLimit=1-12:00:00", "CPUs/Task=2", "MinMemoryNode=64M", "gpu:2", "Nice=7", "Comment=a 'b'"):
            assert words in said
        assert "NtasksPerN:B:S:C=1:" in said
        assert "ExcNodeList=node4 " in said
        slurm.run("scancel", str(job))


@pytest.mark.parametrize("name", ["plain", "a b", "100%j", "back\\slash", "é'\"$x"])
def test_the_log_lands_in_the_run_directory(slurm: SlurmCluster, folder: Path, name: str) -> None:
    logs = RunDir(str(folder / name)).path / "logs"
    logs.mkdir(parents=True)
    plan = a_plan(folder, run_dir=str(folder / name), python=shutil.which("false"))
    text = render_script(plan, (plan.python,))
    job = submit(slurm, folder / "job.sbatch", text, f"--output={log_pattern(str(logs))}")
    ended = slurm.wait_job(job, "COMPLETED", "FAILED")
    assert ended["ExitCode"] == "93:0"
    log = logs / ("slurm.log" if "\\" in name else f"slurm-{job}.log")
    assert log.read_text().startswith(f"job {job} (node1): ")


def of_slurm() -> list[Finding]:
    return [found for found in scheduler.examine() if found.name == "slurm"]


def test_doctor_sees_it(slurm: SlurmCluster, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name, value in slurm.environ().items():
        monkeypatch.setenv(name, value)
    (found,) = of_slurm()
    assert found.level == "ok"
    assert "is UP" in found.found
    version = parse_version(slurm.run("sbatch", "--version").stdout)
    assert version is not None
    assert found.found.startswith(f"{version}, ")
    monkeypatch.setattr(scheduler, "OLDEST", SlurmVersion(99, 11))
    (found,) = of_slurm()
    assert (found.level, found.found) == ("warn", str(version))
    monkeypatch.setenv("SLURM_CONF", str(tmp_path / "nothing"))
    (found,) = of_slurm()
    assert found.level == "warn"
    assert "does not answer" in found.found


def test_doctor_says_nothing_without_slurm(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert of_slurm() == []
