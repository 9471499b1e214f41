"""What can go wrong between a client and the API server, on a test's order."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, field

from kubeserver_store import Refused


class Cut(Exception):
    """The connection ends without an answer."""


@dataclass(slots=True, kw_only=True)
class _Fault:
    kind: str
    verb: str | None
    resource: str | None
    calls: int  # that it still strikes
    skip: int = 0  # that it lets go first
    status: int = 0
    retry_after_s: int | None = None
    seconds: float = 0.0


@dataclass(slots=True)
class Faults:
    """`verb`: get, list, watch, create, update, patch, delete, deletecollection; `resource`: pods, pods/log, jobs, ...;
    None: any. Faults strike the next `calls` that fit, after `skip` of them; clear() ends all."""

    calls: list[tuple[str, str]] = field(default_factory=list)  # (verb, resource) of every request so far
    _faults: list[_Fault] = field(default_factory=list)
    _down: threading.Event = field(default_factory=threading.Event)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def go_down(self) -> None:
        """Nothing is answered any more and streams end; controllers and nodes go on."""
        self._down.set()

    def come_up(self) -> None:
        self._down.clear()

    @property
    def down(self) -> bool:
        return self._down.is_set()

    def cut(self, verb: str | None = None, resource: str | None = None, *, calls: int = 1, skip: int = 0) -> None:
        """The connection breaks before anything is done."""
        self._add("cut", verb, resource, calls, skip)

    def lose_answer(
        self, verb: str | None = None, resource: str | None = None, *, calls: int = 1, skip: int = 0
    ) -> None:
        """All is done, and then the connection breaks."""
        self._add("lose", verb, resource, calls, skip)

    def answer(
        self, status: int, verb: str | None = None, resource: str | None = None, *, calls: int = 1, skip: int = 0,
        retry_after_s: int | None = None,
    ) -> None:  # fmt: skip
        """Such as 429, 500, 503; nothing is done."""
        self._add("answer", verb, resource, calls, skip, status=status, retry_after_s=retry_after_s)

    def delay(self, seconds: float, verb: str | None = None, resource: str | None = None, *, calls: int = 1) -> None:
        self._add("delay", verb, resource, calls, 0, seconds=seconds)

    def clear(self) -> None:
        with self._lock:
            self._faults.clear()
            self.calls.clear()
        self.come_up()

    def _add(
        self, kind: str, verb: str | None, resource: str | None, calls: int, skip: int, *, status: int = 0,
        retry_after_s: int | None = None, seconds: float = 0.0,
    ) -> None:  # fmt: skip
        fault = _Fault(
            kind=kind, verb=verb, resource=resource, calls=calls, skip=skip, status=status,
            retry_after_s=retry_after_s, seconds=seconds,
        )  # fmt: skip
        with self._lock:
            self._faults.append(fault)

    def before(self, verb: str, resource: str) -> bool:
        """Strikes a request; whether its answer is to be lost. Raises Cut and Refused."""
        if self.down:
            raise Cut
        lose = False
        for fault in self._due(verb, resource):
            match fault.kind:
                case "cut":
                    raise Cut
                case "lose":
                    lose = True
                case "delay":
                    time.sleep(fault.seconds)
                case "answer":
                    raise _refused(fault)
        return lose

    def _due(self, verb: str, resource: str) -> list[_Fault]:
        with self._lock:
            self.calls.append((verb, resource))
            due = []
            for fault in self._faults:
                if fault.verb not in (None, verb) or fault.resource not in (None, resource) or not fault.calls:
                    continue
                if fault.skip:
                    fault.skip -= 1
                else:
                    fault.calls -= 1
                    due.append(fault)
            return due


def _refused(fault: _Fault) -> Refused:
    reasons = {429: "TooManyRequests", 500: "InternalError", 503: "ServiceUnavailable", 504: "Timeout", 410: "Expired"}
    words = {
        429: "Too many requests, please try again later.",
        500: "Internal error occurred: etcdserver: leader changed",
        503: "the server is currently unable to handle the request",
        410: "The provided resource version is too old.",
    }
    reason = reasons.get(fault.status, "Unknown")
    return Refused(fault.status, reason, words.get(fault.status, reason), retry_after_s=fault.retry_after_s)
