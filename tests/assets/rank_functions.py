"""Runs a function in several ranks of one process group: forks them. rank_parent.py asks it to.

A request is {"call": "module.function", "world_size": N, "environ": {...}, "kwargs": {...}}. The function is called
with Ranks and the keywords; the answer is what it returns, or {"error": class, "message": text}.
"""

from __future__ import annotations

import importlib
import json
import os
import select
import socket
import time
import traceback
from typing import Any

from rank_environ import adopt, place_of

from dtrain.cluster.workerenv import WorkerEnv
from dtrain.runtime.ranks import process_group

ALONE_S = 10.0  # that the others get after one has failed


def call(request: dict[str, Any], env: WorkerEnv) -> Any:
    module, _, name = request["call"].rpartition(".")
    function = getattr(importlib.import_module(module), name)
    try:
        with process_group(env) as ranks:
            return function(ranks, **request.get("kwargs", {}))
    except Exception as error:
        traceback.print_exc()
        return {"error": type(error).__name__, "message": str(error)}


def start(
    request: dict[str, Any], rank: int, listener: socket.socket, pipes: list[tuple[int, int]], stay: tuple[int, int]
) -> int:
    pid = os.fork()
    if pid:
        return pid
    answer = pipes[rank][1]
    for end in {stay[1], *(end for _, end in pipes)} - {answer}:  # the end of each is seen when its rank closes it
        os.close(end)
    try:
        os.dup2(2, 1)  # stdout is for the results
        adopt(request["environ"])
        env = place_of(rank, request["world_size"], listener)
        with open(answer, "w") as file:
            json.dump(call(request, env), file)
        os.read(stay[0], 1)
    finally:
        os._exit(0)


def run(request: dict[str, Any]) -> list[Any]:
    """A rank that has answered stays until all have: others may still be joining a group, and one that can't reach a
    peer any more tries for an hour. Where one fails the others have a while for their own answers, then it goes, and
    who waits for it in a collective fails too."""
    pipes = [os.pipe() for _ in range(request["world_size"])]
    stay = os.pipe()
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(64)
        pids = [start(request, rank, listener, pipes, stay) for rank in range(len(pipes))]
    os.close(stay[0])
    for _, end in pipes:
        os.close(end)
    said = {begin: b"" for begin, _ in pipes}
    waiting, leave = list(said), stay[1]
    give_up: float | None = None
    while waiting:
        left = None if give_up is None else max(0.0, give_up - time.monotonic())
        ready = select.select(waiting, [], [], left)[0]
        if not ready:  # who has failed goes
            os.close(leave)
            leave, give_up = -1, None
        for begin in ready:
            part = os.read(begin, 1 << 16)
            said[begin] += part
            if not part:
                waiting.remove(begin)
                if said[begin].startswith(b'{"error"'):
                    give_up = give_up or time.monotonic() + ALONE_S
    if leave >= 0:
        os.close(leave)
    for begin in said:
        os.close(begin)
    for pid in pids:
        os.waitpid(pid, 0)
    return [json.loads(answer or b"null") for answer in said.values()]
