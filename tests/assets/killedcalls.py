"""What befalls a client of an HTTP API at one of its requests, below all code of its own: REQUEST_FAULT, at the
REQUEST_AT-th. The file REQUEST_LATE is there as long as a request of a dead client is still on its way."""

from __future__ import annotations

import itertools
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

FAULTS = ("killed before", "killed while", "killed after", "arrives late", "is cut", "no answer")
_LATE_S = 0.7


def install() -> None:
    """Raises ImportError without urllib3."""
    import urllib3.connection

    fault, at, late = os.environ["REQUEST_FAULT"], int(os.environ["REQUEST_AT"]), Path(os.environ["REQUEST_LATE"])
    kind = urllib3.connection.HTTPConnection
    send, receive = kind.request, kind.getresponse
    numbers = itertools.count(1)
    struck: list[object] = []  # the connection whose answer is to be hurt

    def request(self: Any, *args: Any, **options: Any) -> Any:
        if next(numbers) != at:
            return send(self, *args, **options)
        match fault:
            case "killed before":
                _die()
            case "killed while":
                send(self, *args, **options)
                _die()
            case "arrives late":
                _leave(lambda: (send(self, *args, **options), receive(self)), late)
            case "is cut":
                raise ConnectionResetError("cut")
        struck.append(self)
        return send(self, *args, **options)

    def getresponse(self: Any) -> Any:
        answer = receive(self)
        if self in struck:
            struck.clear()
            if fault == "killed after":
                _die()
            raise ConnectionResetError("cut")
        return answer

    kind.request, kind.getresponse = request, getresponse  # type: ignore[method-assign]


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _leave(work: Callable[[], object], mark: Path) -> None:
    """As when what a dead machine has sent is still in the network."""
    mark.touch()
    if os.fork():
        _die()
    try:
        for place in Path("/proc/self/fd").iterdir():
            if place.is_symlink() and os.readlink(place).endswith(".lock"):
                os.close(int(place.name))  # the dead hold no locks
        time.sleep(_LATE_S)
        work()
    finally:
        mark.unlink()
        os._exit(0)
