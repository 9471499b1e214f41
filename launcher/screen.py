"""Where a followed run is shown: a progress bar on a terminal, plain lines elsewhere. Words: launcher/console.py."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol, TextIO

from dtrain.launcher.console import Said, Tone, duration, metric_line, number, plain_interval, throughput

QUIET_LIMIT_S = 60.0  # slow steps: a plain line at least this often
SLOW_S = 2.0  # what takes longer is worth a plain line
CROWDED_S = 2.0  # quick steps: never two plain lines within this


class Screen(Protocol):
    def say(self, said: Said) -> None: ...

    def metric(self, record: Mapping[str, Any]) -> None:
        """One finished step, in order."""

    def waiting(self, waited_s: float, words: str) -> None:
        """No step comes, for so long; called again and again while that lasts. No words: that is over."""

    def close(self) -> None: ...


def make_screen(steps: int | None, stream: TextIO | None = None) -> Screen:
    target = sys.stdout if stream is None else stream
    if target.isatty() and os.environ.get("TERM", "") not in ("", "dumb"):
        return TerminalScreen(steps, target)
    return PlainScreen(steps, target)


@contextmanager
def saying(words: str, stream: TextIO | None = None) -> Iterator[None]:
    """Says on a terminal what is being done, as long as it is; elsewhere only where it takes a while."""
    target = sys.stderr if stream is None else stream
    if target.isatty() and os.environ.get("TERM", "") not in ("", "dumb"):
        print(words, end="", file=target, flush=True)
        try:
            yield
        finally:
            print("\r\x1b[2K", end="", file=target, flush=True)
        return
    timer = threading.Timer(SLOW_S, print, args=(words,), kwargs={"file": target, "flush": True})
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


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
        self._next_wait_s = 0.0

    def say(self, said: Said) -> None:
        print(said.text, file=self._stream, flush=True)

    def metric(self, record: Mapping[str, Any]) -> None:
        self.waiting(0.0, "")
        eta_s = self._eta.update(record)
        since_s = self._clock() - self._shown_at
        edge = record.get("attempt") != self._attempt or record["step"] == self._steps
        due = record["step"] % self._every == 0 and since_s >= CROWDED_S
        if edge or due or since_s > QUIET_LIMIT_S:
            self._attempt = record.get("attempt")
            self._shown_at = self._clock()
            print(metric_line(record, self._steps, eta_s), file=self._stream, flush=True)

    def waiting(self, waited_s: float, words: str) -> None:
        if not words:
            self._next_wait_s = 0.0
        elif waited_s >= self._next_wait_s:
            self._next_wait_s = 2 * waited_s
            print(words, file=self._stream, flush=True)

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
        self._right = ""  # of the newest step
        self._waits = False

    def say(self, said: Said) -> None:
        from rich.text import Text

        self._console.print(Text(said.text, style=_STYLES[said.tone]), soft_wrap=True)

    def metric(self, record: Mapping[str, Any]) -> None:
        eta_s = self._eta.update(record)
        left = f"step {record['step']}/{self._steps or '?'}"
        parts = [f"loss {number(record, 'loss')}", throughput(record)]
        parts += [f"ETA {duration(eta_s)}"] if eta_s is not None and record["step"] != self._steps else []
        right = "  ".join(filter(None, parts))
        self._draw(right, completed=record["step"], left=left)
        self._right, self._waits = right, False

    def waiting(self, waited_s: float, words: str) -> None:
        if words or self._waits:
            self._draw(words or self._right)
        self._waits = bool(words)

    def _draw(self, right: str, **fields: Any) -> None:
        if self._task is None:  # the bar appears with the first step or wait, not while processes start
            left = f"step 0/{self._steps or '?'}"
            self._task = self._progress.add_task("", total=self._steps, **{"left": left, **fields}, right=right)
            self._progress.start()
        self._progress.update(self._task, right=right, **fields)

    def close(self) -> None:
        self._progress.stop()


_STYLES: dict[Tone, str] = {"plain": "", "quiet": "dim", "good": "green", "bad": "bold red"}
