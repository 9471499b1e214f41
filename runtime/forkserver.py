"""The warm parent of a node's workers: imports what every worker needs, touches no device, and forks workers on demand.

    python -m dtrain.runtime.forkserver --fd N --parent PID --preload torch,torch.distributed,torch._dynamo

Its agent speaks to it over a SOCK_SEQPACKET socket, one JSON message a packet (runtime/warm.py is that end):
    in    {"fork": index, "spec": {...}} with the worker's descriptors attached
    out   {"ready": seconds} | {"broken": text}   once, after the imports
          {"forked": index, "pid": pid} | {"refused": index, "reason": text}
          {"exited": pid, "status": wait status}
A fork copies only the calling thread, so it refuses to fork while it has more than one. End of file on the socket:
it kills its workers and ends.
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
from typing import Any, NoReturn

from dtrain.cluster.procs import die_with_parent, set_process_name, unblock_stops
from dtrain.runtime.childproc import WorkerFds, WorkerSpec, leave, run_worker

MAX_MESSAGE_BYTES = 1 << 20
_MAX_FDS = 8


class Server:
    def __init__(self, channel: socket.socket) -> None:
        self._channel = channel
        self._poll = select.poll()
        self._poll.register(channel, select.POLLIN)
        self._children: dict[int, int] = {}  # pidfd -> pid

    def serve(self) -> None:
        """Until the agent's end is closed."""
        while True:
            for descriptor, _ in self._poll.poll():
                if descriptor in self._children:
                    self._reap(descriptor)
                elif not self._answer():
                    self._end_children()
                    return

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
            pid = self._fork(WorkerSpec.from_json(message["spec"]), WorkerFds.from_list(fds))
            self._send({"forked": index, "pid": pid})
        for descriptor in fds:
            os.close(descriptor)
        return True

    def _fork(self, spec: WorkerSpec, fds: WorkerFds) -> int:
        parent = os.getpid()
        pid = os.fork()
        if pid == 0:
            self._become(spec, fds, parent)
        descriptor = os.pidfd_open(pid)
        self._children[descriptor] = pid
        self._poll.register(descriptor, select.POLLIN)
        return pid

    def _become(self, spec: WorkerSpec, fds: WorkerFds, parent: int) -> NoReturn:
        code = 1
        try:
            self._channel.close()
            for descriptor in self._children:
                os.close(descriptor)
            code = run_worker(spec, fds, parent)
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


def _preload(modules: list[str]) -> None:
    for module in modules:
        importlib.import_module(module)
    # What is imported now is shared with every worker: keep the collector from writing into those pages.
    gc.collect()
    gc.freeze()


def main() -> int:
    parser = argparse.ArgumentParser(description="the warm parent of a node's workers; agents start it")
    parser.add_argument("--fd", required=True, type=int)
    parser.add_argument("--parent", required=True, type=int)
    parser.add_argument("--preload", default="")
    options = parser.parse_args()
    die_with_parent(options.parent)
    set_process_name("dtrain warm")
    # A scheduler may signal every process of a job; to stop is the agent's decision.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    unblock_stops()  # what is blocked here would be blocked in every worker
    channel = socket.socket(fileno=options.fd)
    os.set_inheritable(options.fd, False)
    server = Server(channel)
    started = time.monotonic()
    try:
        _preload([name for name in options.preload.split(",") if name])
    except Exception:
        channel.send(json.dumps({"broken": traceback.format_exc()[-4000:]}).encode())
        return 1
    channel.send(json.dumps({"ready": round(time.monotonic() - started, 3)}).encode())
    server.serve()
    return 0


if __name__ == "__main__":
    sys.exit(main())
