"""The launching process's end of runtime/zygote.py: a process on this machine that imports torch while the launch is
being checked, and from which nodes and checks are then forked. It only saves time: who can't use it starts plainly.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import time
from types import TracebackType
from typing import Any

from dtrain.cluster.errors import DtrainError
from dtrain.cluster.jobplan import JobPlan, worker_environ

# What every worker needs, and nothing that starts a thread (torch._inductor and torch.fx.experimental do, torch 2.13)
# or touches a device. Our own worker is the last fifth of a second.
PRELOAD = ("torch", "torch.distributed", "torch._dynamo", "dtrain.runtime.worker")
_MAX_MESSAGE_BYTES = 1 << 17  # within a socket's default buffer
_FORK_TIMEOUT_S = 10.0  # once the imports are done


class ZygoteError(DtrainError):
    """It can't serve: start plainly."""


class Zygote:
    """Used as a context manager, by the process that started it; what was forked from it lives on."""

    def __init__(self, plan: JobPlan, preload: tuple[str, ...] = PRELOAD) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        argv = [plan.python, "-P", "-m", "dtrain.runtime.zygote", "--fd", str(theirs.fileno())]
        argv += ["--parent", str(os.getpid()), "--preload", ",".join(preload)]
        self._channel = ours
        self._cwd = plan.cwd
        self._ready = False
        self._index = 0
        self._ended: dict[int, int] = {}  # pid -> wait status
        self._process: subprocess.Popen[bytes] | None = None
        # A wrong interpreter is for the plain way to name.
        with theirs, contextlib.suppress(OSError):
            self._process = subprocess.Popen(
                argv,
                env=worker_environ(plan, os.environ),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                start_new_session=True,  # Ctrl-C is the launching process's
            )

    def wait_until_ready(self) -> None:
        """Until the imports are done. Raises ZygoteError."""
        if not self._ready:
            self._expect("ready", None)

    def fork(
        self, entry: str, argument: Any, *, stdout: int, stderr: int, environ: dict[str, str], early: bool = False
    ) -> int:
        """The pid of a child that calls `entry` ("module:function") with `argument`. Waits for the imports; `early`:
        only for the one that is under way, so the child may have to do the others itself.

        Raises ZygoteError.
        """
        self._index += 1
        message = {"fork": self._index, "entry": entry, "argument": argument, "environ": environ, "cwd": self._cwd}
        raw = json.dumps(message).encode()
        if len(raw) > _MAX_MESSAGE_BYTES:
            raise ZygoteError(f"a message of {len(raw)} bytes is too long")
        if not early:
            self.wait_until_ready()
        try:
            socket.send_fds(self._channel, [raw], [stdout, stderr])
        except OSError as error:
            raise ZygoteError(f"can't be reached: {error}") from error
        return int(self._expect("forked", _FORK_TIMEOUT_S if self._ready else None)["pid"])

    def wait(self, pid: int, timeout_s: float) -> int:
        """The exit code of a fork, negative for a signal. Raises ZygoteError when it is still there."""
        deadline = time.monotonic() + timeout_s
        while pid not in self._ended:
            self._expect("exited", deadline - time.monotonic())
        return os.waitstatus_to_exitcode(self._ended.pop(pid))

    def _expect(self, kind: str, timeout_s: float | None) -> dict[str, Any]:
        while True:
            self._channel.settimeout(None if timeout_s is None else max(0.001, timeout_s))
            try:
                raw = self._channel.recv(1 << 20)
            except OSError as error:
                raise ZygoteError(f"does not answer: {error}") from error
            if not raw:
                raise ZygoteError("has ended")
            message: dict[str, Any] = json.loads(raw)
            if "ready" in message:
                self._ready = True
            if "exited" in message:
                self._ended[message["exited"]] = message["status"]
            if kind in message:
                return message
            if "broken" in message or "refused" in message:
                raise ZygoteError(message.get("broken") or message["reason"])

    def __enter__(self) -> Zygote:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._channel.close()
        if self._process is not None:
            self._process.kill()
            self._process.wait()
