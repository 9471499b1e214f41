"""One worker as its agent sees it: its pipes, progress record, stacks and end. Leaves what these mean to others."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import json
import os
import signal
import time
from collections.abc import Callable
from typing import Any

from dtrain.cluster.workerenv import WorkerEnv
from dtrain.runtime.childproc import WorkerFds, WorkerSpec
from dtrain.runtime.nodelog import LineSplitter, NodeLog
from dtrain.runtime.progress import ProgressReader, create_record
from dtrain.runtime.redact import Redactor
from dtrain.runtime.report import MAX_LINE_BYTES
from dtrain.runtime.warm import Starter

_READ_BYTES = 1 << 16
_MAX_STACK_BYTES = 1 << 18

Notify = Callable[[dict[str, Any]], None]


class WorkerProcess:
    """Made with its channels, then `start`ed once. `notify` gets its events, its failure report and, last, its end."""

    def __init__(self, env: WorkerEnv, log: NodeLog, notify: Notify, redact: Redactor) -> None:
        self.env = env
        self.pid = 0
        self._notify = notify
        self._redact = redact
        self._pidfd = -1
        self._killed = False
        self._ready = False  # whether it has said that it keeps a SIGTERM in mind
        self._stop_waits = False
        self._failure_reported = False
        self._left = False  # whether it has said that its program came to its end
        self._partial = b""
        self._progress_fd = create_record(f"dtrain progress {env.global_rank}")
        self._progress = ProgressReader(self._progress_fd)
        self._stack_fd = os.memfd_create(f"dtrain stack {env.global_rank}", os.MFD_CLOEXEC)
        fcntl.fcntl(self._stack_fd, fcntl.F_SETFL, os.O_APPEND)
        tag = str(env.global_rank)
        self._stdout = LineSplitter(lambda line: log.write(tag, line), redact=redact.line)
        self._stderr = LineSplitter(lambda line: log.write(tag, line), redact=redact.line)
        self._pipes: dict[int, Callable[[bytes], None]] = {}
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    async def start(self, starter: Starter, spec: WorkerSpec, store_fd: int) -> None:
        """Raises StartError; the channels are usable for another try then."""
        ends = []
        for feed in (self._stdout.feed, self._stderr.feed, self._feed_report):
            reading, writing = os.pipe()
            os.set_blocking(reading, False)
            self._pipes[reading] = feed
            ends.append(writing)
        stdout, stderr, report = ends
        fds = WorkerFds(
            stdout=stdout,
            stderr=stderr,
            report=report,
            progress=self._progress_fd,
            stack=self._stack_fd,
            store=store_fd,
        )
        try:
            self.pid = await starter.start(spec, fds, self._on_exit)
            self._pidfd = os.pidfd_open(self.pid)
        except BaseException:
            self._close_pipes()
            raise
        finally:
            for end in ends:
                os.close(end)
        for reading in self._pipes:
            asyncio.get_running_loop().add_reader(reading, self._read, reading)

    def signal(self, number: signal.Signals) -> None:
        """To this very process; nothing happens when it has ended. A SIGTERM waits until it would be neither lost nor
        fatal."""
        if number == signal.SIGTERM and not self._ready:
            self._stop_waits = True
            return
        self._killed = self._killed or (number == signal.SIGKILL and not self.ended.done())
        if self._pidfd >= 0 and not self.ended.done():
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pidfd, number)

    def progress(self) -> dict[str, Any]:
        record = self._progress.read()
        return {
            "global_rank": self.env.global_rank,
            "local_rank": self.env.local_rank,
            "pid": self.pid,
            "step": record.step,
            "done": record.done,
            "phase": str(record.phase),
            "collective": record.collective,
            "idle_s": round(max(0.0, time.monotonic() - record.changed_at), 3) if record.changed_at else None,
            "place": self._redact.record(record.place),
        }

    async def stack(self, timeout_s: float) -> str:
        """The stacks of all threads, written by a handler in C that needs no help of the interpreter."""
        if self.ended.done():
            return "the worker has ended"
        os.ftruncate(self._stack_fd, 0)
        self.signal(signal.SIGUSR1)
        deadline = time.monotonic() + timeout_s
        size = 0
        while time.monotonic() < deadline:
            await asyncio.sleep(0.03)
            before, size = size, os.fstat(self._stack_fd).st_size
            if size and size == before:
                text = os.pread(self._stack_fd, _MAX_STACK_BYTES, 0).decode(errors="replace")
                return str(self._redact.record(text))
        seen = self.progress()
        return (
            f"no answer within {timeout_s:g} s: process {self.pid} is stopped or in the kernel. "
            f"Last seen {seen['idle_s']} s ago at step {seen['step']}, phase {seen['phase']}, "
            f"collective {seen['collective']} {seen['place']}".rstrip()
        )

    def close(self) -> None:
        """Gives back all descriptors; the process has ended or was never started."""
        self._close_pipes()
        self._progress.close()
        for descriptor in (self._progress_fd, self._stack_fd, self._pidfd):
            if descriptor >= 0:
                os.close(descriptor)
        self._pidfd = -1

    def _read(self, reading: int) -> bool:
        """Whether there may be more to read."""
        try:
            data = os.read(reading, _READ_BYTES)
        except BlockingIOError:
            return False
        if data:
            self._pipes[reading](data)
            return True
        asyncio.get_running_loop().remove_reader(reading)
        del self._pipes[reading]
        os.close(reading)
        return False

    def _feed_report(self, data: bytes) -> None:
        *lines, self._partial = (self._partial + data).split(b"\n")
        if len(self._partial) > MAX_LINE_BYTES:
            self._partial = b""
        for line in lines:
            with contextlib.suppress(ValueError, TypeError, KeyError):  # a worker killed while writing
                self._relay(self._redact.record(json.loads(line)))

    def _relay(self, report: dict[str, Any]) -> None:
        if report["type"] == "ready":
            self._ready = True
            if self._stop_waits:
                self.signal(signal.SIGTERM)
        elif report["type"] == "left":
            self._left = True
        elif report["type"] == "event":
            event = dict(report["event"])
            self._notify({"op": "event", "global_rank": self.env.global_rank, "event": event})
        elif report["type"] == "failure" and not self._failure_reported:
            self._failure_reported = True
            seen = self._progress.read()
            report["step"] = seen.step if report.get("step") is None else report["step"]
            report["phase"] = report.get("phase") or str(seen.phase)
            self._notify({"op": "failure", "global_rank": self.env.global_rank, "report": report})

    def _on_exit(self, status: int) -> None:
        # What it wrote before its end is in the pipes already; processes that it leaves behind may keep them open.
        for reading in list(self._pipes):
            for _ in range(256):
                if not self._read(reading):
                    break
        self._close_pipes()
        self._stdout.finish()
        self._stderr.finish()
        code = os.waitstatus_to_exitcode(status)
        seen = self._progress.read()
        self.ended.set_result(None)
        self._notify(
            {
                "op": "exited",
                "global_rank": self.env.global_rank,
                "code": max(code, 0),
                "signal": max(-code, 0),
                "killed": self._killed,
                "left": self._left,
                "time": time.time(),
                "evidence": list(self._stderr.tail),
                "step": seen.step,
                "done": seen.done,
                "phase": str(seen.phase),
            }
        )

    def _close_pipes(self) -> None:
        for reading in self._pipes:
            asyncio.get_running_loop().remove_reader(reading)
            os.close(reading)
        self._pipes.clear()
