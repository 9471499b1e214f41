"""Clients that can be killed: the processes of slurmclient.py, which are quick to start."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol


class Clients:
    """Starts them quickly, as forks of a process that has imported what a client of this engine needs."""

    def __init__(self, folder: Path, engine: str = "") -> None:
        self._folder = folder
        self._lock = threading.Lock()
        self._count = 0
        self._server = subprocess.Popen(
            [sys.executable, str(Path(__file__).parent / "slurmclient.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "CLIENT_ENGINE": engine},
        )

    def start(self, words: tuple[str, ...], environ: dict[str, str], *, whole: bool) -> Client:
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        with self._lock:
            self._count += 1
            output = self._folder / f"client-{self._count}"
            request = {"words": words, "environ": environ, "output": str(output), "whole": whole}
            print(json.dumps(request), file=self._server.stdin, flush=True)
            return Client(int(self._server.stdout.readline()), output)

    def close(self) -> None:
        self._server.communicate()


@dataclass
class Client:
    pid: int
    output: Path

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)

    def wait(self) -> str:
        """What it said."""
        deadline = time.monotonic() + 120
        while Path(f"/proc/{self.pid}").exists():
            assert time.monotonic() < deadline, f"client {self.pid} hangs: {self.output.read_text()}"
            time.sleep(0.02)
        return self.output.read_text().strip() if self.output.exists() else ""


class Schedule(Protocol):
    """What clients did, drawn at random by `seed`."""

    seed: int
    log: list[str]


def failures_of(schedules: Sequence[Schedule], found: Iterable[Sequence[str]]) -> list[str]:
    """`found`: what is wrong with each of the schedules. A text for each with which something is, and what it did."""
    return [
        "\n  ".join([f"schedule {number}, seed {schedule.seed}: {wrong}", *schedule.log])
        for number, (schedule, wrong) in enumerate(zip(schedules, found, strict=True))
        if wrong
    ]
