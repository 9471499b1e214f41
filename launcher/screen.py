"""Where a followed run is shown: a progress bar on a terminal, plain lines elsewhere. Words: launcher/console.py."""

from __future__ import annotations

import os
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any, Protocol, TextIO

from dtrain.launcher.console import Said, Tone, duration, metric_line, number, plain_interval, throughput

QUIET_LIMIT_S = 60.0  # slow steps: a plain line at least this often


class Screen(Protocol):
    def say(self, said: Said) -> None: ...

    def metric(self, record: Mapping[str, Any]) -> None:
        """One finished step, in order."""

    def close(self) -> None: ...


def make_screen(steps: int | None, stream: TextIO | None = None) -> Screen:
    target = sys.stdout if stream is None else stream
    if target.isatty() and os.environ.get("TERM", "") not in ("", "dumb"):
        return TerminalScreen(steps, target)
    return PlainScreen(steps, target)


class Eta:
    """Seconds to the last step, from the pace of the newest steps."""

    def __init__(self, steps: int | None) -> None:
        self._steps = steps
        self._pace: deque[float] = deque(maxlen=20)

    def update(self, record: Mapping[str, Any]) -> float | None:
        if isinstance(record.get("step_s"), int | float):
            self._pace.append(record["step_s"])
        if not self._pace or not self._steps:
            return None
        middle = sorted(self._pace)[len(self._pace) // 2]  # the median: saves and evaluations do not count
        return middle * max(0, self._steps - int(record["step"]))


class PlainScreen:
    """A line every so many steps, the first of each attempt and the last of the run; events in between."""

    def __init__(self, steps: int | None, stream: TextIO, clock: Callable[[], float] = time.monotonic) -> None:
        self._steps = steps
        self._stream = stream
        self._clock = clock
        self._every = plain_interval(steps)
        self._eta = Eta(steps)
        self._attempt: int | None = None
        self._shown_at = clock()

    def say(self, said: Said) -> None:
        print(said.text, file=self._stream, flush=True)

    def metric(self, record: Mapping[str, Any]) -> None:
        eta_s = self._eta.update(record)
        first = record.get("attempt") != self._attempt
        due = record["step"] % self._every == 0 or record["step"] == self._steps
        if first or due or self._clock() - self._shown_at > QUIET_LIMIT_S:
            self._attempt = record.get("attempt")
            self._shown_at = self._clock()
            print(metric_line(record, self._steps, eta_s), file=self._stream, flush=True)

    def close(self) -> None:
        self._stream.flush()


class TerminalScreen:
    """A bar on the last line, events scroll above it."""

    def __init__(self, steps: int | None, stream: TextIO) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn

        self._console = Console(file=stream, highlight=False, markup=False, emoji=False)
        columns = (TextColumn("{task.fields[left]}"), BarColumn(bar_width=24), TextColumn("{task.fields[right]}"))
        self._progress = Progress(*columns, console=self._console, refresh_per_second=8, redirect_stderr=False)
        self._steps = steps
        self._eta = Eta(steps)
        self._task: Any = None

    def say(self, said: Said) -> None:
        from rich.text import Text

        self._console.print(Text(said.text, style=_STYLES[said.tone]), soft_wrap=True)

    def metric(self, record: Mapping[str, Any]) -> None:
        eta_s = self._eta.update(record)
        left = f"step {record['step']}/{self._steps or '?'}"
        parts = [f"loss {number(record, 'loss')}", throughput(record)]
        parts += [f"ETA {duration(eta_s)}"] if eta_s is not None and record["step"] != self._steps else []
        right = "  ".join(filter(None, parts))
        if self._task is None:  # the bar appears with the first step, not while processes start
            self._task = self._progress.add_task("", total=self._steps, left=left, right=right)
            self._progress.start()
        self._progress.update(self._task, completed=record["step"], left=left, right=right)

    def close(self) -> None:
        self._progress.stop()


_STYLES: dict[Tone, str] = {"plain": "", "quiet": "dim", "good": "green", "bad": "bold red"}
