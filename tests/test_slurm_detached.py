"""The command line on a login node, whole: launch, come back, cancel; and nothing of it stays behind there."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import pytest

from dtrain.cluster import exits

if TYPE_CHECKING:
    from slurmcluster import SlurmCluster

SCRIPT = """\
import sys, time
print("up", flush=True)
time.sleep(600)
"""
CONFIG = """\
script: train.py
cluster: {backend: slurm, nodes: 2}
"""


def dtrain(slurm: SlurmCluster, *words: str) -> subprocess.CompletedProcess[str]:
    return slurm.run(sys.executable, "-m", "dtrain.launcher.cli", *words, check=False, timeout_s=120)


def on_the_login_node(slurm: SlurmCluster) -> list[str]:
    """What this test has started, on no simulated node."""
    mark = f"DTRAIN_TEST_ID={os.environ['DTRAIN_TEST_ID']}".encode()
    nodes = _on_nodes(slurm)
    found = {}
    for process in psutil.process_iter(["cmdline", "status"]):
        with contextlib.suppress(OSError):
            if mark in Path(f"/proc/{process.pid}/environ").read_bytes():
                found[process.pid] = " ".join(process.info["cmdline"] or [])
    nodes |= _on_nodes(slurm)  # of which some have begun and some have ended meanwhile
    return [words for pid, words in found.items() if pid not in nodes]


def _on_nodes(slurm: SlurmCluster) -> set[int]:
    return {pid for node in slurm.nodes for pid in slurm.node_processes(node)}


def wait_for(slurm: SlurmCluster, run: str, states: Sequence[str], reason: str = "") -> dict[str, object]:
    deadline = time.monotonic() + 90
    while True:
        done = dtrain(slurm, "status", run, "--json")
        status: dict[str, object] = json.loads(done.stdout) if done.stdout else {}
        if status.get("state") in states and reason in str(status["reason"]):
            return status
        assert time.monotonic() < deadline, (status, done.stderr)
        time.sleep(0.5)


@pytest.mark.e2e
def test_launch_leaves_nothing_and_the_run_is_found_from_anywhere(slurm: SlurmCluster, tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(SCRIPT)
    (tmp_path / "cfg.yaml").write_text(CONFIG)
    launched = dtrain(slurm, "launch", "--detach", "cfg.yaml")
    assert launched.returncode == exits.DONE, launched.stderr
    assert on_the_login_node(slurm) == []
    (number,) = slurm.jobs()
    assert f"Slurm job {number}" in launched.stdout

    again = dtrain(slurm, "launch", "--detach", "cfg.yaml")
    assert again.returncode == exits.USAGE
    assert "nothing was started" in again.stderr
    assert wait_for(slurm, str(number), ["running"])["run_dir"] == str(tmp_path / "runs" / "cfg")

    argv = [sys.executable, "-m", "dtrain.launcher.cli", "attach", str(number)]
    follower = subprocess.Popen(
        argv, env={**os.environ, **slurm.environ()}, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True
    )
    assert follower.stdout is not None
    while "following" not in (line := follower.stdout.readline()):
        assert line, "attach ended"
    time.sleep(1.0)
    follower.send_signal(signal.SIGINT)
    said, _ = follower.communicate(timeout=30)
    assert follower.returncode == exits.DETACHED
    assert "dtrain attach cfg" in said
    assert slurm.job(number)["JobState"] == "RUNNING"

    # Requeued, it is held; nobody follows it, but whoever launches it again lets it go.
    slurm.run("scontrol", "requeue", str(number))
    slurm.wait_job(number, "PENDING")
    slurm.run("scontrol", "update", f"JobId={number}", "StartTime=now+600")
    wait_for(slurm, "cfg", ["requeued"], "`dtrain attach` lets it go")  # when Slurm has looked at the new time
    assert dtrain(slurm, "launch", "--detach", "--dry-run", "cfg.yaml").returncode == exits.USAGE
    assert slurm.job(number)["JobState"] == "PENDING"
    assert dtrain(slurm, "launch", "--detach", "cfg.yaml").returncode == exits.USAGE
    wait_for(slurm, "cfg", ["running"])

    listed = dtrain(slurm, "ls")
    assert "running" in listed.stdout
    assert "up" in dtrain(slurm, "logs", "cfg").stdout
    # From another login node, where nobody has launched anything.
    there = [sys.executable, "-P", "-m", "dtrain.launcher.cli"]
    run_dir = str(tmp_path / "runs" / "cfg")
    said = slurm.on("node4", *there, "status", "--json", run_dir)
    assert json.loads(said[said.index("{") :])["state"] == "running"
    slurm.on("node4", *there, "cancel", run_dir)
    assert wait_for(slurm, "cfg", ["cancelled"])["reason"] in ("", "cancelled")
    assert slurm.jobs() == []
    assert on_the_login_node(slurm) == []


@pytest.mark.e2e
def test_a_request_that_never_fits_starts_nothing(slurm: SlurmCluster, tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(SCRIPT)
    (tmp_path / "cfg.yaml").write_text(CONFIG)
    refused = dtrain(slurm, "launch", "--nodes", "5", "cfg.yaml")
    assert refused.returncode == exits.USAGE
    assert "5 nodes, but partition main has 4" in refused.stderr
    assert not (tmp_path / "runs").exists()
    assert slurm.jobs() == []


def test_without_slurm_the_command_says_so(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(SCRIPT)
    (tmp_path / "cfg.yaml").write_text(CONFIG)
    environ = {**os.environ, "PATH": "/nonexistent"}
    argv = [sys.executable, "-m", "dtrain.launcher.cli", "launch", "cfg.yaml"]
    done = subprocess.run(argv, env=environ, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == exits.USAGE
    assert "which is not in PATH" in done.stderr
