"""SIGTERM as a flag, from a worker's first moments on: a stop that comes while it still starts is neither lost nor
fatal. Who looks at the flag, and what follows from it, is the worker's."""

from __future__ import annotations

import signal
import threading
from types import FrameType


class StopFlag:
    """A signal handler that remembers, nothing more."""

    def __init__(self) -> None:
        self._came = threading.Event()

    def __call__(self, number: int, frame: FrameType | None) -> None:
        self._came.set()

    def is_set(self) -> bool:
        return self._came.is_set()


def stop_flag() -> StopFlag:
    """The process's flag for SIGTERM: the one that its first moments have installed, or a new one."""
    installed = signal.getsignal(signal.SIGTERM)
    if isinstance(installed, StopFlag):
        return installed
    flag = StopFlag()
    signal.signal(signal.SIGTERM, flag)
    return flag
