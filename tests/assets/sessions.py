"""The processes of sessions: those that an agent, its session's leader, has started."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Container

import psutil


def processes_of(leaders: Container[int]) -> list[psutil.Process]:
    """Looked up anew: psutil.process_iter hands out what it remembers, under a number that may be another's now."""
    found = []
    for pid in psutil.pids():
        with contextlib.suppress(OSError, psutil.NoSuchProcess):  # it has ended meanwhile
            if os.getsid(pid) in leaders:
                found.append(psutil.Process(pid))
    return found
