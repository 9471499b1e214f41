"""The tracking process: follows metrics.jsonl and evaluations.jsonl and delivers each record to each tracker once.

    python -m dtrain.runtime.tracking.process --run-dir DIR --start-step N TRACKER ...

Ends when its standard input does, after a last delivery. A tracker that can't be reached is told of once and tried
again with growing pauses; the others and the training go on.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import json
import os
import select
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any, Protocol

from dtrain.cluster.procs import set_process_name
from dtrain.cluster.rundir import RunDir
from dtrain.runtime.tracking.feed import DRAIN_S

Record = dict[str, Any]
MAKERS = {
    "tensorboard": "dtrain.runtime.tracking.tensorboard:TensorBoardTracker",
    "mlflow": "dtrain.runtime.tracking.mlflow:MlflowTracker",
}
_POLL_S = 1.0
_MAX_PAUSE_S = 60.0
_BATCH = 500  # records handed over at once: what a run of days has to catch up on goes in pieces


class Tracker(Protocol):
    def log(self, records: Sequence[Record]) -> None:
        """Records of metrics.jsonl in their order, and those of evaluations.jsonl with their numbers under `eval`: none
        is later than the newest step so far. Called again with the same ones after an exception."""

    def close(self) -> None: ...


class Delivery:
    """One tracker and how far in the files it is. They were made before this process: a later attempt replaces them,
    and what is open here stays this attempt's."""

    def __init__(self, name: str, make: Callable[[], Tracker], run: RunDir, tell: Callable[[str], None]) -> None:
        self._name = name
        self._make = make
        self._tell = tell
        self._metrics = open(run.metrics, "rb")  # noqa: SIM115  closed by close()
        self._evaluations = open(run.evaluations, "rb") if run.evaluations.exists() else io.BytesIO()  # noqa: SIM115
        self._tracker: Tracker | None = None
        self._pending: list[Record] = []
        self._pause_s = 0.0
        self._retry_at = 0.0

    def deliver(self) -> bool:
        """Hands over what there is; True where nothing is left."""
        if time.monotonic() < self._retry_at:
            return False
        while self._pending or self._read():
            try:
                if self._tracker is None:
                    self._tracker = self._make()
                self._tracker.log(self._pending)
            except Exception as error:
                self._put_off(error)
                return False
            self._pending = []
            if self._pause_s:
                self._pause_s = 0.0
                self._tell(f"{self._name} is reached again")
        return True

    def close(self) -> None:
        self._metrics.close()
        self._evaluations.close()
        if self._tracker is not None:
            try:
                self._tracker.close()
            except Exception as error:
                self._tell(f"{self._name}: {_words(error)}")

    def _read(self) -> bool:
        """Evaluations last: those up to the newest step read before are all there by then."""
        self._pending = list(_records(self._metrics, _BATCH))
        for record in _records(self._evaluations, _BATCH):
            numbers = {key: value for key, value in record.items() if key not in ("step", "attempt")}
            self._pending.append({"step": record["step"], "eval": numbers})
        return bool(self._pending)

    def _put_off(self, error: Exception) -> None:
        if not self._pause_s:
            self._tell(f"{self._name}: {_words(error)}. The training goes on; metrics.jsonl keeps everything")
        self._pause_s = min(_MAX_PAUSE_S, 2 * self._pause_s or 1.0)
        self._retry_at = time.monotonic() + self._pause_s


def _records(file: IO[bytes], limit: int) -> Iterator[Record]:
    """Whole lines only: the last one may still be growing."""
    for _ in range(limit):
        place = file.tell()
        line = file.readline()
        if not line.endswith(b"\n"):
            file.seek(place)
            return
        with contextlib.suppress(ValueError):
            record = json.loads(line)
            if isinstance(record, dict) and isinstance(record.get("step"), int):
                yield record


def _words(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:300]}" if text else type(error).__name__


def flat_numbers(record: Record) -> dict[str, float]:
    """The numbers of a record by name, nested ones as `eval/loss`; what is not finite, or no number, is left out."""
    found: dict[str, float] = {}
    for key, value in record.items():
        if isinstance(value, dict):
            found |= {f"{key}/{name}": number for name, number in flat_numbers(value).items()}
        elif isinstance(value, int | float) and not isinstance(value, bool) and key not in ("step", "attempt"):
            found[key] = float(value)
    return found


def _tell(message: str) -> None:
    with contextlib.suppress(OSError, ValueError):  # nobody listens any more
        print(json.dumps({"tracking": message}), flush=True)


def follow(deliveries: Sequence[Delivery], ended: Callable[[float], bool]) -> None:
    """`ended(seconds)` waits up to so long for the sign that no more comes."""
    while not ended(_POLL_S):
        for delivery in deliveries:
            delivery.deliver()
    deadline = time.monotonic() + DRAIN_S
    left = list(deliveries)
    while (left := [delivery for delivery in left if not delivery.deliver()]) and time.monotonic() < deadline:
        time.sleep(0.2)
    for delivery in deliveries:
        delivery.close()


def _stdin_ended(timeout_s: float) -> bool:
    readable, _, _ = select.select([0], [], [], timeout_s)
    return bool(readable) and not os.read(0, 4096)


def main() -> None:
    parser = argparse.ArgumentParser(description="follows a run's metrics; workers start this")
    parser.add_argument("--run-dir", required=True, type=Path)
    parser.add_argument("--start-step", required=True, type=int)
    parser.add_argument("trackers", nargs="+", choices=sorted(MAKERS))
    options = parser.parse_args()
    set_process_name("dtrain tracking")
    for number in (signal.SIGTERM, signal.SIGINT):  # a stop is the worker's affair, which ends us when it has ended
        signal.signal(number, signal.SIG_IGN)
    os.nice(5)
    run = RunDir(options.run_dir)

    def maker(name: str) -> Callable[[], Tracker]:
        def make() -> Tracker:
            module, _, attribute = MAKERS[name].partition(":")
            tracker: Tracker = getattr(importlib.import_module(module), attribute)(run, options.start_step)
            return tracker

        return make

    follow([Delivery(name, maker(name), run, _tell) for name in options.trackers], _stdin_ended)
    sys.stdout.flush()


if __name__ == "__main__":
    main()
