"""How ranks tell the committer that their files are durable, without a collective."""

from __future__ import annotations

import threading
from typing import Protocol


class Board(Protocol):
    """Small messages between ranks. Each key is set once and waited for once, by rank 0: an implementation may forget
    it then. Used from a background thread."""

    def set(self, key: str, value: bytes) -> None: ...

    def wait(self, key: str, timeout_s: float) -> bytes:
        """Blocks until `key` is set. Raises any exception after `timeout_s` seconds."""


class LocalBoard:
    """A board between threads of one process."""

    def __init__(self) -> None:
        self._values: dict[str, bytes] = {}
        self._changed = threading.Condition()

    def set(self, key: str, value: bytes) -> None:
        with self._changed:
            self._values[key] = value
            self._changed.notify_all()

    def wait(self, key: str, timeout_s: float) -> bytes:
        with self._changed:
            if not self._changed.wait_for(lambda: key in self._values, timeout_s):
                raise TimeoutError(f"nothing under {key!r} after {timeout_s} s")
            return self._values.pop(key)
