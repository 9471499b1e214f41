"""A job of real agents with the toy worker (toyworker.py), for tests of what the agents do among themselves."""

from __future__ import annotations

import json
import secrets
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import pytest
from sessions import processes_of

from dtrain.cluster.jobplan import JobPlan
from dtrain.cluster.local import LocalBackend
from dtrain.cluster.procs import ProcessId
from dtrain.cluster.rundir import RunDir, read_json, read_jsonl
from dtrain.runtime import control

TIMINGS = {"heartbeat_s": 0.2, "dead_after_s": 1.5, "handshake_s": 1.5, "stop_s": 3.0}
FOREVER = {"steps": 100_000, "step_s": 0.02, "commit_every": 5}


@dataclass(frozen=True, slots=True, kw_only=True)
class ToyJob:
    plan: JobPlan
    backend: LocalBackend

    @property
    def run(self) -> RunDir:
        return RunDir(self.plan.run_dir)

    @property
    def files(self) -> Any:
        return self.run.control(self.plan.job_id)

    def events(self, kind: str) -> list[dict[str, Any]]:
        return [event for event in read_jsonl(self.run.events) if event["type"] == kind]

    def agent(self, node: int) -> ProcessId:
        record = read_json(self.files.node(node))
        assert record is not None
        return ProcessId.from_json(record)

    def session(self, node: int) -> list[psutil.Process]:
        """Every process of a node: its agent's session."""
        leader = self.agent(node).pid
        return processes_of({leader})

    def status(self) -> dict[str, Any]:
        """From the coordinator itself, over the control port."""
        status: dict[str, Any] = control.request(self.plan.run_dir, self.plan.job_id, "status")["status"]
        return status

    def coordinator(self) -> int:
        address = control.find_coordinator(self.files)
        assert address is not None
        return address.node_rank

    def until(self, condition: Callable[[], Any], what: str, timeout_s: float = 120.0) -> None:
        deadline = time.monotonic() + timeout_s
        while not condition():
            if time.monotonic() > deadline:
                logs = "\n".join(path.read_text() for path in sorted(self.run.path.glob("logs/**/*.log")))
                events = "\n".join(map(str, read_jsonl(self.run.events)))
                pytest.fail(f"{what}: not within {timeout_s} s\n{events}\n{logs}")
            time.sleep(0.01)

    def until_training(self, attempt: int = 1) -> None:
        """Until a checkpoint of the attempt is there."""
        found = f"step-*-a{attempt:04d}/manifest.json"
        self.until(lambda: list((self.run.path / "checkpoints").glob(found)), f"a checkpoint of attempt {attempt}")

    def until_ended(self) -> dict[str, Any]:
        self.until(lambda: self.files.ended.exists() and self.backend.state(self.plan) == "gone", "the end")
        ended = read_json(self.files.ended)
        assert ended is not None
        return ended


def toy_plan(folder: Path, /, **changes: Any) -> JobPlan:
    """One node with one worker, on this machine; all in `folder` but what `changes` has elsewhere."""
    plan = JobPlan(
        name="toy",
        run_dir=str(folder),
        job_id="toy-1",
        backend="local",
        nodes=1,
        procs_per_node=1,
        gpus_per_node=0,
        threads_per_proc=1,
        python=sys.executable,
        argv=(),
        cwd=str(folder),
        sys_path=(),
        env={},
        checkpoint_url=str(folder / "checkpoints"),
        workers="exec",
        max_restarts_without_progress=3,
    )
    return replace(plan, **changes)


def start_job(
    folder: Path,
    script: dict[str, Any],
    *,
    timings: dict[str, float] | None = None,
    submit: bool = True,
    backend_class: type[LocalBackend] = LocalBackend,
    **changes: Any,
) -> ToyJob:
    """`script`: of the toy worker; `changes`: of the plan, 2 nodes x 2 workers. The caller kills what still runs."""
    toy = {"nodes": 2, "procs_per_node": 2, "workers": "warm", "sys_path": (str(Path(__file__).parent.parent),)}
    plan = toy_plan(folder, **{**toy, **changes})
    times = json.dumps({**TIMINGS, **(timings or {})})
    args = ("--entry", "toyworker:main", "--preload", "", "--timings", times)
    job = ToyJob(plan=plan, backend=backend_class(agent_args=args))
    job.run.path.mkdir(exist_ok=True)
    (job.run.path / "toy.json").write_text(json.dumps(script))
    job.run.job.write_text(json.dumps(plan.to_json()))
    job.files.path.mkdir(parents=True, mode=0o700)
    job.files.token.write_text(secrets.token_hex(32))
    if submit:
        job.backend.submit(plan)
    return job
