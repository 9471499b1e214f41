"""Runs a function in several ranks of one process group: forks them from this process, which imports torch once.

Requests on stdin, one JSON object a line: {"call": "module.function", "world_size": N, "kwargs": {...}}. The function
is called with Ranks and the keywords; what it returns, or {"error": class, "message": text}, is printed as a JSON list
over the ranks.
"""

from __future__ import annotations

import importlib
import json
import os
import socket
import sys
import traceback
from typing import Any

import torch
import torch._dynamo
import torch.distributed

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


if __name__ == "__main__":
    sys.path[:0] = [os.path.dirname(os.path.abspath(__file__))]
    torch.set_num_threads(1)
    for line in sys.stdin:
        print(json.dumps(run(json.loads(line))), flush=True)
