"""On a node, the thread of the agent that keeps its copy of a run directory in an object store alike with that.

It sends what the node's processes have written about once a second, and fetches the job's records. A store that does
not answer holds up nobody but who has asked for `flush`: the copy is sent when it answers again.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

from dtrain.cluster.mirror import VARIABLE, Mirror, is_url, mirror_of, patiently
from dtrain.cluster.rundir import RunDir
from dtrain.cluster.scratch import Hold, hold
from dtrain.runtime.options import Options

_PACE_S = 1.0
_FETCH_S = 1.0  # between two looks at the records
_LOOK_S = 0.1  # for a worker that waits
_LAST_S = 20.0  # for what is left when the agent ends
_JOIN_S = 5.0
_PATIENCE_S = 120.0  # with what nothing goes on without
_WORKER_S = 300.0
_FLUSH = ".flush"  # a folder of the copy: a worker's file in it goes when all that was written before is in the store


class Mirroring:
    """Does nothing for a run directory that is a folder. Close it once."""

    def __init__(self, options: Options) -> None:
        """Raises StorageError, UsageError where the run directory can't be had."""
        self._held: Hold | None = None
        self._mirror: Mirror | None = None
        if not is_url(options.run_dir):
            return
        if not os.environ.get(VARIABLE):  # else who started this has made a copy
            self._held = hold(f"run-{options.job_id}-{options.node_rank}", lambda folder: None)
            os.environ[VARIABLE] = str(self._held.path)
        self._mirror = mirror = mirror_of(RunDir(options.run_dir).path)
        assert mirror is not None
        mirror.load()
        mirror.job_id = options.job_id
        patiently(mirror.refresh, _PATIENCE_S)
        self._woken = threading.Condition()
        self._asked = self._done = 0  # rounds
        self._closing = False
        mirror.wake = self._wake
        self._thread = threading.Thread(target=self._run, name="dtrain-mirror", daemon=True)
        self._thread.start()

    def _wake(self) -> None:
        with self._woken:
            self._asked += 1
            self._woken.notify_all()

    def flush(self, timeout_s: float) -> bool:
        """Blocks until all that was written before is in the store; False after `timeout_s`."""
        if self._mirror is None:
            return True
        with self._woken:
            self._asked += 1
            wanted = self._asked
            self._woken.notify_all()
            return self._woken.wait_for(lambda: self._done >= wanted, timeout_s)

    def take_over(self) -> None:
        """What rank 0 goes on with, which may have been written on another node. Blocks. Raises StorageError."""
        if (mirror := self._mirror) is not None:
            patiently(lambda: mirror.fetch_growing("metrics.jsonl", "evaluations.jsonl"), _PATIENCE_S)

    def close(self) -> None:
        if self._mirror is not None:
            sent = self.flush(_LAST_S)
            with self._woken:
                self._closing = True
                self._woken.notify_all()
            if not sent:
                _say("the store of the run directory did not take the last lines")
            self._thread.join(_JOIN_S)
        if self._held is not None:
            self._held.close()

    def _run(self) -> None:
        assert self._mirror is not None
        fetched_at, silent = 0.0, False
        while not self._closing:
            with self._woken:
                asked = self._asked
            waiting = self._waiting()
            try:
                self._mirror.push()
                if time.monotonic() - fetched_at > _FETCH_S:
                    self._mirror.refresh()
                    fetched_at = time.monotonic()
                if silent:
                    _say("the store of the run directory answers again")
                silent = False
            except Exception as error:  # without this thread nothing would be safe any more
                if not silent:
                    _say(f"the store of the run directory is asked again and again: {error}")
                silent = True
                time.sleep(_LOOK_S)  # for one that refuses at once
            else:
                for path in waiting:
                    path.unlink(missing_ok=True)
                with self._woken:
                    self._done = asked
                    self._woken.notify_all()
            self._rest(asked)

    def _waiting(self) -> list[Path]:
        assert self._mirror is not None
        with contextlib.suppress(FileNotFoundError):
            return list((self._mirror.top / _FLUSH).iterdir())
        return []

    def _rest(self, asked: int) -> None:
        until = time.monotonic() + _PACE_S
        with self._woken:
            while not self._closing and self._asked == asked and time.monotonic() < until and not self._waiting():
                self._woken.wait(_LOOK_S)


def before_commit(run: RunDir) -> Callable[[], None]:
    """For a worker: blocks until what it has written so far is safe, so that whoever goes on from the checkpoint that
    it is about to commit finds the steps before it. At once where the run directory is a folder."""
    if (mirror := mirror_of(run.path)) is None:
        return lambda: None
    folder = mirror.top / _FLUSH

    def wait() -> None:
        folder.mkdir(exist_ok=True)
        mark = folder / f"{os.getpid()}-{time.monotonic_ns()}"
        mark.touch()
        deadline = time.monotonic() + _WORKER_S
        while mark.exists() and time.monotonic() < deadline:
            time.sleep(_LOOK_S / 5)

    return wait


def _say(text: str) -> None:
    with contextlib.suppress(OSError):
        print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)
