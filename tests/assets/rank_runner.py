"""Runs real workers without agents: forks the ranks of a case. rank_parent.py asks it to.

A case is {"run_dir", "world_size", "environ", "attempt", "resume": [step, attempt] | null,
"stop_at": step after which all get a SIGTERM, "kill_at": a SIGKILL, "full_at": [steps at which rank 0's disk is full],
"entry": "module.function" in the place of the worker's main, "before": another one, which each rank calls first}.
The run directory holds config.yaml.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Iterable
from typing import Any

from rank_environ import adopt, place_of

from dtrain.cluster.errors import StorageError
from dtrain.cluster.filestore import FileStorage
from dtrain.runtime import worker


def open_append(path: str) -> int:
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)


class FullStorage(FileStorage):
    """A store whose disk is full while some steps are saved."""

    def __init__(self, url: str, steps: list[int]) -> None:
        super().__init__(url)
        self._full = tuple(f"step-{step:08d}-" for step in steps)

    def upload(self, key: str, data: Iterable[memoryview], size_bytes: int) -> None:
        if key.startswith(self._full):
            raise StorageError(f"{key}: no space left on device")
        super().upload(key, data, size_bytes)


def find(name: str) -> Any:
    module, _, function = name.rpartition(".")
    return getattr(importlib.import_module(module), function)


def start_rank(case: dict[str, Any], rank: int, listener: socket.socket) -> int:
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        os.dup2(2, 1)  # stdout is for the results
        adopt(case["environ"])
        resume = case.get("resume") or [0, 0]
        if rank == 0 and case.get("full_at"):
            vars(worker)["open_storage"] = lambda url: FullStorage(url, case["full_at"])
        env = place_of(
            rank,
            case["world_size"],
            listener,
            run_dir=case["run_dir"],
            attempt=case.get("attempt", 1),
            resume_step=resume[0],
            resume_attempt=resume[1],
            report_fd=open_append(os.path.join(case["run_dir"], f"report-{rank}.jsonl")),
        )
        if case.get("before"):
            find(case["before"])()
        code = find(case["entry"])(env) if case.get("entry") else worker.main(env)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def run(case: dict[str, Any]) -> list[int]:
    """Exit codes."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(64)
        pids = [start_rank(case, rank, listener) for rank in range(case["world_size"])]
    for key, number in (("stop_at", signal.SIGTERM), ("kill_at", signal.SIGKILL)):
        if case.get(key):
            _wait_for_step(case["run_dir"], case[key])
            for pid in pids:
                os.kill(pid, number)
    codes = dict.fromkeys(pids, 0)
    left = set(pids)
    while left:
        pid, status = os.wait()
        left.discard(pid)
        codes[pid] = os.waitstatus_to_exitcode(status)
        if codes[pid] not in (0, 85):  # its peers may be stuck in a collective
            time.sleep(0.2)
            for other in left:
                os.kill(other, signal.SIGKILL)
    return [codes[pid] for pid in pids]


def _wait_for_step(run_dir: str, step: int) -> None:
    deadline = time.monotonic() + 100
    while time.monotonic() < deadline:
        with contextlib.suppress(FileNotFoundError), open(os.path.join(run_dir, "metrics.jsonl")) as file:
            if sum(1 for _ in file) >= step:
                return
        time.sleep(0.01)
