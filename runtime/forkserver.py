"""The warm parent of a node's workers: imports what every worker needs, touches no device, and forks workers on demand.

    python -m dtrain.runtime.forkserver --fd N --parent PID --preload torch,torch.distributed,torch._dynamo

Its agent speaks to it over a SOCK_SEQPACKET socket, one JSON message a packet (runtime/warm.py is that end):
    in    {"fork": index, "spec": {...}} with the worker's descriptors attached
    out   {"ready": seconds} | {"broken": text}   once, after the imports
          {"forked": index, "pid": pid} | {"refused": index, "reason": text}
          {"exited": pid, "status": wait status}
A fork copies only the calling thread, so it refuses to fork while it has more than one. End of file on the socket:
it kills its workers and ends. On the local back end nodes and their warm parents are themselves forks of one process
that has done the imports: runtime/zygote.py, which serves in the same way.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import importlib
import json
import os
import select
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any, NoReturn

from dtrain.cluster.procs import STOP_SIGNALS, die_with_parent, set_process_name, stops_blocked, unblock_stops
from dtrain.runtime.childproc import WorkerFds, WorkerSpec, leave, run_worker

MAX_MESSAGE_BYTES = 1 << 20
_MAX_FDS = 8


Child = Callable[[dict[str, Any], list[int], int], int]  # (message, descriptors, parent's pid) -> exit code


class Server:
    """Forks a child a message and tells how each ended. A child begins with SIGTERM and SIGINT blocked.
    `keep_children`: they outlive it."""

    def __init__(self, channel: socket.socket, child: Child, *, keep_children: bool = False) -> None:
        self._channel = channel
        self._child = child
        self._keep_children = keep_children
        self._poll = select.poll()
        self._poll.register(channel, select.POLLIN)
        self._children: dict[int, int] = {}  # pidfd -> pid

    def serve(self) -> None:
        """Until the agent's end is closed."""
        while self._serve_once(None):
            pass
        if not self._keep_children:
            self._end_children()

    def serve_waiting(self) -> None:
        """What has been asked by now. Where the agent's end is closed, `serve` will see it."""
        self._serve_once(0)

    def _serve_once(self, timeout_ms: int | None) -> bool:
        """False at the end of the agent's messages."""
        for descriptor, _ in self._poll.poll(timeout_ms):
            if descriptor in self._children:
                self._reap(descriptor)
            elif not self._answer():
                return False
        return True

    def _send(self, message: dict[str, Any]) -> None:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # the next read sees the end of file
            self._channel.send(json.dumps(message).encode())

    def _answer(self) -> bool:
        try:
            raw, fds, _, _ = socket.recv_fds(self._channel, MAX_MESSAGE_BYTES, _MAX_FDS)
        except ConnectionResetError:
            return False
        if not raw:
            return False
        message = json.loads(raw)
        index = message["fork"]
        threads = os.listdir("/proc/self/task")
        if len(threads) > 1:
            names = ", ".join(map(_thread_name, threads))
            reason = f"the warm parent has {len(threads)} threads ({names}); a fork copies only one"
            self._send({"refused": index, "reason": reason})
        else:
            pid = self._fork(message, fds)
            self._send({"forked": index, "pid": pid})
        for descriptor in fds:
            os.close(descriptor)
        return True

    def _fork(self, message: dict[str, Any], fds: list[int]) -> int:
        parent = os.getpid()
        with stops_blocked():  # one that is sent before the child can handle it waits
            pid = os.fork()
            if pid == 0:
                self._become(message, fds, parent)
        descriptor = os.pidfd_open(pid)
        self._children[descriptor] = pid
        self._poll.register(descriptor, select.POLLIN)
        return pid

    def _become(self, message: dict[str, Any], fds: list[int], parent: int) -> NoReturn:
        code = 1
        try:
            self._channel.close()
            for descriptor in self._children:
                os.close(descriptor)
            code = self._child(message, fds, parent)
        except BaseException:  # nothing may climb back into the server's loop
            traceback.print_exc()
        finally:
            leave(code)
        os._exit(code)

    def _reap(self, descriptor: int) -> None:
        pid = self._children.pop(descriptor)
        self._poll.unregister(descriptor)
        os.close(descriptor)
        self._send({"exited": pid, "status": os.waitpid(pid, 0)[1]})

    def _end_children(self) -> None:
        for pid in self._children.values():
            os.kill(pid, signal.SIGKILL)
        for pid in self._children.values():
            os.waitpid(pid, 0)


def _thread_name(thread: str) -> str:
    with open(f"/proc/self/task/{thread}/comm") as file:
        return file.read().strip()


def become_worker(message: dict[str, Any], fds: list[int], parent: int) -> int:
    return run_worker(WorkerSpec.from_json(message["spec"]), WorkerFds.from_list(fds), parent)


def preload(modules: str, between: Callable[[], None]) -> None:
    """Imports them, comma-separated; `between` is called after each."""
    gc.disable()  # a fifth of the time of these imports, for next to nothing that it would free
    try:
        for module in filter(None, modules.split(",")):
            importlib.import_module(module)
            between()
    finally:
        gc.enable()
    # What is imported now is shared with every worker: keep the collector from writing into those pages.
    gc.freeze()


def become_warm_parent(parent: int, name: str) -> None:
    die_with_parent(parent)
    set_process_name(name)
    # A scheduler may signal every process of a job; to stop is the agent's decision.
    for number in (signal.SIGINT, *STOP_SIGNALS):
        signal.signal(number, signal.SIG_IGN)
    unblock_stops()  # what is blocked here would be blocked in every worker


def serve_from_command_line(name: str, child: Child, *, keep_children: bool = False) -> int:
    """The main function of a warm parent that was started by exec."""
    parser = argparse.ArgumentParser(description="a warm parent; dtrain starts it")
    parser.add_argument("--fd", required=True, type=int)
    parser.add_argument("--parent", required=True, type=int)
    parser.add_argument("--preload", default="")
    options = parser.parse_args()
    become_warm_parent(options.parent, name)
    channel = socket.socket(fileno=options.fd)
    os.set_inheritable(options.fd, False)
    started = time.monotonic()
    server = Server(channel, child, keep_children=keep_children)
    try:
        preload(options.preload, server.serve_waiting)
    except Exception:
        channel.send(json.dumps({"broken": traceback.format_exc()[-4000:]}).encode())
        return 1
    channel.send(json.dumps({"ready": round(time.monotonic() - started, 3)}).encode())
    server.serve()
    return 0


if __name__ == "__main__":
    sys.exit(serve_from_command_line("dtrain warm", become_worker))
