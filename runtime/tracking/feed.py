"""The worker's side of tracking: one process beside global rank 0 that reads metrics.jsonl as it grows.

A process of its own, so that a slow server, a big import or a crash there costs the training nothing.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO

DRAIN_S = 30.0  # how long the end of a run waits for what is still on its way

# What the process needs by name: tracker -> (the module that must be there, the extra that brings it).
PACKAGES = {"tensorboard": ("tensorboard", "tensorboard"), "mlflow": ("mlflow", "mlflow")}


class TrackerFeed:
    """A context manager. `tell` gets what the process has to say, from a thread."""

    def __init__(self, run_dir: Path, trackers: Sequence[str], start_step: int, tell: Callable[[str], None]) -> None:
        argv = [sys.executable, "-P", "-m", "dtrain.runtime.tracking.process"]
        argv += ["--run-dir", str(run_dir), "--start-step", str(start_step), *trackers]
        environ = {name: value for name, value in os.environ.items() if not _is_rank_variable(name)}
        self._process = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environ)
        assert self._process.stdout is not None
        self._listener = threading.Thread(
            target=_relay, args=(self._process.stdout, tell), name="dtrain-tracking", daemon=True
        )
        self._listener.start()

    def close(self) -> None:
        """Waits until everything is delivered, at most DRAIN_S and a little; then it is ended."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()  # its sign that no more comes
        try:
            self._process.wait(DRAIN_S + 10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._listener.join(1.0)

    def __enter__(self) -> TrackerFeed:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        """After an exception nothing waits: what failed must be told at once, and the agent ends what is left."""
        if kind is None:
            self.close()


def _is_rank_variable(name: str) -> bool:
    """MLflow and others read such variables, and would take this process for a rank."""
    return name in ("RANK", "LOCAL_RANK", "WORLD_SIZE") or name.startswith(("GROUP_", "ROLE_", "TORCHELASTIC_"))


def _relay(lines: IO[bytes], tell: Callable[[str], None]) -> None:
    for line in lines:
        with contextlib.suppress(ValueError, KeyError):  # what a library prints is no message of ours
            tell(str(json.loads(line)["tracking"]))
