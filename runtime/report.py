"""What a worker tells its agent: events as they happen, and one failure report before it ends by an exception.

Torch-free: exceptions of torch's collectives are known by their class names and messages.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import sysconfig
import threading
import time
import traceback
from types import TracebackType
from typing import Any

from dtrain.cluster.errors import CorruptCheckpoint, FencedError, UsageError

MAX_LINE_BYTES = 1 << 20
_MAX_MESSAGE = 4000
_MAX_EVIDENCE_LINES = 80

# A rank whose peer died sees one of these. It is a victim: the culprit is elsewhere.
_VICTIM_CLASSES = frozenset({"DistBackendError", "DistNetworkError", "DistStoreError", "HorovodInternalError"})
_VICTIM_MESSAGE = re.compile(
    r"gloo/transport|Connection (closed|reset|refused)|Broken pipe|recvValue failed|failed to (recv|send)"
    r"|Timed out waiting \d+ms for (recv|send)|NCCL.*(remote process|peer)",
    re.IGNORECASE,
)


class Reporter:
    """Writes JSON lines to `fd`; -1, a closed pipe or a dead agent make it silent, never an error."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._lock = threading.Lock()

    def left(self) -> None:
        """The worker's program came to its end; without this word an exit code of 0 says nothing."""
        self._send({"type": "left"})

    def ready(self) -> None:
        """From here on a SIGTERM is kept: the agent sends none before."""
        self._send({"type": "ready"})

    def event(self, kind: str, **fields: Any) -> None:
        """One record for events.jsonl, like `event("checkpoint_committed", step=100, bytes=..., seconds=...)`."""
        self._send({"type": "event", "event": {"type": kind, **fields}})

    def failure(
        self,
        error: BaseException,
        *,
        step: int | None = None,
        phase: str = "",
        kind: str | None = None,
        where: str | None = None,
        victim: bool | None = None,
        retry: bool | None = None,
        data: dict[str, Any] | None = None,
    ) -> None:
        """Why this worker is about to end. What is left out follows from the exception:

        `kind` exception | corrupt_checkpoint | fenced, `victim` whether it looks like a dead peer's doing, `retry`
        False for errors of usage, which would come again.
        """
        known_kind, known_data = _classify(error)
        report = {
            "type": "failure",
            "kind": kind or known_kind,
            "message": _message(error),
            "where": where or _where(error),
            "evidence": _evidence(error),
            "time": time.time(),
            "step": step,
            "phase": phase,
            "victim": is_victim(error) if victim is None else victim,
            "retry": not isinstance(error, UsageError) if retry is None else retry,
            "data": {**known_data, **(data or {})},
        }
        self._send(report)

    def _send(self, record: dict[str, Any]) -> None:
        if self._fd < 0:
            return
        line = json.dumps(record, default=str).encode() + b"\n"
        if len(line) > MAX_LINE_BYTES:
            line = (
                json.dumps({"type": "event", "event": {"type": "report_too_long", "bytes": len(line)}}).encode() + b"\n"
            )
        with self._lock, contextlib.suppress(OSError):
            view = memoryview(line)
            while view:
                view = view[os.write(self._fd, view) :]


def is_victim(error: BaseException) -> bool:
    """Whether an exception looks like the end of somebody else: a lost connection of a collective or the store."""
    names = {kind.__name__ for kind in type(error).__mro__}
    if names & _VICTIM_CLASSES:
        return True
    return isinstance(error, RuntimeError | ConnectionError) and bool(_VICTIM_MESSAGE.search(str(error)))


def _classify(error: BaseException) -> tuple[str, dict[str, Any]]:
    match error:
        case CorruptCheckpoint():
            place = {"step": error.step, "attempt": error.attempt, "file": error.file, "tensor": error.tensor}
            return "corrupt_checkpoint", place
        case FencedError():
            return "fenced", {}
        case _:
            return "exception", {}


