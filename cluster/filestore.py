"""Storage on a file system, local or shared: a path or a file:// URL.

Commits rest on fsync and link(2), which creates a name or fails where one exists, on NFS too. Uploads in progress are
hidden files beside their target; a killed process leaves them behind, and `discard_uploads` removes them.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import stat
import time
import uuid
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from urllib.parse import unquote, urlsplit

from dtrain.cluster.errors import AlreadyExists, StorageError, UsageError
from dtrain.cluster.storage import ObjectInfo, check_directory, check_key, is_key

_UPLOAD_MARK = ".upload-"
_unique = itertools.count()


class FileStorage:
    """Objects are files under a root directory. Constructing and reading create nothing."""

    def __init__(self, url: str, *, retry_s: float = 0.0) -> None:
        """`retry_s` is for stores behind a network: what a file system refuses it refuses again."""
        self.root = _root_of(url)
        self.url = self.root.as_uri()

    def put_if_absent(self, key: str, data: bytes) -> None:
        with self._open_upload(key) as upload:
            upload.write(memoryview(data))
            upload.commit(replace=False)

    def upload(self, key: str, data: Iterable[memoryview], size_bytes: int) -> None:
        with self._open_upload(key) as upload:
            for part in data:
                upload.write(part)
            upload.commit(replace=True)

    def _open_upload(self, key: str) -> _Upload:
        path = self._path(key)
        with _words(f"write {path}"):
            return _Upload(self.root, path)

    def get(self, key: str) -> bytes:
        path = self._path(key)
        with _words(f"read {path}"):
            return path.read_bytes()

    def read_into(self, key: str, offset: int, target: memoryview) -> None:
        path = self._path(key)
        with _words(f"read {path}"):
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                done = _read_fully(descriptor, target.cast("B"), offset)
                size = os.fstat(descriptor).st_size
            finally:
                os.close(descriptor)
        if done < target.nbytes:
            raise StorageError(
                f"can't read {path}: asked for bytes {offset} to {offset + target.nbytes}, "
                f"but the file ends at {size}. It was cut short after it was written."
            )

    def stat(self, key: str) -> ObjectInfo | None:
        path = self._path(key)
        with _words(f"look at {path}"):
            try:
                status = os.lstat(path)
            except (FileNotFoundError, NotADirectoryError):
                return None
        if not stat.S_ISREG(status.st_mode):
            return None
        return _info(key, status)

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        directory, _, _ = prefix.rpartition("/")
        start = self._path(directory) if directory else self.root
        for path, key, status in _walk(start, f"{directory}/" if directory else ""):
            if key.startswith(prefix) and not _is_upload(path):
                yield _info(key, status)

    def list_dirs(self, prefix: str) -> Sequence[str]:
        check_directory(prefix)
        start = self._path(prefix[:-1]) if prefix else self.root
        names = [entry.name for entry in _scan(start) if entry.is_dir(follow_symlinks=False)]
        return sorted(name for name in names if is_key(name) and any(True for _ in self.list(f"{prefix}{name}/")))

    def delete(self, *keys: str) -> None:
        for key in keys:
            self._delete(self._path(key))

    def _delete(self, path: Path) -> None:
        with _words(f"delete {path}"):
            try:
                os.unlink(path)
                # Deletions reach the disk in the order in which they were asked for: a manifest before its files.
                _sync_dir(path.parent)
            except FileNotFoundError:
                return
        _remove_empty(path.parent, self.root)

    def discard_uploads(self, prefix: str, before: float) -> int:
        directory, _, _ = prefix.rpartition("/")
        start = self._path(directory) if directory else self.root
        count = 0
        for path, key, status in _walk(start, f"{directory}/" if directory else ""):
            if _is_upload(path) and key.startswith(prefix) and status.st_mtime < before:
                with _words(f"delete {path}"), contextlib.suppress(FileNotFoundError):
                    os.unlink(path)
                    count += 1
                _remove_empty(Path(path).parent, self.root)
        return count

    def check_writable(self, timeout_s: float) -> None:
        key = f"probe-{uuid.uuid4().hex}"
        try:
            self.put_if_absent(key, b"dtrain was here")
            self.delete(key)
        except StorageError as error:
            raise UsageError(str(error)) from error

    def _path(self, key: str) -> Path:
        check_key(key, self.url)
        return self.root / key


class _Upload:
    """A hidden file that commit() gives its name and abort() removes."""

    def __init__(self, root: Path, path: Path) -> None:
        self._root = root
        self._path = path
        self._size = 0
        self._temporary = path.with_name(
            f".{path.name[:80]}{_UPLOAD_MARK}{os.getpid()}-{time.time_ns()}-{next(_unique)}"
        )
        self._descriptor = _create(self._temporary)

    def write(self, data: memoryview) -> None:
        view = data.cast("B")
        with _words(f"write {self._path}"):
            while view.nbytes:
                written = os.pwrite(self._descriptor, view, self._size)
                self._size += written
                view = view[written:]

    def commit(self, *, replace: bool) -> None:
        try:
            with _words(f"write {self._path}"):
                os.fsync(self._descriptor)
                if replace:
                    self._rename()
                else:
                    self._link()
                for directory in _up_to(self._path.parent, self._root):
                    _sync_dir(directory)
        finally:
            self.abort()

    def _rename(self) -> None:
        try:
            os.rename(self._temporary, self._path)
        except FileNotFoundError as error:
            raise StorageError(f"can't commit {self._path}: its upload was removed while it was going on") from error

    def _link(self) -> None:
        try:
            os.link(self._temporary, self._path)
        except FileExistsError as error:
            # NFS repeats a request whose answer was lost, and then finds the link that it made itself.
            if not os.path.samestat(os.fstat(self._descriptor), os.stat(self._path)):
                raise AlreadyExists(f"{self._path} exists already") from error
        except FileNotFoundError as error:
            raise StorageError(f"can't commit {self._path}: its upload was removed while it was going on") from error
        except OSError as error:
            if error.errno in (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK):
                raise StorageError(
                    f"can't commit {self._path}: this file system has no hard links ({error.strerror}). "
                    "Set checkpoint.url to a directory on another one."
                ) from error
            raise

    def abort(self) -> None:
        """Safe to call at any time, also after commit()."""
        if self._descriptor < 0:
            return
        os.close(self._descriptor)
        self._descriptor = -1
        with contextlib.suppress(OSError):
            os.unlink(self._temporary)
        _remove_empty(self._path.parent, self._root)

    def __enter__(self) -> _Upload:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.abort()


def _root_of(url: str) -> Path:
    if "://" not in url:
        path = url
    else:
        parts = urlsplit(url)
        if parts.scheme != "file" or parts.netloc not in ("", "localhost") or parts.query or parts.fragment:
            raise UsageError(f"{url} is not a file:// URL of this host. Write file:///absolute/path, or a path.")
        path = unquote(parts.path)
        if not path.startswith("/"):
            raise UsageError(f"{url} names no directory. Write file:///absolute/path, or a path.")
    if not path or "\0" in path:
        raise UsageError(f"{url!r} names no directory")
    return Path(os.path.abspath(path))


def _info(key: str, status: os.stat_result) -> ObjectInfo:
    version = f"{status.st_ino}-{status.st_size}-{status.st_mtime_ns}"
    return ObjectInfo(key=key, size_bytes=status.st_size, modified_at=status.st_mtime, version=version)


def _is_upload(path: str) -> bool:
    name = os.path.basename(path)
    return name.startswith(".") and _UPLOAD_MARK in name


@contextlib.contextmanager
def _words(what: str) -> Iterator[None]:
    """OSError -> StorageError that names the file and the way out; a missing file stays FileNotFoundError."""
    try:
        yield
    except FileNotFoundError:
        raise
    except OSError as error:
        if error.errno == errno.ENOSPC:
            hint = "disk full. Free space there, lower checkpoint.keep, or set checkpoint.url to another disk."
        elif error.errno == errno.EDQUOT:
            hint = "disk full: your quota is used up. Free space, or set checkpoint.url to another disk."
        else:
            hint = error.strerror or str(error)
        raise StorageError(f"can't {what}: {hint}") from error


def _create(temporary: Path) -> int:
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
    for _ in range(100):
        _make_dirs(temporary.parent)
        with contextlib.suppress(FileNotFoundError):  # a deletion removed the directory while it was empty: again
            return os.open(temporary, flags, 0o666)
    raise StorageError(f"can't make the directory {temporary.parent}: it is gone as soon as it is made")


def _make_dirs(path: Path) -> None:
    missing = list(itertools.takewhile(lambda level: not level.is_dir(), (path, *path.parents)))
    for level in reversed(missing):
        with contextlib.suppress(FileExistsError, FileNotFoundError):
            os.mkdir(level)
            _sync_dir(level.parent)
    if missing and path.exists() and not path.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, "it is a file, not a directory", str(path))


def _sync_dir(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # a file system whose directories can't be synced
            raise
    finally:
        os.close(descriptor)


def _up_to(directory: Path, root: Path) -> Iterator[Path]:
    """`directory` and its parents, `root` last."""
    while True:
        yield directory
        if directory == root:
            return
        directory = directory.parent


def _remove_empty(directory: Path, root: Path) -> None:
    with contextlib.suppress(OSError):
        for level in _up_to(directory, root):
            if level == root:
                return
            os.rmdir(level)


def _read_fully(descriptor: int, target: memoryview, offset: int) -> int:
    done = 0
    while done < target.nbytes:
        count = os.preadv(descriptor, [target[done:]], offset + done)
        if count == 0:
            break
        done += count
    return done


def _scan(directory: Path | str) -> list[os.DirEntry[str]]:
    with _words(f"list {directory}"):
        try:
            with os.scandir(directory) as entries:
                return list(entries)
        except (FileNotFoundError, NotADirectoryError):
            return []


def _walk(directory: Path | str, prefix: str) -> Iterator[tuple[str, str, os.stat_result]]:
    """(path, key, status) of every regular file below, in key order; symbolic links are not followed."""
    found = [
        (entry.name + "/" if entry.is_dir(follow_symlinks=False) else entry.name, entry) for entry in _scan(directory)
    ]
    for name, entry in sorted(found, key=lambda pair: pair[0]):
        if name.endswith("/"):
            if not name.startswith("."):
                yield from _walk(entry.path, prefix + name)
        elif entry.is_file(follow_symlinks=False) and (not name.startswith(".") or _is_upload(name)):
            with contextlib.suppress(FileNotFoundError):  # deleted since
                yield entry.path, prefix + name, entry.stat(follow_symlinks=False)
