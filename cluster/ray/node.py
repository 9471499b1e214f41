"""What runs on each node of a job on Ray: an actor that has the node's agent as a child, starts it again when it dies,
and takes it along when it goes itself. Ray puts the actor on another node when its own is lost.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from dtrain.cluster.deaths import count_death
from dtrain.cluster.errors import DtrainError
from dtrain.cluster.jobplan import JobPlan
from dtrain.cluster.procs import ProcessId, clear_session, die_with_parent
from dtrain.cluster.ray.files import LEAVE_S, RayFiles
from dtrain.cluster.ray.sealed import unseal
from dtrain.cluster.rundir import RunDir, read_json
from dtrain.cluster.version import VERSION

ADDRESS = "DTRAIN_RAY_NODE_ADDRESS"
_POLL_S = 0.25
_AGAIN_S = 3.0  # times the deaths so far but one, before an agent is started again
# What Ray sets for its own worker processes; another value of the node's own can't be told from it.
_RAYS_OWN = frozenset(("OMP_NUM_THREADS", "PYTHONBREAKPOINT", "SPT_NOENV", "CUDA_VISIBLE_DEVICES", "PYTHONUNBUFFERED"))


class NodeActor:
    """Given to ray.remote by cluster/ray/keeper.py."""

    def __init__(self, run_dir: str, job_id: str, node_rank: int, key: str) -> None:
        import ray

        self._thread: threading.Thread | None = None
        self._problem = why_not(run_dir, job_id)
        if not self._problem:
            served = _Served(read_plan(run_dir, job_id), node_rank, key, str(ray.util.get_node_ip_address()))  # type: ignore[no-untyped-call]
            self._thread = threading.Thread(target=served.serve, daemon=True)
            self._thread.start()

    def problem(self) -> str:
        """Why this can't be a node; "" where it is one."""
        return self._problem

    def has_left(self, timeout_s: float) -> bool:
        """Waits for the agent to be gone."""
        if self._thread is not None:
            self._thread.join(timeout_s)
        return self._thread is None or not self._thread.is_alive()


def why_not(run_dir: str, job_id: str) -> str:
    """Why this machine can't be a node of the job, or keep it; "" where it can."""
    run = RunDir(run_dir)
    host = socket.gethostname()
    if importlib.util.find_spec("cryptography") is None:
        return f"{host}: Ray's Python ({sys.executable}) has no cryptography. Install dtrain[ray] for Ray's nodes."
    try:
        run.control(job_id).token.read_text()
        record = read_json(run.job)
    except PermissionError as error:
        return f"{host}: may not read {error.filename}. Ray must run as the user who submits, or as root."
    except OSError:
        record = None
    if record is None:
        return (
            f"{host}: does not see {run_dir}. Set run_dir to a place on a disk that all of Ray's nodes share, the head "
            "among them."
        )
    if record.get("version") != VERSION:
        return (
            f"{host}: Ray's Python ({sys.executable}) has dtrain {VERSION}, but the job was submitted with "
            f"{record.get('version')}. Install that one for Ray's nodes."
        )
    return ""


def node_environ(own: Mapping[str, str], submitted: Mapping[str, str], gpus: int, address: str) -> dict[str, str]:
    """What an agent is started with: the node's own variables, those that the submitter has exported, and the GPUs that
    Ray has given. Nothing by which a process would take itself for one of Ray's."""
    kept = {name: value for name, value in {**own, **submitted}.items() if not name.startswith("RAY_")}
    for name in _RAYS_OWN - submitted.keys():
        kept.pop(name, None)
    if gpus and "CUDA_VISIBLE_DEVICES" in own:
        kept["CUDA_VISIBLE_DEVICES"] = own["CUDA_VISIBLE_DEVICES"]
    return {**kept, ADDRESS: address}


class _Served:
    """The agents of one node, one after the other."""

    def __init__(self, plan: JobPlan, node_rank: int, key: str, address: str) -> None:
        self._plan = plan
        self._rank = node_rank
        self._key = key
        self._address = address
        self._files = RayFiles(plan)

    def serve(self) -> None:
        """Until the job is over and the agent gone. The kernel ends an agent with the thread that has started it."""
        deaths = 0
        while not self._files.is_over() and not self._is_left_out():
            if deaths > self._plan.max_restarts_without_progress:
                self._files.gave_up(self._rank).write_text(f"its agent died {deaths} times without a new step")
                return
            self._sleep(_AGAIN_S * max(0, deaths - 1))
            try:
                environ = self._environ()
            except (DtrainError, OSError) as error:
                self._files.gave_up(self._rank).write_text(str(error))
                return
            asked = self._wait(self._start(environ))
            deaths = 0 if asked or self._files.is_over() else count_death(self._files.control, f"ray-{self._rank}")

    def _environ(self) -> dict[str, str]:
        submitted = unseal(self._files.environ(self._key).read_bytes(), self._key)
        return node_environ(os.environ, submitted, self._plan.gpus_per_node, self._address)

    def _start(self, environ: Mapping[str, str]) -> subprocess.Popen[bytes]:
        parent, plan = os.getpid(), self._plan
        with open(RunDir(plan.run_dir).agent_log(self._rank), "ab") as output:
            return subprocess.Popen(
                self._command(), env=dict(environ), cwd=plan.cwd if os.path.isdir(plan.cwd) else "/",
                stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True,
                preexec_fn=lambda: die_with_parent(parent),
            )  # fmt: skip

    def _command(self) -> list[str]:
        """Where nothing prepares the node, its Python is this one, which has been looked at: then without a shell."""
        argv = self._files.agent_argv()
        prepared = bool(self._plan.setup) or argv[0] != sys.executable
        return [*(["bash", str(self._files.control.script)] if prepared else argv), str(self._rank)]

    def _wait(self, agent: subprocess.Popen[bytes]) -> bool:
        """Until it is gone; True where another one was asked for in its place."""
        over_at, asked = None, False
        while not _has_ended(agent, _POLL_S):
            if over_at is None and self._files.is_over():
                over_at = time.monotonic()
            overdue = over_at is not None and time.monotonic() - over_at > LEAVE_S
            asked = self._is_to_be_replaced(agent.pid)
            if asked or overdue or self._files.killed.exists():
                agent.kill()
        clear_session(agent.pid, frozenset())
        self._files.again(self._rank).unlink(missing_ok=True)
        return asked

    def _is_to_be_replaced(self, pid: int) -> bool:
        record = read_json(self._files.again(self._rank))
        with contextlib.suppress(ProcessLookupError):
            return record is not None and ProcessId.from_json(record) == ProcessId.of(pid)
        return False

    def _is_left_out(self) -> bool:
        return self._files.control.without(self._rank).exists()

    def _sleep(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        while time.monotonic() < until and not self._files.is_over():
            time.sleep(_POLL_S)


def _has_ended(process: subprocess.Popen[bytes], timeout_s: float) -> bool:
    try:
        process.wait(timeout_s)
    except subprocess.TimeoutExpired:
        return False
    return True


def read_plan(run_dir: str, job_id: str) -> JobPlan:
    """The run's, for this job of it, which may be another one than the run has by now."""
    record: dict[str, Any] = json.loads(Path(RunDir(run_dir).job).read_text())
    return replace(JobPlan.from_json(record), job_id=job_id)
