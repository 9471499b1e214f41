"""A process that can be killed between two requests to its store, without a process: for many kills in little time."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace

from dtrain.cluster.storage import ObjectInfo, Storage
from dtrain.runtime.checkpoint.board import LocalBoard


class Killed(BaseException):
    """The process is gone: nothing catches this."""


@dataclass(slots=True)
class Life:
    """How many requests its process still makes; None: it is not killed."""

    left: int | None
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def is_over(self) -> bool:
        return self.left == 0

    def use(self) -> None:
        with self._lock:
            if self.left == 0:
                raise Killed
            if self.left is not None:
                self.left -= 1


class Mortal:
    """A folder ("a/") of a store, as one process sees it: no request is made after its death; one that is under way
    goes on, and its answer is heard by nobody."""

    def __init__(self, store: Storage, folder: str, life: Life) -> None:
        self._store = store
        self._folder = folder
        self._life = life
        self.url = f"{store.url}/{folder}"

    def put_if_absent(self, key: str, data: bytes) -> None:
        self._life.use()
        self._store.put_if_absent(self._folder + key, data)
        self._life.use()

    def upload(self, key: str, data: Iterable[memoryview], size_bytes: int) -> None:
        self._life.use()
        self._store.upload(self._folder + key, data, size_bytes)

    def get(self, key: str) -> bytes:
        self._life.use()
        return self._store.get(self._folder + key)

    def read_into(self, key: str, offset: int, target: memoryview) -> None:
        self._life.use()
        self._store.read_into(self._folder + key, offset, target)

    def stat(self, key: str) -> ObjectInfo | None:
        self._life.use()
        found = self._store.stat(self._folder + key)
        return None if found is None else self._seen(found)

    def list_dirs(self, prefix: str) -> Sequence[str]:
        self._life.use()
        return self._store.list_dirs(self._folder + prefix)

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        self._life.use()
        return map(self._seen, self._store.list(self._folder + prefix))

    def delete(self, *keys: str) -> None:
        for key in keys:
            self._life.use()
            self._store.delete(self._folder + key)

    def discard_uploads(self, prefix: str, before: float) -> int:
        self._life.use()
        return self._store.discard_uploads(self._folder + prefix, before)

    def check_writable(self, timeout_s: float) -> None:
        self._life.use()
        self._store.check_writable(timeout_s)

    def _seen(self, info: ObjectInfo) -> ObjectInfo:
        return replace(info, key=info.key.removeprefix(self._folder))


class MortalBoard(LocalBoard):
    """Nobody waits on it any longer than he lives."""

    def __init__(self, life: Life) -> None:
        super().__init__()
        self._life = life

    def wait(self, key: str, timeout_s: float) -> bytes:
        give_up = time.monotonic() + timeout_s
        while not self._life.is_over:
            try:
                return super().wait(key, 0.05)
            except TimeoutError:
                if time.monotonic() > give_up:
                    raise
        raise Killed
