"""A worker without torch for the tests of agents: ranks step together through files, commit, stop and fail on cue.

`toy.json` in the run directory: {"steps", "step_s", "commit_every", "faults": [{"attempt", "rank", "step", "do"}]}.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from dtrain.cluster.errors import CorruptCheckpoint, UsageError
from dtrain.cluster.filestore import FileStorage
from dtrain.cluster.workerenv import WorkerEnv
from dtrain.runtime.checkpoint import names
from dtrain.runtime.progress import Phase, ProgressWriter
from dtrain.runtime.report import Reporter
from dtrain.runtime.stopflag import stop_flag


def main(env: WorkerEnv) -> int:
    run_dir = Path(env.run_dir)
    script = json.loads((run_dir / "toy.json").read_text())
    stop_requested = stop_flag().is_set
    time.sleep(script.get("start_s", 0))
    progress = ProgressWriter(env.progress_fd, attempt=env.attempt, global_rank=env.global_rank)
    report = Reporter(env.report_fd)
    print(f"rank {env.global_rank} of {env.world_size} goes on from step {env.resume_step}")
    for step in range(env.resume_step + 1, script["steps"] + 1):
        progress.step(step)
        progress.phase(Phase.FORWARD)
        time.sleep(script["step_s"])
        for fault in script.get("faults", ()):
            if _matches(fault, env, step):
                _fail(fault["do"], env, step)
        stop = _meet(run_dir, env, step, stop_requested())
        progress.done(step)
        if env.global_rank == 0 and (stop or step % script["commit_every"] == 0 or step == script["steps"]):
            _commit(run_dir, env, step, report)
        if stop:
            return 85
    return 0


def _matches(fault: dict[str, Any], env: WorkerEnv, step: int) -> bool:
    wanted = {"attempt": env.attempt, "rank": env.global_rank, "step": step, "resume_step": env.resume_step}
    return all(fault[key] == value for key, value in wanted.items() if key in fault)


def _fail(do: str, env: WorkerEnv, step: int) -> None:
    match do:
        case "raise":
            raise ValueError(f"bad sample <object at {id(object()):#x}>")
        case "usage":
            raise UsageError("this can't work")
        case "victim":
            raise ConnectionResetError("Connection reset by peer")
        case "corrupt":
            raise CorruptCheckpoint(
                "damaged", step=env.resume_step, attempt=env.resume_attempt, file="rank-00000.safetensors", tensor="w"
            )
        case "exit":
            print("last words", file=sys.stderr)
            os._exit(7)
        case "child":
            child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
            Path(env.run_dir, "child").write_text(str(child.pid))
            os.kill(os.getpid(), signal.SIGKILL)
        case "hang":
            time.sleep(600)
        case "deaf":
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            time.sleep(600)
        case name:
            os.kill(os.getpid(), signal.Signals[name])


def _meet(run_dir: Path, env: WorkerEnv, step: int, stops: bool) -> bool:
    """Waits, for ever if need be, until all ranks have finished the step; whether any of them was told to stop."""
    place = run_dir / "meet" / f"a{env.attempt}-s{step}"
    place.mkdir(parents=True, exist_ok=True)
    mine = place / f".{env.global_rank}"
    mine.write_text("1" if stops else "0")
    mine.rename(place / str(env.global_rank))
    others = [place / str(rank) for rank in range(env.world_size)]
    while not all(other.exists() for other in others):
        time.sleep(0.002)
    return any(other.read_text() == "1" for other in others)


def _commit(run_dir: Path, env: WorkerEnv, step: int, report: Reporter) -> None:
    """As much of a checkpoint as claim_attempt looks at: the manifest's existence."""
    key = names.manifest_key(names.step_dir(step, env.attempt))
    FileStorage(str(run_dir / "checkpoints")).put_if_absent(key, b"{}")
    report.event("checkpoint_committed", step=step, bytes=2, seconds=0.0)
