"""A worker's progress record: shared memory that the worker writes in a microsecond and its agent reads at any time,
also when the worker is stuck, stopped or dead. What follows from it (hang, culprit) is decided elsewhere.
"""

from __future__ import annotations

import contextlib
import enum
import mmap
import os
import struct
import time
from dataclasses import dataclass

SIZE_BYTES = 512
_PLACE_BYTES = 256
# attempt, global_rank, step, done, collective, phase, changed_at; then length and text of the place
_HEAD = struct.Struct("=IIQQQId")
_PLACE = struct.Struct(f"=H{_PLACE_BYTES}s")


class Phase(enum.IntEnum):
    STARTING = 0
    RESTORING = 1
    DATA = 2
    FORWARD = 3
    BACKWARD = 4
    OPTIMIZER = 5
    EVALUATING = 6
    SAVING = 7
    FINISHING = 8
    WAITING = 9  # for the other ranks, before a step
    SCRIPT = 10  # a script's own code, of which nobody can tell more

    def __str__(self) -> str:
        return self.name.lower()


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    attempt: int
    global_rank: int
    step: int  # the step being worked on; 0 before the first
    done: int  # the newest finished step
    phase: Phase
    collective: int  # collectives entered since the worker started
    changed_at: float  # time.monotonic() of this machine
    place: str  # where in the user's code, "" if unknown


def create_record(name: str) -> int:
    """A new record's file descriptor (memory only, no path, not inherited unless passed on)."""
    descriptor = os.memfd_create(name, os.MFD_CLOEXEC)
    os.ftruncate(descriptor, SIZE_BYTES)
    return descriptor


class ProgressWriter:
    """The worker's end. `fd` -1 (nobody watches): every call does nothing but keep count."""

    def __init__(self, fd: int, *, attempt: int = 0, global_rank: int = 0) -> None:
        self._memory = mmap.mmap(fd, SIZE_BYTES) if fd >= 0 else mmap.mmap(-1, SIZE_BYTES)
        self._attempt = attempt
        self._global_rank = global_rank
        self._step = 0
        self._done = 0
        self._collective = 0
        self._phase = Phase.STARTING
        self._write()

    def step(self, step: int) -> None:
        """Work on `step` (from 1) begins; the one before it is finished."""
        self._step = step
        self._done = step - 1
        self._write()

    def done(self, step: int) -> None:
        """`step` is finished."""
        self._done = step
        self._write()

    def phase(self, phase: Phase) -> None:
        self._phase = phase
        self._write()

    def collective(self) -> None:
        """One more collective is entered."""
        self._collective += 1
        self._write()

    def place(self, place: str) -> None:
        """Where in the user's code, like `train.py:31`; cut to 256 bytes."""
        text = place.encode()[:_PLACE_BYTES]
        self._write(_PLACE.pack(len(text), text))

    def _write(self, place: bytes = b"") -> None:
        head = _HEAD.pack(
            self._attempt,
            self._global_rank,
            self._step,
            self._done,
            self._collective,
            self._phase,
            time.monotonic(),
        )
        # One copy of a few words, without a lock: a read that meets it may mix two neighbouring moments, no more.
        self._memory[: _HEAD.size] = head
        if place:
            self._memory[_HEAD.size : _HEAD.size + len(place)] = place


class ProgressReader:
    """The agent's end. Owns a mapping, not the descriptor."""

    def __init__(self, fd: int) -> None:
        self._memory = mmap.mmap(fd, SIZE_BYTES, prot=mmap.PROT_READ)

    def read(self) -> Progress:
        return _decode(self._memory[:SIZE_BYTES])

    def close(self) -> None:
        with contextlib.suppress(BufferError):
            self._memory.close()


def _decode(raw: bytes) -> Progress:
    attempt, global_rank, step, done, collective, phase, changed_at = _HEAD.unpack_from(raw)
    length, place = _PLACE.unpack_from(raw, _HEAD.size)
    known = phase in Phase._value2member_map_
    return Progress(
        attempt=attempt,
        global_rank=global_rank,
        step=step,
        done=done,
        phase=Phase(phase) if known else Phase.STARTING,
        collective=collective,
        changed_at=changed_at,
        place=place[:length].decode(errors="replace"),
    )
