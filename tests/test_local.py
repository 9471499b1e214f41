"""The local back end: the exact commands, and processes that are known by more than their number."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from dtrain.cluster.backends import get_backend
from dtrain.cluster.errors import UsageError
from dtrain.cluster.jobplan import JobPlan, worker_environ
from dtrain.cluster.local import LocalBackend
from dtrain.cluster.procs import ProcessId, clear_session, session_members, start_time
from dtrain.cluster.rundir import RunDir

PLAN = JobPlan(
    name="x; rm -rf ~",
    run_dir="/runs/x; rm -rf ~",
    job_id="local-1",
    backend="local",
    nodes=2,
    procs_per_node=2,
    gpus_per_node=0,
    threads_per_proc=3,
    python="/env/bin/python",
    argv=("dtrain", "launch"),
    cwd="/home/a b",
    sys_path=("/home/a b",),
    env={"NCCL_DEBUG": "WARN"},
    checkpoint_url="/runs/x/checkpoints",
    workers="warm",
    max_restarts_without_progress=3,
)

GOLDEN = """\
# 2 simulated node(s) on this machine, 2 worker(s) each
cd '/home/a b'
setsid /env/bin/python -P -m dtrain.runtime.agent --run-dir '/runs/x; rm -rf ~' --job-id local-1 --node-rank 0 \
</dev/null >>'/runs/x; rm -rf ~/logs/agent-0.log' 2>&1 &
setsid /env/bin/python -P -m dtrain.runtime.agent --run-dir '/runs/x; rm -rf ~' --job-id local-1 --node-rank 1 \
</dev/null >>'/runs/x; rm -rf ~/logs/agent-1.log' 2>&1 &
"""


def test_render_is_exact_and_quoted() -> None:
    assert get_backend("local").render(PLAN) == GOLDEN


def test_each_node_gets_its_slice_of_the_gpus() -> None:
    text = LocalBackend().render(replace(PLAN, gpus_per_node=2))
    assert "CUDA_VISIBLE_DEVICES=0,1 /env" in text
    assert "CUDA_VISIBLE_DEVICES=2,3 /env" in text


def test_an_unknown_back_end() -> None:
    with pytest.raises(UsageError, match="Did you mean local"):
        get_backend("locl")


def test_what_the_user_exported_wins() -> None:
    exported = worker_environ(PLAN, {"NCCL_DEBUG": "INFO", "OMP_NUM_THREADS": "8"})
    assert exported == {"NCCL_DEBUG": "INFO", "OMP_NUM_THREADS": "8"}
    assert worker_environ(PLAN, {}) == {"NCCL_DEBUG": "WARN", "OMP_NUM_THREADS": "3"}


def test_state_of_a_job(tmp_path: Path) -> None:
    backend, plan = LocalBackend(), replace(PLAN, run_dir=str(tmp_path))
    files = RunDir(tmp_path).control(plan.job_id)
    files.path.mkdir(parents=True)
    assert backend.state(plan) == "gone"
    files.node(0).write_text('{"pid": 1, "started": 5, "boot": "other", "host": "elsewhere"}')
    assert backend.state(plan) == "unknown"
    files.ended.write_text("{}")
    assert backend.state(plan) == "gone"
    own = ProcessId.of(os.getpid())
    files.node(1).write_text(str(own.to_json()).replace("'", '"'))
    assert backend.state(plan) == "alive"


def test_a_process_of_another_time_is_another_process() -> None:
    own = ProcessId.of(os.getpid())
    assert own.liveness() == "alive"
    assert replace(own, started=own.started - 1).liveness() == "gone"
    assert replace(own, boot="another").liveness() == "gone"
    assert replace(own, host="elsewhere").liveness() == "unknown"


def test_a_zombie_counts_as_gone() -> None:
    child = subprocess.Popen([sys.executable, "-c", ""])
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert start_time(child.pid) is None
    child.wait()


def test_a_session_is_cleared_with_all_that_it_forked() -> None:
    program = "import os, time\nfor _ in range(3): os.fork()\ntime.sleep(600)"
    leader = subprocess.Popen([sys.executable, "-c", program], start_new_session=True)
    deadline = time.monotonic() + 30
    while len(session_members(leader.pid)) < 8 and time.monotonic() < deadline:
        time.sleep(0.01)
    clear_session(leader.pid, frozenset({leader.pid}))
    assert session_members(leader.pid) == [leader.pid]
    leader.kill()
    leader.wait()
