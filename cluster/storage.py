"""The storage interface: one small protocol behind which file systems and object stores are alike.

Promises that every store keeps, because the commit rule of checkpoints rests on them:
- `put_if_absent` is atomic: of several callers exactly one succeeds, a reader sees all bytes or no object, and what
  was acknowledged survives a crash of the machine.
- an object written through `Writer` does not exist under its name until `commit()`; `abort()` leaves nothing.
- keys are relative, `/`-separated, and never leave the store's root.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Protocol, cast
from urllib.parse import urlsplit

from dtrain.cluster.errors import UsageError


@dataclass(frozen=True, slots=True, kw_only=True)
class ObjectInfo:
    key: str
    size_bytes: int
    modified_at: float  # seconds since the epoch, by the store's clock


class Writer(Protocol):
    """A streaming upload of one object, parts in order. Used as a context manager: an exception aborts."""

    def write(self, data: memoryview) -> None:
        """Appends `data`. The caller may change the memory again as soon as this returns."""

    def commit(self) -> None: ...

    def abort(self) -> None: ...

    def __enter__(self) -> Writer: ...

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None: ...


class Storage(Protocol):
    url: str

    def put_if_absent(self, key: str, data: bytes) -> None:
        """Raises AlreadyExists if the key is taken."""

    def open_writer(self, key: str, size_bytes: int) -> Writer:
        """`size_bytes` is the size of the whole object, for choosing part sizes."""

    def get(self, key: str) -> bytes:
        """Raises FileNotFoundError where there is no such object."""

    def read_into(self, key: str, offset: int, target: memoryview) -> None:
        """Fills `target` from byte `offset` on. Raises FileNotFoundError; StorageError where the object is shorter."""

    def list_dirs(self, prefix: str) -> Sequence[str]:
        """Names directly under the directory `prefix` ("" or ending in "/") that have objects below them, sorted."""

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        """Objects whose key starts with `prefix`, recursively, in key order; uncommitted uploads are not among them."""

    def delete(self, key: str) -> None:
        """No error where there is no such object. Deletions survive a crash in the order in which they were made."""

    def discard_uploads(self, prefix: str, before: float) -> int:
        """Removes what killed processes left behind: uncommitted uploads below the directory `prefix` ("" or ending
        in "/"), last written before `before` (seconds since the epoch, by the store's clock). Returns how many."""


_STORES = {"file": "dtrain.cluster.filestore:FileStorage"}


def open_storage(url: str) -> Storage:
    """The store for a URL; a bare path means `file://`."""
    scheme = urlsplit(url).scheme if "://" in url else "file"
    if scheme not in _STORES:
        raise UsageError(f"checkpoint.url: no store for {scheme}:// ({url}). Known: {', '.join(sorted(_STORES))}://")
    module, _, name = _STORES[scheme].partition(":")
    return cast(Storage, getattr(importlib.import_module(module), name)(url))