def _message(error: BaseException) -> str:
    """Our own errors are written for people: their class adds nothing."""
    ours = getattr(error, "message", str(error)) if _is_our_error(error) else ""
    text = ours or "".join(traceback.format_exception_only(error)).strip()
    return text if len(text) <= _MAX_MESSAGE else text[:_MAX_MESSAGE] + " ..."


def _evidence(error: BaseException) -> list[str]:
    """The traceback's lines without our own frames before the user's; the middle of a long one is left out."""
    if _is_our_error(error):
        parts = _only_users_frames(error)
    else:
        told = traceback.TracebackException.from_exception(error)
        _leave_out_our_beginning(told)
        parts = list(told.format())
    lines = [line for part in parts for line in part.rstrip("\n").split("\n")]
    lines = [line[:1000] for line in lines]
    if len(lines) <= _MAX_EVIDENCE_LINES:
        return lines
    half = _MAX_EVIDENCE_LINES // 2
    return [*lines[:half], f"... {len(lines) - 2 * half} lines ...", *lines[-half:]]


def _only_users_frames(error: BaseException) -> list[str]:
    """Of an error that we raise on purpose: how the user's code came into it, if it did. The message says the rest."""
    cause = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    before = [] if cause is None or not _users_frames(cause) else [*_evidence(cause), ""]
    frames = _users_frames(error)
    told = str(getattr(error, "trace", "")).splitlines()  # of another process, as runtime/data.py's DataError has it
    return before + told + (["Traceback (most recent call last):", *traceback.format_list(frames)] if frames else [])


def _users_frames(error: BaseException) -> list[traceback.FrameSummary]:
    return [frame for frame in traceback.extract_tb(error.__traceback__) if not _is_library(frame.filename)]


def _is_our_error(error: BaseException) -> bool:
    return type(error).__module__.startswith(_OUR_MODULES)


class _Shortened(traceback.StackSummary):
    """A stack that says how many frames before it are not shown."""

    left_out = 0

    def format(self, **options: Any) -> list[str]:
        return [
            f"  ({self.left_out} frame{'s' * (self.left_out != 1)} of dtrain left out)\n",
            *super().format(**options),
        ]


def _leave_out_our_beginning(told: traceback.TracebackException) -> None:
    """In the exception and those that led to it. An error that is all our own keeps its frames."""
    count = next((index for index, frame in enumerate(told.stack) if not _is_ours(frame.filename)), 0)
    if count:
        shortened = _Shortened(told.stack[count:])
        shortened.left_out = count
        told.stack = shortened
    for other in (told.__cause__, told.__context__, *(told.exceptions or ())):
        if other is not None:
            _leave_out_our_beginning(other)


def _where(error: BaseException) -> str:
    """A place in our own code helps nobody where the error is one that we raise on purpose."""
    return "" if _is_our_error(error) and not _users_frames(error) else find_place(error.__traceback__)


def find_place(trace: TracebackType | None) -> str:
    """`file:line` of the innermost frame in the user's own code; the innermost of all where there is none."""
    places = [(frame.filename, frame.lineno) for frame in traceback.extract_tb(trace)]
    own = [place for place in places if not _is_library(place[0])]
    chosen = own or places
    return f"{chosen[-1][0]}:{chosen[-1][1]}" if chosen else ""


def _is_ours(filename: str) -> bool:
    return filename.startswith(_OURS)


def _is_library(filename: str) -> bool:
    return filename.startswith(("<frozen", *_LIBRARIES)) or "site-packages" in filename or "dist-packages" in filename


_OUR_ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
_OUR_FOLDERS = ("cluster", "launcher", "runtime", "slurm", "strategies")  # examples/ is as good as a user's own
_OURS = tuple(f"{_OUR_ROOT}/{name}/" for name in _OUR_FOLDERS)
_OUR_MODULES = tuple(f"dtrain.{name}." for name in _OUR_FOLDERS)
_LIBRARIES = (sysconfig.get_path("stdlib"), *_OURS)
