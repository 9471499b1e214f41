"""The storage interface: one small protocol behind which file systems and object stores are alike.

Promises that every store keeps, because the commit rule of checkpoints rests on them:
- `put_if_absent` is atomic: of several callers exactly one succeeds, a reader sees all bytes or no object, and what
  was acknowledged survives a crash of the machine.
- an object that is being uploaded does not exist under its name until `upload` has all of it; one that fails or is
  killed leaves nothing that can be seen.
- keys are relative, `/`-separated, and never leave the store's root; a part that begins with a dot is the store's own.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, cast
from urllib.parse import unquote, urlsplit

from dtrain.cluster.errors import StorageError


@dataclass(frozen=True, slots=True, kw_only=True)
class ObjectInfo:
    key: str
    size_bytes: int
    modified_at: float  # seconds since the epoch, by the store's clock
    version: str = ""  # another one for other bytes; "" where the store tells none


class Storage(Protocol):
    """Every method may be called from any thread. Raises StorageError in words where the store refuses or fails."""

    url: str

    def put_if_absent(self, key: str, data: bytes) -> None:
        """Raises AlreadyExists if the key is taken. Where it holds exactly `data`, a store may call that a success: an
        answer was lost on the way, and it meets its own bytes. So `data` has to be unique where that matters."""

    def upload(self, key: str, data: Iterable[memoryview], size_bytes: int) -> None:
        """Writes one object of `size_bytes` bytes, the parts of `data` in order; replaces one that is there. Nothing of
        `data` may be changed before this returns: it is sent from where it lies. What the iterator raises comes out,
        and nothing is left."""

    def get(self, key: str) -> bytes:
        """Raises FileNotFoundError where there is no such object."""

    def read_into(self, key: str, offset: int, target: memoryview) -> None:
        """Fills `target` from byte `offset` on. Raises FileNotFoundError; StorageError where the object is shorter."""

    def stat(self, key: str) -> ObjectInfo | None:
        """None where there is no such object."""

    def list_dirs(self, prefix: str) -> Sequence[str]:
        """Names directly under the directory `prefix` ("" or ending in "/") that have objects below them, sorted. A
        server that keeps objects as files may show one below which the first is still being uploaded."""

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        """Objects whose key starts with `prefix`, recursively, in key order; uncommitted uploads are not among them."""

    def delete(self, *keys: str) -> None:
        """No error where there is no such object. Returns when all are gone; a deletion survives a crash only if those
        of earlier calls do."""

    def discard_uploads(self, prefix: str, before: float) -> int:
        """Removes what killed processes left behind: uncommitted uploads below the directory `prefix` ("" or ending
        in "/"), last written before `before` (seconds since the epoch, by the store's clock). Returns how many."""

    def check_writable(self, timeout_s: float) -> None:
        """Writes a small object and deletes it again. Raises UsageError that says what is wrong and what to do, after
        `timeout_s` seconds at the latest."""


RETRY_S = 300.0  # of a run: a store may be out of order for minutes
IMPATIENT_RETRY_S = 10.0  # while a person waits

_FSSPEC = "dtrain.runtime.stores.fsspecstore:FsspecStorage"
_STORES = {
    "file": "dtrain.cluster.filestore:FileStorage",
    "s3": "dtrain.runtime.stores.objects:ObjectStorage",
    "gs": "dtrain.runtime.stores.objects:ObjectStorage",
    "az": "dtrain.runtime.stores.objects:ObjectStorage",
}


def open_storage(url: str, *, retry_s: float = RETRY_S) -> Storage:
    """The store for a URL; a bare path means `file://`. Asks nothing of it yet. Raises UsageError for a URL that no
    store takes, or one whose package is not installed. `retry_s`: for how long a request that fails on the way is
    tried again."""
    module, _, name = _STORES.get(scheme_of(url), _FSSPEC).partition(":")
    return cast(Storage, getattr(importlib.import_module(module), name)(url, retry_s=retry_s))


def scheme_of(url: str) -> str:
    return urlsplit(url).scheme if "://" in url else "file"


def folder_of(url: str) -> str | None:
    """The path of a URL, or of a bare path, that names a folder of this host; None for every other store."""
    if "://" not in url:
        return url
    return unquote(urlsplit(url).path) if scheme_of(url) == "file" else None


def is_key(key: str) -> bool:
    """Whether a caller may name an object so."""
    return "\0" not in key and all(part and not part.startswith(".") for part in key.split("/"))


def check_key(key: str, url: str) -> None:
    """Raises StorageError for what is no key of the store at `url`."""
    if not is_key(key):
        raise StorageError(
            f"{key!r} is not a key of {url}: keys are relative, their parts are not empty, "
            "begin with no dot and hold no NUL"
        )


def check_directory(prefix: str) -> None:
    """Raises StorageError for what list_dirs does not take."""
    if prefix and not prefix.endswith("/"):
        raise StorageError(f"list_dirs: the prefix {prefix!r} must be empty or end in '/'")
