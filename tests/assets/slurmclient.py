"""dtrain's commands on Slurm jobs, each in a process of its own that can be killed. Without the parts that take seconds
(config, code): what they write and ask, and the submission. Or the whole command line, in an interpreter of its own."""

from __future__ import annotations

import importlib
import json
import os
import secrets
import signal
import sys
import time
import traceback
from dataclasses import replace
from pathlib import Path
from typing import Any

from dtrain.cluster.errors import DtrainError
from dtrain.cluster.jobplan import JobPlan
from dtrain.cluster.kubernetes import submission as kubernetes_submission
from dtrain.cluster.kubernetesconfig import KubernetesConfig
from dtrain.cluster.rayconfig import RayConfig
from dtrain.cluster.rundir import RunDir, write_atomic, write_once
from dtrain.launcher.cli import main
from dtrain.launcher.lease import launching
from dtrain.launcher.runs import Job, read_job
from dtrain.launcher.state import read_status
from dtrain.launcher.submit import ALIVE, new_job_id, submit
from dtrain.slurm import client, queue, standing, submission


def hurry() -> None:
    """What waits for people, or for networks, in tests' time."""
    client.QUESTION_S, submission.SBATCH_S, submission.UNSENT_S = 4.0, 4.0, 3.0
    kubernetes_submission._UNSENT_S = 3.0
    standing.SURE_S, queue.COMMAND_AGE_S = 1.5, 0.3
    if os.environ.get("CLIENT_ENGINE") == "ray":
        from dtrain.cluster.ray import backend, jobs

        backend._ARRIVE_S = 0.1  # less than a late request takes: what is given up for lost comes, and must not begin
        jobs._client_class()  # imports Ray, once for all clients
    if os.environ.get("CLIENT_ENGINE") == "kubernetes":
        importlib.import_module("kubernetes.client")  # once for all clients


def a_plan(run_dir: Path, python: str, **changes: Any) -> JobPlan:
    plan = JobPlan(
        name=run_dir.name, run_dir=str(run_dir), job_id=new_job_id("slurm"), backend="slurm", nodes=1,
        procs_per_node=1, gpus_per_node=0, threads_per_proc=1, python=python, argv=("dtrain",), cwd="/", sys_path=(),
        env={}, checkpoint_url=f"file://{run_dir}/checkpoints", workers="warm", max_restarts_without_progress=3,
        config="/cfg.yaml",
    )  # fmt: skip
    return replace(plan, **changes)


def _changes() -> dict[str, Any]:
    """Of the plan, for another back end: CLIENT_PLAN."""
    changes = json.loads(os.environ.get("CLIENT_PLAN", "{}"))
    typed: dict[str, Any] = {name: tuple(it) if isinstance(it, list) else it for name, it in changes.items()}
    if "ray" in typed:
        typed["ray"] = RayConfig(**typed["ray"])
    if "kubernetes" in typed:
        typed["kubernetes"] = KubernetesConfig.from_json(typed["kubernetes"])
    return {**typed, "job_id": new_job_id(changes["backend"])} if changes else {}


def record(plan: JobPlan) -> Job:
    run = RunDir(plan.run_dir)
    submitted_at = time.time()
    control = run.control(plan.job_id)
    control.path.mkdir(mode=0o700, parents=True)
    write_once(control.token, secrets.token_hex(32), mode=0o600)
    write_atomic(run.job, json.dumps({**plan.to_json(), "submitted_at": submitted_at, "steps": 10}))
    return Job(run=run, plan=plan, submitted_at=submitted_at, steps=10)


def launch(run_dir: Path, python: str) -> int:
    with launching(RunDir(run_dir), f"test-{os.getpid()}"):
        there = read_job(run_dir)
        if there is not None and read_status(there, look_for_checkpoint=False)["state"] in ALIVE:
            return 2
        submit(record(a_plan(run_dir, python, **_changes())), None)
    return 0


def act(action: str, run_dir: Path, python: str) -> int:
    if action == "launch":
        return launch(run_dir, python)
    job = read_job(run_dir)
    if action == "status":
        print(json.dumps(read_status(job, look_for_checkpoint=False)) if job else "{}")
        return 0
    return main(["cancel", "--grace", "20", str(run_dir)]) if job else 0


def serve() -> None:
    """A process for each line of stdin, forked from this one, which has imported everything: {"words", "environ",
    "output"}; its number goes to stdout, what it says and at last its exit code to the file `output`. "whole": words
    of the command line's, for a new interpreter."""
    for line in sys.stdin:
        request = json.loads(line)
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for them here
        pid = os.fork()
        if pid:
            print(pid, flush=True)
            continue
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        descriptor = os.open(request["output"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        for number in (1, 2):
            os.dup2(descriptor, number)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.environ.update(request["environ"])
        if request["whole"]:
            os.execv(sys.executable, [sys.executable, "-P", __file__, *request["words"]])
        action, run_dir, python = request["words"]
        code = 70
        try:
            if "REQUEST_FAULT" in os.environ:
                import killedcalls  # whole command lines do without: their path has no folder of tests

                killedcalls.install()
            code = act(action, Path(run_dir), python)
        except DtrainError as error:
            print(error)
            code = error.exit_code
        except BaseException:
            traceback.print_exc()
        finally:
            print(f"\nended with {code}", flush=True)
            os._exit(code)


if __name__ == "__main__":
    hurry()
    if sys.argv[1:]:
        sys.exit(main(sys.argv[1:]))
    serve()
