"""One log file a node and attempt: every worker's lines, tagged with rank and time, bounded in size.

A line `[date 2026-11-22 +0100]` comes before the first line of each day, so that the times mean one moment everywhere.
Head and tail of an overlong log are kept: the beginning says what was started, the end why it stopped.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from pathlib import Path

MAX_BYTES = 50 << 20
_MAX_LINE_BYTES = 64 << 10
_REDRAW_S = 1.0  # a progress bar redraws its line many times a second: keep one a second
_TAIL_LINES = 40
_DATE = b"[date "


class NodeLog:
    """Lines in order of arrival. When the file is full, the oldest of its second half gives way."""

    def __init__(self, path: Path, max_bytes: int = MAX_BYTES) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = open(path, "ab+", buffering=0)  # noqa: SIM115
        self._size = self._file.seek(0, 2)
        self._max_bytes = max_bytes
        self._dropped = 0
        self._day = ""  # as in the newest date line

    def write(self, tag: str, line: bytes, now: float | None = None) -> None:
        moment = time.time() if now is None else now
        local = time.localtime(moment)
        stamp = time.strftime("%H:%M:%S", local) + f".{int(moment * 1000) % 1000:03d}"
        record = self._new_day(time.strftime("%Y-%m-%d %z", local)) + f"[{tag} {stamp}] ".encode() + line + b"\n"
        try:
            self._file.write(record)
            self._size += len(record)
            if self._size > self._max_bytes:
                self._compact()
        except OSError:
            self._dropped += len(record)  # a full disk must not end the training; what fits later is written

    def close(self) -> None:
        self._file.close()

    def _new_day(self, day: str) -> bytes:
        if day == self._day:
            return b""
        self._day = day
        return _DATE + day.encode() + b"]\n"

    def _compact(self) -> None:
        head = self._whole_lines(0, self._max_bytes // 2)
        tail = self._whole_lines(self._size - self._max_bytes // 4, self._max_bytes // 4)
        tail = tail.partition(b"\n")[2]
        self._dropped += self._size - len(head) - len(tail)
        note = f"[... about {self._dropped} bytes left out: a log is kept to {self._max_bytes} bytes ...]\n".encode()
        note += self._newest_date(len(head), self._size - len(tail))
        self._file.truncate(len(head))
        self._file.write(note + tail)
        self._size = len(head) + len(note) + len(tail)

    def _newest_date(self, start: int, end: int) -> bytes:
        """The last date line of a part of the file, empty where no day began in it."""
        self._file.seek(start)
        _, found, rest = (b"\n" + self._file.read(end - start)).rpartition(b"\n" + _DATE)
        return _DATE + rest.partition(b"\n")[0] + b"\n" if found else b""

    def _whole_lines(self, start: int, size: int) -> bytes:
        self._file.seek(start)
        return self._file.read(size).rpartition(b"\n")[0] + b"\n"


class LineSplitter:
    """Bytes of one stream -> lines for the log. Keeps the last lines as evidence."""

    def __init__(
        self,
        emit: Callable[[bytes], None],
        clock: Callable[[], float] = time.monotonic,
        redact: Callable[[bytes], bytes] = bytes,
    ) -> None:
        self._emit = emit
        self._redact = redact
        self._clock = clock
        self._rest = b""
        self._redrawn_at = clock()
        self.tail: deque[str] = deque(maxlen=_TAIL_LINES)

    def feed(self, data: bytes) -> None:
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            self._line(_last_drawing(line))
        self._redraw()
        while len(self._rest) > _MAX_LINE_BYTES:
            self._line(self._rest[:_MAX_LINE_BYTES])
            self._rest = self._rest[_MAX_LINE_BYTES:]

    def finish(self) -> None:
        """A last line without its newline."""
        if rest := _last_drawing(self._rest):
            self._line(rest)
        self._rest = b""

    def _redraw(self) -> None:
        """A line that is drawn over and over: what was drawn over is dropped, now and then the newest is shown."""
        drawn, separator, latest = self._rest.rpartition(b"\r")
        if not separator:
            return
        now = self._clock()
        if _last_drawing(drawn) and now - self._redrawn_at >= _REDRAW_S:
            self._redrawn_at = now
            self._line(_last_drawing(drawn))
        # An empty part means that the drawing itself ended in a carriage return: it may be the final one.
        self._rest = latest or _last_drawing(drawn) + b"\r"

    def _line(self, line: bytes) -> None:
        line = self._redact(line)
        for start in range(0, max(1, len(line)), _MAX_LINE_BYTES):
            part = line[start : start + _MAX_LINE_BYTES]
            self.tail.append(part.decode(errors="replace"))
            self._emit(part)


def _last_drawing(line: bytes) -> bytes:
    """What a terminal would show of a line with carriage returns in it."""
    return next((part for part in reversed(line.split(b"\r")) if part), b"")
