"""Storage behind any URL that fsspec knows: memory://, sftp://, and, as fsspec+s3:// and the like, the stores that
objects.py serves faster.

Nothing is asked of a file system but reading, writing, listing, deleting and renaming. So put-if-absent is decided by
tickets.py, and where a file can be seen while it is being written it is written under a hidden name first.
"""

from __future__ import annotations

import contextlib
import threading
import uuid
from collections.abc import Iterable, Iterator, Sequence
from datetime import datetime
from typing import Any

from dtrain.cluster.errors import StorageError, UsageError
from dtrain.cluster.storage import RETRY_S, ObjectInfo, check_directory, check_key, is_key
from dtrain.runtime.stores import probing, tickets
from dtrain.runtime.stores.place import refuse_secrets
from dtrain.runtime.stores.refusals import cut_short

FORCED = "fsspec+"
UPLOADS = ".uploads"
NUM_RENAMES = 5
# File systems of objects: nothing is to be seen before a file is closed, and there are no directories.
_OBJECTS = frozenset(("s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "adl"))
_S3_OPTIONS = {
    # Servers that imitate S3 send checksums that do not fit a range (rclone 1.75), or do not know those of today.
    "config_kwargs": {
        "request_checksum_calculation": "when_required",
        "response_checksum_validation": "when_required",
        "s3": {"addressing_style": "auto"},
    }
}
_TIMES = ("mtime", "LastModified", "last_modified", "updated", "modified", "created")


class FsspecStorage:
    """Retries and timeouts are the file system's own. Memory: what its writer buffers, and one read. Constructing asks
    nothing; some file systems connect with the first request."""

    def __init__(self, url: str, *, retry_s: float = RETRY_S) -> None:
        """Raises UsageError for a URL that no file system takes, and where its package is missing."""
        refuse_secrets(url)
        self.url = url.rstrip("/")
        self._scheme = _known_scheme(url)
        self._lock = threading.Lock()
        self._opened: tuple[Any, str] | None = None

    @property
    def _fs(self) -> Any:
        return self._open()[0]

    @property
    def _root(self) -> str:
        return self._open()[1]

    def _open(self) -> tuple[Any, str]:
        with self._lock:
            if self._opened is None:
                self._opened = _open(self.url, self._scheme)
            return self._opened

    @property
    def _has_objects(self) -> bool:
        return self._scheme in _OBJECTS

    def put_if_absent(self, key: str, data: bytes) -> None:
        self._check(key)
        tickets.put_if_absent(_Plain(self), key, data)

    def upload(self, key: str, data: Iterable[memoryview], size_bytes: int) -> None:
        self._check(key)
        self._write(key, data)

    def get(self, key: str) -> bytes:
        self._check(key)
        with self._words(f"read {key}"):
            return bytes(self._fs.cat_file(self._path(key)))

    def read_into(self, key: str, offset: int, target: memoryview) -> None:
        self._check(key)
        view = target.cast("B")
        data = b""
        try:
            with self._words(f"read {key}"):
                if view.nbytes:
                    data = self._fs.cat_file(self._path(key), start=offset, end=offset + view.nbytes)
        except StorageError:
            # Some refuse a range that begins behind the end, others give nothing.
            if (found := self.stat(key)) is None or offset < found.size_bytes:
                raise
        if len(data) != view.nbytes:
            raise cut_short(self.url, key, offset, view.nbytes, self.stat(key))
        view[:] = data

    def stat(self, key: str) -> ObjectInfo | None:
        self._check(key)
        with contextlib.suppress(FileNotFoundError, NotADirectoryError), self._words(f"look at {key}"):
            self._fs.invalidate_cache()
            info = self._fs.info(self._path(key))
            return self._info(key, info) if info["type"] == "file" else None
        return None

    def list_dirs(self, prefix: str) -> Sequence[str]:
        check_directory(prefix)
        found = []
        with contextlib.suppress(FileNotFoundError, NotADirectoryError), self._words(f"list {prefix or 'everything'}"):
            self._fs.invalidate_cache()
            found = self._fs.ls(self._path(prefix.rstrip("/")), detail=True)
        names = {info["name"].rstrip("/").rpartition("/")[2] for info in found if info["type"] == "directory"}
        return sorted(name for name in names if is_key(name) and any(True for _ in self.list(f"{prefix}{name}/")))

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        for info in self._listing(prefix.rpartition("/")[0]):
            if info.key.startswith(prefix) and is_key(info.key):
                yield info

    def delete(self, *keys: str) -> None:
        for key in keys:
            self._check(key)
            self._remove(key)

    def discard_uploads(self, prefix: str, before: float) -> int:
        """For s3fs the unfinished uploads of that protocol, elsewhere our own hidden files."""
        if self._scheme in ("s3", "s3a"):
            from dtrain.runtime.stores.objects import ObjectStorage

            return ObjectStorage(f"s3://{self._root}").discard_uploads(prefix, before)
        found = [info for info in self._listing(UPLOADS) if info.modified_at < before]
        for info in found:
            self._remove(info.key)
        return len(found)

    def check_writable(self, timeout_s: float) -> None:
        probing.check_writable(_Plain(self), self.url, timeout_s)

    def _write(self, key: str, data: Iterable[memoryview]) -> None:
        """All or nothing."""
        if self._has_objects:
            self._stream(key, data)
            return
        hidden = f"{UPLOADS}/{uuid.uuid4().hex}"
        try:
            self._stream(hidden, data)
            self._rename(hidden, key)
        except BaseException:
            with contextlib.suppress(StorageError, FileNotFoundError):
                self._remove(hidden)
            raise

    def _stream(self, key: str, data: Iterable[memoryview]) -> None:
        path = self._path(key)
        with self._words(f"write {key}"):
            self._make_parent(path)
            file = self._fs.open(path, "wb")
        try:
            for part in data:
                with self._words(f"write {key}"):
                    file.write(part.cast("B"))
            with self._words(f"write {key}"):
                file.close()
        except BaseException:
            self._throw_away(file)
            raise

    def _throw_away(self, file: Any) -> None:
        with contextlib.suppress(Exception):
            if self._has_objects:
                file.discard()
                file.closed = True  # else its end would try to write the rest (s3fs 2026.9)
            else:
                file.close()

    def _rename(self, source: str, target: str) -> None:
        with self._words(f"write {target}"):
            for tries_left in reversed(range(NUM_RENAMES)):
                self._make_parent(self._path(target))
                try:
                    self._fs.mv(self._path(source), self._path(target))
                    return
                except FileNotFoundError:  # the directory was removed while it was empty
                    if not tries_left:
                        raise

    def _make_parent(self, path: str) -> None:
        if not self._has_objects:
            self._fs.makedirs(path.rpartition("/")[0], exist_ok=True)

    def _remove(self, key: str) -> None:
        path = self._path(key)
        with contextlib.suppress(FileNotFoundError), self._words(f"delete {key}"):
            self._fs.rm_file(path)
        if self._has_objects:
            return
        while len(path := path.rpartition("/")[0]) > len(self._root):
            try:
                self._fs.rmdir(path)  # only where it is empty
            except Exception:  # each file system has its own way to say that it is not
                return

    def _listing(self, directory: str) -> Iterator[ObjectInfo]:
        found: dict[str, Any] = {}
        with contextlib.suppress(FileNotFoundError, NotADirectoryError), self._words(f"list {directory}"):
            self._fs.invalidate_cache()
            found = self._fs.find(self._path(directory), detail=True, withdirs=False)
        keys = {path.removeprefix(self._root).lstrip("/"): info for path, info in found.items()}
        for key in sorted(keys):
            yield self._info(key, keys[key])

    def _info(self, key: str, info: dict[str, Any]) -> ObjectInfo:
        changed = next((info[name] for name in _TIMES if info.get(name) is not None), 0.0)
        if isinstance(changed, str):
            changed = datetime.fromisoformat(changed)
        seconds = changed.timestamp() if isinstance(changed, datetime) else float(changed)
        return ObjectInfo(key=key, size_bytes=int(info["size"] or 0), modified_at=seconds)

    def _path(self, key: str) -> str:
        return f"{self._root}/{key}".rstrip("/")

    def _check(self, key: str) -> None:
        check_key(key, self.url)

    @contextlib.contextmanager
    def _words(self, what: str) -> Iterator[None]:
        """A file system's errors -> StorageError; a missing file stays FileNotFoundError."""
        try:
            yield
        except (FileNotFoundError, NotADirectoryError, StorageError):
            raise
        except Exception as error:  # each package has errors of its own, without a common base
            raise StorageError(f"can't {what} in {self.url}: {type(error).__name__}: {error}") from error


class _Plain:
    """The operations that tickets and probes need, on any key."""

    def __init__(self, storage: FsspecStorage) -> None:
        self._storage = storage

    def put(self, key: str, data: bytes) -> None:
        self._storage._write(key, [memoryview(data)])

    def get(self, key: str) -> bytes | None:
        storage = self._storage
        with contextlib.suppress(FileNotFoundError), storage._words(f"read {key}"):
            storage._fs.invalidate_cache()
            return bytes(storage._fs.cat_file(storage._path(key)))
        return None

    def remove(self, key: str) -> None:
        self._storage._remove(key)

    def listing(self, directory: str) -> Iterable[ObjectInfo]:
        return self._storage._listing(directory)


def _known_scheme(url: str) -> str:
    import fsspec

    scheme = url.removeprefix(FORCED).partition("://")[0]
    if scheme not in fsspec.available_protocols():
        raise UsageError(f"no store for {scheme}:// ({url}). Known: file, s3, gs, az, and all that fsspec knows.")
    try:
        fsspec.get_filesystem_class(scheme)
    except ImportError as error:
        raise UsageError(f"{scheme}:// needs a package that is not installed: {error}") from error
    return scheme


def _open(url: str, scheme: str) -> tuple[Any, str]:
    """The file system, and the root in it without a slash at its end."""
    import fsspec

    # Neither listings nor clients may be remembered: others write to the store, and its address may change.
    options: dict[str, Any] = {"use_listings_cache": False, "skip_instance_cache": True} if scheme in _OBJECTS else {}
    if scheme in ("s3", "s3a"):
        options |= _S3_OPTIONS
    try:
        fs, root = fsspec.core.url_to_fs(url.removeprefix(FORCED), **options)
    except Exception as error:  # whatever its constructor raises: some connect at once
        raise StorageError(f"{url} can't be opened: {type(error).__name__}: {error}") from error
    return fs, str(root).rstrip("/")
