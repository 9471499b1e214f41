"""Storage in an object store: s3://bucket/prefix, gs://bucket/prefix, az://container/prefix.

Keeps cluster/storage.py's promises with what client.py can do; where a store can't create an object only if it is
absent, which is noticed, tickets.py does that.
"""

from __future__ import annotations

import importlib
import logging
import threading
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import cached_property
from typing import Any

from dtrain.cluster.errors import AlreadyExists, StorageError, UsageError
from dtrain.cluster.storage import RETRY_S, ObjectInfo, check_directory, check_key, is_key
from dtrain.runtime.stores import probing, tickets
from dtrain.runtime.stores.client import ObjectClient
from dtrain.runtime.stores.limits import Limits
from dtrain.runtime.stores.place import parse_place

NUM_DELETES = 16  # at a time
NUM_CREATES = 5
_log = logging.getLogger(__name__)


class ObjectStorage:
    """Asks nothing before the first request. Not for a process that was forked from one that has used it."""

    def __init__(self, url: str, *, retry_s: float = RETRY_S, limits: Limits | None = None) -> None:
        """`limits` decide over all that takes time or memory, `retry_s` too. Raises UsageError for a URL that names no
        place, and where a package is missing."""
        self._place = parse_place(url)
        _require_packages(self._place.scheme)
        self.url = self._place.url
        self._limits = limits or Limits(retry_s=retry_s)
        self._client = ObjectClient(self._place, self._limits)
        self._lock = threading.Lock()
        self._conditional: bool | None = None  # whether the store creates only what is absent; None: not known yet

    def put_if_absent(self, key: str, data: bytes) -> None:
        self._check(key)
        if self._creates_only_what_is_absent():
            self._create(key, data)
        else:
            tickets.put_if_absent(self._tickets_client, key, data)

    def upload(self, key: str, data: Iterable[memoryview], size_bytes: int) -> None:
        self._check(key)
        if size_bytes <= self._limits.part_bytes:
            self._client.put(key, b"".join(data))
        else:
            self._client.send(key, data, size_bytes)

    def get(self, key: str) -> bytes:
        self._check(key)
        found = self._client.get(key)
        if found is None:
            raise FileNotFoundError(f"{self.url}/{key} does not exist")
        return found

    def read_into(self, key: str, offset: int, target: memoryview) -> None:
        self._check(key)
        self._client.read_into(key, offset, target.cast("B"))

    def stat(self, key: str) -> ObjectInfo | None:
        self._check(key)
        return self._client.head(key)

    def list_dirs(self, prefix: str) -> Sequence[str]:
        check_directory(prefix)
        return sorted(name for name in self._client.directories(prefix.rstrip("/")) if is_key(name))

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        found = self._client.listing(prefix.rpartition("/")[0])
        return (info for info in found if info.key.startswith(prefix) and is_key(info.key))

    def delete(self, *keys: str) -> None:
        for key in keys:
            self._check(key)
        # One request each: the one that deletes many is not understood by every store.
        with ThreadPoolExecutor(NUM_DELETES, thread_name_prefix="storage-delete") as pool:
            for _ in pool.map(self._client.remove, keys):
                pass

    def discard_uploads(self, prefix: str, before: float) -> int:
        """Also probes and tickets. Uploads for S3 only: Azure forgets unfinished ones after a week; in Google's store a
        lifecycle rule has to."""
        hidden = [f"{probing.FOLDER}/", f"{tickets.FOLDER}/{prefix}"]
        old = [info.key for start in hidden for info in self._hidden(start) if info.modified_at < before]
        for key in old:
            self._client.remove(key)
        if self._client.account is None:
            return len(old)
        from dtrain.runtime.stores.uploads import abort_uploads

        return len(old) + abort_uploads(self._uploads_client, self._place, prefix, before)

    def _hidden(self, start: str) -> Iterator[ObjectInfo]:
        found = self._client.listing(start.rpartition("/")[0])
        return (info for info in found if info.key.startswith(start))

    @cached_property
    def _uploads_client(self) -> Any:
        from dtrain.runtime.stores.uploads import make_client

        assert self._client.account is not None
        return make_client(self._client.account, self._limits)

    @cached_property
    def _tickets_client(self) -> ObjectClient:
        limits = replace(self._limits, request_s=tickets.WRITE_S / 3, retry_s=tickets.WRITE_S / 2)
        return ObjectClient(self._place, limits)

    def check_writable(self, timeout_s: float) -> None:
        limits = replace(
            self._limits,
            connect_s=min(self._limits.connect_s, timeout_s / 4),
            silent_s=min(self._limits.silent_s, timeout_s / 3),
            request_s=timeout_s / 3,
            retry_s=timeout_s / 3,
            max_retries=2,
        )
        probing.check_writable(ObjectClient(self._place, limits), self.url, timeout_s)

    def _creates_only_what_is_absent(self) -> bool:
        """Tried once a store, except where it is known to be so."""
        with self._lock:
            if self._conditional is None:
                account = self._client.account
                self._conditional = account is None or account.endpoint is None or self._try_to_create_twice()
                if not self._conditional:
                    _log.info("%s can't create an object only if it is absent: tickets decide instead", self.url)
            return self._conditional

    def _try_to_create_twice(self) -> bool:
        key = probing.new_probe_key()
        # A store that does not know the question must not be asked it for minutes.
        client = ObjectClient(self._place, replace(self._limits, max_retries=min(self._limits.max_retries, 4)))
        try:
            client.create(key, probing.PROBE)
            return not client.create(key, probing.PROBE)
        except NotImplementedError:
            return False
        finally:
            client.remove(key)

    def _create(self, key: str, data: bytes) -> None:
        for _ in range(NUM_CREATES):
            if self._client.create(key, data):
                return
            found = self._client.get(key)
            if found == data:  # our own, written by a request whose answer was lost
                return
            if found is not None:
                raise AlreadyExists(f"{self.url}/{key} exists already")
            # Another's request was under way and came to nothing.
        raise StorageError(f"can't write {self.url}/{key}: the store says that it exists, and that it does not")

    def _check(self, key: str) -> None:
        check_key(key, self.url)


def _require_packages(scheme: str) -> None:
    for package in ("obstore", "botocore") if scheme == "s3" else ("obstore",):
        try:
            importlib.import_module(package)
        except ImportError as error:
            raise UsageError(
                f"{scheme}:// needs the package {package}, which is not installed: pip install 'dtrain[s3]'"
            ) from error
