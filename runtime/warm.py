"""The agent's two ways to start a worker process: forked from the node's warm parent, or plainly by exec.

Both give a pid at once and call back with the wait status when the process has ended; they keep no other state.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Protocol

from dtrain.cluster.errors import DtrainError
from dtrain.cluster.procs import stops_blocked
from dtrain.runtime.childproc import WorkerFds, WorkerSpec
from dtrain.runtime.forkserver import MAX_MESSAGE_BYTES

OnExit = Callable[[int], None]  # called with the wait status


class StartError(DtrainError):
    """A worker can't be started this way."""


class Starter(Protocol):
    async def start(self, spec: WorkerSpec, fds: WorkerFds, on_exit: OnExit) -> int:
        """The new process's pid; its descriptors are the caller's to close. Raises StartError."""

    def close(self) -> None:
        """Ends what the starter itself runs; the workers with it."""


class ExecStarter:
    """`python -m dtrain.runtime.childproc` for each worker."""

    def __init__(self, python: str, environ: dict[str, str]) -> None:
        self._python = python
        self._environ = environ

    async def start(self, spec: WorkerSpec, fds: WorkerFds, on_exit: OnExit) -> int:
        passed = [fds.report, fds.progress, fds.stack, *([fds.store] if fds.store >= 0 else [])]
        # Streams go the usual way, so that an interpreter that fails to start is heard too.
        inner = replace(fds, stdout=1, stderr=2)
        argv = [self._python, "-P", "-m", "dtrain.runtime.childproc", "--parent", str(os.getpid())]
        argv += ["--spec", json.dumps(spec.to_json()), "--fds", json.dumps(inner.to_list())]
        with stops_blocked():  # until it can keep one in mind; see runtime/childproc.py
            process = subprocess.Popen(
                argv,
                env=self._environ,
                stdin=subprocess.DEVNULL,
                stdout=fds.stdout,
                stderr=fds.stderr,
                pass_fds=passed,
            )
        process.returncode = 0  # reaped below; keeps Popen from doing it
        watch = os.pidfd_open(process.pid)

        def ended() -> None:
            asyncio.get_running_loop().remove_reader(watch)
            os.close(watch)
            on_exit(os.waitpid(process.pid, 0)[1])

        asyncio.get_running_loop().add_reader(watch, ended)
        return process.pid

    def close(self) -> None:
        pass


@dataclass(frozen=True, slots=True, kw_only=True)
class WarmParent:
    """A child process that serves as runtime/forkserver.py does, and our end of its socket."""

    pid: int
    channel: socket.socket

    def end(self) -> None:
        """Kills it, if it has not ended, and its zombie is gone."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            os.waitpid(self.pid, 0)

    def reap(self) -> None:
        with contextlib.suppress(ChildProcessError):
            os.waitpid(self.pid, os.WNOHANG)


def exec_warm_parent(python: str, environ: dict[str, str], preload: tuple[str, ...]) -> WarmParent:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    argv = [python, "-P", "-m", "dtrain.runtime.forkserver", "--fd", str(theirs.fileno())]
    argv += ["--parent", str(os.getpid()), "--preload", ",".join(preload)]
    with theirs:
        process = subprocess.Popen(argv, env=environ, stdin=subprocess.DEVNULL, pass_fds=[theirs.fileno()])
    process.returncode = 0  # reaped by WarmParent; keeps Popen from doing it
    return WarmParent(pid=process.pid, channel=ours)


class WarmStarter:
    """The agent's end of runtime/forkserver.py. The workers are forked from a process that has imported torch."""

    def __init__(self, parent: WarmParent) -> None:
        self._parent = parent
        self._channel = parent.channel
        self._channel.setblocking(False)
        # Seconds that the imports took, or StartError; never cancelled.
        self.ready: asyncio.Future[float] = asyncio.get_running_loop().create_future()
        self._forks: dict[int, tuple[asyncio.Future[int], OnExit]] = {}
        self._callbacks: dict[int, OnExit] = {}
        self._index = 0
        asyncio.get_running_loop().add_reader(self._channel, self._receive)

    @property
    def pid(self) -> int:
        return self._parent.pid

    @property
    def dead(self) -> bool:
        return self._channel.fileno() < 0

    async def start(self, spec: WorkerSpec, fds: WorkerFds, on_exit: OnExit) -> int:
        await asyncio.shield(self.ready)
        self._index += 1
        index = self._index
        message = json.dumps({"fork": index, "spec": spec.to_json()}).encode()
        if self.dead or len(message) > MAX_MESSAGE_BYTES:
            raise StartError("the warm parent has ended" if self.dead else "the worker's settings are over 1 MiB")
        forked: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self._forks[index] = (forked, on_exit)
        try:
            socket.send_fds(self._channel, [message], fds.to_list())
        except OSError as error:
            raise StartError(f"the warm parent can't be reached: {error}") from error
        return await forked

    def close(self) -> None:
        """End of file makes the parent kill its workers and end; it is given no time to refuse."""
        self._lost("closed")
        self._parent.end()

    def _receive(self) -> None:
        while not self.dead:
            try:
                raw = self._channel.recv(MAX_MESSAGE_BYTES)
            except BlockingIOError:
                return
            except OSError:
                raw = b""
            if not raw:
                self._lost("the warm parent of this node's workers has ended")
                return
            self._handle(json.loads(raw))

    def _handle(self, message: dict[str, Any]) -> None:
        match message:
            case {"ready": seconds}:
                self.ready.set_result(seconds)
            case {"broken": text}:
                self._fail_ready(StartError(f"the warm parent's imports failed:\n{text}"))
            case {"forked": index, "pid": pid}:
                forked, self._callbacks[pid] = self._forks.pop(index)
                forked.set_result(pid)
            case {"refused": index, "reason": reason}:
                self._forks.pop(index)[0].set_exception(StartError(reason))
            case {"exited": pid, "status": status}:
                # Both messages may be read in one go: let `start` return the pid before its end is told.
                asyncio.get_running_loop().call_soon(self._callbacks.pop(pid), status)

    def _fail_ready(self, error: StartError) -> None:
        if not self.ready.done():
            self.ready.set_exception(error)
            self.ready.exception()  # seen: a close before anyone waited is no error of its own

    def _lost(self, reason: str) -> None:
        if self.dead:
            return
        asyncio.get_running_loop().remove_reader(self._channel)
        self._channel.close()
        self._fail_ready(StartError(reason))
        for forked, _ in self._forks.values():
            forked.set_exception(StartError(reason))
        self._forks.clear()
        callbacks, self._callbacks = self._callbacks, {}
        for callback in callbacks.values():
            callback(9)  # they died with it, by SIGKILL
        self._parent.reap()
