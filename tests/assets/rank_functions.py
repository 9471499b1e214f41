"""Runs a function in several ranks of one process group: forks them. rank_parent.py asks it to.

A request is {"call": "module.function", "world_size": N, "environ": {...}, "kwargs": {...}}. The function is called
with Ranks and the keywords; the answer is what it returns, or {"error": class, "message": text}.
"""

from __future__ import annotations

import importlib
import json
import os
import socket
import traceback
from typing import Any

from rank_environ import adopt

from dtrain.cluster.workerenv import WorkerEnv
from dtrain.runtime.ranks import process_group


def call(request: dict[str, Any], env: WorkerEnv) -> Any:
    module, _, name = request["call"].rpartition(".")
    function = getattr(importlib.import_module(module), name)
    try:
        with process_group(env) as ranks:
            return function(ranks, **request.get("kwargs", {}))
    except Exception as error:
        traceback.print_exc()
        return {"error": type(error).__name__, "message": str(error)}


def start(request: dict[str, Any], rank: int, listener: socket.socket, answer: int) -> int:
    pid = os.fork()
    if pid:
        return pid
    try:
        os.dup2(2, 1)  # stdout is for the results
        adopt(request["environ"])
        env = WorkerEnv(
            run_dir="",
            name="case",
            job_id="job",
            attempt=1,
            global_rank=rank,
            local_rank=rank,
            node_rank=0,
            world_size=request["world_size"],
            local_world_size=request["world_size"],
            num_nodes=1,
            master_addr="127.0.0.1",
            master_port=listener.getsockname()[1],
            device="cpu",
            store_fd=listener.fileno() if rank == 0 else -1,
        )
        with open(answer, "w") as file:
            json.dump(call(request, env), file)
    finally:
        os._exit(0)


def run(request: dict[str, Any]) -> list[Any]:
    pipes = [os.pipe() for _ in range(request["world_size"])]
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(64)
        pids = [start(request, rank, listener, pipe[1]) for rank, pipe in enumerate(pipes)]
    answers = []
    for _, end in pipes:
        os.close(end)
    for begin, _ in pipes:
        with open(begin) as file:
            answers.append(json.loads(file.read() or "null"))
    for pid in pids:
        os.waitpid(pid, 0)
    return answers
