"""The plain operations of an object store, on any key, with errors in words, through obstore and as limits.py says.

Bytes are sent from where they lie, in parts, several at a time. What storage promises beyond that is objects.py's.
"""

from __future__ import annotations

import contextlib
import random
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from typing import TYPE_CHECKING

from dtrain.cluster.errors import StorageError
from dtrain.cluster.storage import ObjectInfo
from dtrain.runtime.stores.aws import Account, find_account
from dtrain.runtime.stores.connect import connect
from dtrain.runtime.stores.limits import Limits
from dtrain.runtime.stores.pieces import send_pieces
from dtrain.runtime.stores.place import Place
from dtrain.runtime.stores.refusals import cut_short, in_words, is_missing_bucket, is_passing, status_of

if TYPE_CHECKING:
    from obstore import ObjectMeta
    from obstore.store import ObjectStore

LIST_CHUNK = 1000
RANGE_NOT_THERE = 416


class ObjectClient:
    """Asks nothing before the first request, which looks for credentials and raises UsageError where there are none."""

    def __init__(self, place: Place, limits: Limits) -> None:
        self.place = place
        self.limits = limits
        self._lock = threading.RLock()

    @cached_property
    def account(self) -> Account | None:
        """For S3 only."""
        with self._lock:
            return find_account() if self.place.scheme == "s3" else None

    @cached_property
    def _asking(self) -> ObjectStore:
        with self._lock:
            return connect(self.place, self.account, self.limits, sends=False)

    @cached_property
    def _sending(self) -> ObjectStore:
        with self._lock:
            return connect(self.place, self.account, self.limits, sends=True)

    def put(self, key: str, data: bytes) -> None:
        """Overwrites."""
        import obstore

        with self._words(f"write {key}"):
            obstore.put(self._sending, key, data, use_multipart=False)

    def create(self, key: str, data: bytes) -> bool:
        """Writes if the store says that there is no such object; False where it says that there is one. An answer that
        was lost on the way makes that false: then the object may be ours. Raises NotImplementedError where the store
        does not know the question."""
        import obstore
        from obstore.exceptions import AlreadyExistsError, NotSupportedError, PreconditionError

        give_up, pause = time.monotonic() + self.limits.retry_s, self.limits.first_wait_s
        with self._words(f"write {key}"):
            while True:
                try:
                    obstore.put(self._asking, key, data, mode="create")
                    return True
                except (AlreadyExistsError, PreconditionError):
                    return False
                except (NotSupportedError, NotImplementedError) as error:
                    raise NotImplementedError from error
                except obstore.exceptions.BaseError as error:
                    if status_of(error) in (405, 501):
                        raise NotImplementedError from error
                    # obstore repeats only what may be done twice; who calls us can bear that.
                    if not is_passing(error) or time.monotonic() + pause > give_up:
                        raise
                time.sleep(random.uniform(0, pause))
                pause = min(2 * pause, self.limits.longest_wait_s)

    def send(self, key: str, data: Iterable[memoryview], size_bytes: int) -> None:
        """A multipart upload: nothing is copied, and nothing is to be seen before the last byte."""
        part_bytes = self.limits.part_bytes_for(size_bytes)
        send_pieces(data, part_bytes, lambda pieces: self._send(key, pieces, size_bytes, part_bytes))

    def _send(self, key: str, pieces: Iterator[memoryview], size_bytes: int, part_bytes: int) -> None:
        import obstore

        try:
            # Pieces of at most a part: all of a piece is sent at once, whatever max_concurrency says.
            with self._words(f"write {key}"):
                obstore.put(
                    self._sending,
                    key,
                    pieces,
                    use_multipart=True,
                    chunk_size=part_bytes,
                    max_concurrency=self.limits.concurrency,
                )
        except StorageError:
            # The answer to the last request may have been lost: asked again, the store knows of no such upload.
            if next(pieces, None) is not None or (found := self.head(key)) is None or found.size_bytes != size_bytes:
                raise

    def get(self, key: str) -> bytes | None:
        import obstore

        with contextlib.suppress(FileNotFoundError), self._words(f"read {key}", may_miss=True):
            return bytes(obstore.get(self._asking, key).bytes())
        return None

    def read_into(self, key: str, offset: int, target: memoryview) -> None:
        """One copy, from the buffers in which the bytes came. Raises FileNotFoundError."""
        at_once = self.limits.part_bytes * self.limits.concurrency
        for begin in range(0, target.nbytes, at_once):
            self._read_ranges(key, offset + begin, target[begin : begin + at_once])

    def _read_ranges(self, key: str, offset: int, target: memoryview) -> None:
        import obstore

        part = self.limits.part_bytes
        begins = range(0, target.nbytes, part)
        lengths = [min(part, target.nbytes - begin) for begin in begins]
        with self._words(f"read {key}", may_miss=True):
            try:
                starts = [offset + begin for begin in begins]
                found = obstore.get_ranges(self._asking, key, starts=starts, lengths=lengths, coalesce=0)
            except obstore.exceptions.BaseError as error:
                if status_of(error) == RANGE_NOT_THERE:
                    raise self._short(key, offset, target.nbytes) from error
                if "non-partial response" not in str(error):
                    raise
                self._read_whole(key, offset, target)
                return
        for begin, length, data in zip(begins, lengths, found, strict=True):
            if len(data) != length:
                raise self._short(key, offset, target.nbytes)
            target[begin : begin + length] = memoryview(data)

    def _read_whole(self, key: str, offset: int, target: memoryview) -> None:
        """For a server that answers a range that is the whole object as if none had been asked for (rclone 1.75)."""
        import obstore

        at, end = 0, offset + target.nbytes
        for data in obstore.get(self._asking, key).stream(min_chunk_size=self.limits.part_bytes):
            low, high = max(at, offset), min(at + len(data), end)
            if low < high:
                target[low - offset : high - offset] = memoryview(data)[low - at : high - at]
            at += len(data)
        if at < end:
            raise self._short(key, offset, target.nbytes)

    def _short(self, key: str, offset: int, size_bytes: int) -> StorageError:
        return cut_short(self.place.url, key, offset, size_bytes, self.head(key))

    def head(self, key: str) -> ObjectInfo | None:
        import obstore

        with contextlib.suppress(FileNotFoundError), self._words(f"look at {key}", may_miss=True):
            return _info(obstore.head(self._asking, key))
        return None

    def remove(self, key: str) -> None:
        """No error where there is no such object."""
        import obstore

        with contextlib.suppress(FileNotFoundError), self._words(f"delete {key}", may_miss=True):
            obstore.delete(self._asking, key)

    def listing(self, directory: str) -> Iterator[ObjectInfo]:
        """Everything below a directory ("" for all), in key order."""
        import obstore

        with self._words(f"list {directory or 'everything'}"):
            for chunk in obstore.list(self._asking, directory or None, chunk_size=LIST_CHUNK):
                yield from map(_info, chunk)

    def directories(self, directory: str) -> Sequence[str]:
        """Names of the directories in a directory ("" for the root)."""
        import obstore

        with self._words(f"list {directory or 'everything'}"):
            found = obstore.list_with_delimiter(self._asking, directory or None)["common_prefixes"]
        return [path.rstrip("/").rpartition("/")[2] for path in found]

    @contextlib.contextmanager
    def _words(self, what: str, *, may_miss: bool = False) -> Iterator[None]:
        """obstore's errors -> StorageError. With `may_miss` an object that is not there stays FileNotFoundError."""
        import obstore.exceptions

        try:
            yield
        except FileNotFoundError as error:
            if may_miss and not is_missing_bucket(error):
                raise FileNotFoundError(f"there is no such object: can't {what} in {self.place.url}") from error
            raise in_words(error, what, self.place) from error
        except (obstore.exceptions.BaseError, OSError) as error:
            raise in_words(error, what, self.place) from error


def _info(meta: ObjectMeta) -> ObjectInfo:
    modified_at = meta["last_modified"].timestamp()
    version = meta.get("e_tag") or ""
    return ObjectInfo(key=meta["path"], size_bytes=meta["size"], modified_at=modified_at, version=version)
