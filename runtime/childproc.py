"""A worker's first moments, the same whether it was forked warm or started by exec: dies with its parent, takes its
name, streams, paths and variables, then calls the entry point. What a worker does from there on is the worker's.

    python -m dtrain.runtime.childproc --spec JSON        (recovery.workers: exec)
"""

from __future__ import annotations

import argparse
import atexit
import contextlib
import faulthandler
import importlib
import json
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any, cast

from dtrain.cluster.procs import die_with_parent, ignore_bystanders, set_process_name, unblock_stops
from dtrain.cluster.rundir import RunDir, read_json
from dtrain.cluster.secretrefs import file_values
from dtrain.cluster.workerenv import WorkerEnv
from dtrain.runtime.cpus import slice_of_cores
from dtrain.runtime.report import Reporter
from dtrain.runtime.stopflag import stop_flag

Entry = Callable[[WorkerEnv], int]
ENTRIES = {"model": "dtrain.runtime.worker:main", "script": "dtrain.runtime.script:main"}  # by JobPlan.kind


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerSpec:
    """What one worker process is to be, but for its descriptors, whose numbers differ on each side of a socket."""

    entry: str  # "module:function", called with a WorkerEnv, returns the exit code
    cwd: str
    sys_path: tuple[str, ...]
    worker: dict[str, str]  # WorkerEnv.to_environ()
    secrets: tuple[str, ...] = ()  # of cluster.secrets, whose files the worker reads for itself: this is in its argv

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_json(data: dict[str, Any]) -> WorkerSpec:
        return WorkerSpec(**{**data, "sys_path": tuple(data["sys_path"]), "secrets": tuple(data["secrets"])})


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerFds:
    """Descriptors of a worker, in the order in which they are passed. `store` is there for global rank 0 only."""

    stdout: int
    stderr: int
    report: int
    progress: int
    stack: int  # SIGUSR1 writes the stacks of all threads into this
    store: int = -1

    def to_list(self) -> list[int]:
        listed = [self.stdout, self.stderr, self.report, self.progress, self.stack]
        return [*listed, self.store] if self.store >= 0 else listed

    @staticmethod
    def from_list(listed: list[int]) -> WorkerFds:
        stdout, stderr, report, progress, stack, *store = listed
        return WorkerFds(
            stdout=stdout,
            stderr=stderr,
            report=report,
            progress=progress,
            stack=stack,
            store=store[0] if store else -1,
        )


def run_worker(spec: WorkerSpec, fds: WorkerFds, parent: int) -> int:
    """Becomes the worker; the exit code. The caller ends the process with `leave`."""
    die_with_parent(parent)
    stop_flag()
    ignore_bystanders()
    unblock_stops()
    _take_streams(fds)
    env = replace(
        WorkerEnv.from_environ(spec.worker), store_fd=fds.store, progress_fd=fds.progress, report_fd=fds.report
    )
    set_process_name(f"dtrain {env.global_rank}/{env.world_size}")
    os.environ.update({**env.to_environ(), **env.traffic_environ(os.environ)})
    _take_cores(env)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    faulthandler.enable(file=2)
    faulthandler.register(signal.SIGUSR1, file=fds.stack, all_threads=True)
    _tie_children()
    Reporter(fds.report).ready()
    try:
        os.environ.update(file_values(spec.secrets))
        os.chdir(spec.cwd)
        sys.path[:0] = spec.sys_path
        code = _load(spec.entry)(env)
        Reporter(fds.report).left()
        return code
    except SystemExit as stop:
        return _exit_code(stop)
    except BaseException as error:
        traceback.print_exc()
        Reporter(fds.report).failure(error, phase="")
        return 1


def _take_cores(env: WorkerEnv) -> None:
    """Threads and processes that it starts stay on its cores too."""
    job = read_json(RunDir(env.run_dir).job) or {}
    cores = slice_of_cores(
        os.sched_getaffinity(0),
        os.environ,
        backend=str(job.get("backend")),
        node_rank=env.node_rank,
        local_rank=env.local_rank,
        shape=(env.num_nodes, env.local_world_size),
    )
    if cores:
        with contextlib.suppress(OSError):  # some sandboxes refuse; it runs all the same
            os.sched_setaffinity(0, cores)


def leave(code: int) -> None:
    """Ends the process without unwinding what a forked child has inherited, after what was registered to run."""
    try:
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(code)


def _take_streams(fds: WorkerFds) -> None:
    null = os.open(os.devnull, os.O_RDONLY)
    for source, target in ((null, 0), (fds.stdout, 1), (fds.stderr, 2)):
        os.dup2(source, target)  # dup2 makes the copy inheritable
        if source > 2:
            os.close(source)
    for kept in fds.to_list()[2:]:
        os.set_inheritable(kept, False)
    # A killed worker's last words must not wait in a buffer.
    sys.stdout = open(1, "w", buffering=1, errors="backslashreplace", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", buffering=1, errors="backslashreplace", closefd=False)  # noqa: SIM115
    sys.stdin = open(0, closefd=False)  # noqa: SIM115


def _tie_children() -> None:
    """Data loader processes die with their worker in the kernel too.

    Only those forked from the main thread: the kernel's tie is to a thread, and helper threads end before their work.
    """
    main = threading.main_thread()
    forker: dict[str, int] = {}

    def before() -> None:
        forker["pid"] = os.getpid() if threading.current_thread() is main else 0

    def in_child() -> None:
        if forker["pid"]:
            die_with_parent(forker["pid"])

    os.register_at_fork(before=before, after_in_child=in_child)


def _load(entry: str) -> Entry:
    module, _, name = entry.partition(":")
    return cast(Entry, getattr(importlib.import_module(module), name))


def _exit_code(stop: SystemExit) -> int:
    """As the interpreter treats it: None is 0, text goes to stderr and is 1."""
    if stop.code is None:
        return 0
    if isinstance(stop.code, int):
        return stop.code & 0xFF
    print(stop.code, file=sys.stderr)
    return 1


def main() -> None:
    parser = argparse.ArgumentParser(description="starts one worker; agents call this")
    parser.add_argument("--spec", required=True, type=json.loads)
    parser.add_argument("--fds", required=True, type=json.loads)
    parser.add_argument("--parent", required=True, type=int)
    options = parser.parse_args()
    leave(run_worker(WorkerSpec.from_json(options.spec), WorkerFds.from_list(options.fds), options.parent))


if __name__ == "__main__":
    main()
