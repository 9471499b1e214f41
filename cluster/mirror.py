"""A process's own copy of a run directory that lies in an object store: s3://bucket/runs/name.

All code works on the copy, as on a shared folder; here the two are kept alike. Records go to the store at once, those
that only one may write by put-if-absent. On a node one thread of the agent (runtime/mirroring.py) does the rest: it
sends what the node's processes have written, and fetches what others have. Elsewhere `refresh` is called by who waits.
Which files are kept how is remote.py's, growing ones are growing.py's.
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

from dtrain.cluster.atomic import append_line, lock_within, replace_file
from dtrain.cluster.copyfolder import LOCK, MARK, STATE, files_of, remove_old, sign_of
from dtrain.cluster.errors import AlreadyExists, StorageError
from dtrain.cluster.growing import Incoming, Outgoing
from dtrain.cluster.remote import GROWING, digest_of, kind_of
from dtrain.cluster.storage import RETRY_S, ObjectInfo, Storage, open_storage

VARIABLE = "DTRAIN_MIRROR"  # on a node: the folder of its copies
_RETRY_S = 4.0  # of what is tried again anyway
_PAUSE_S = 1.0
_LOCK_S = 10.0  # with another process that has the copy in its hands: one that was stopped must not stop the others
_TOP = ("job.json", "config.yaml", "failure.json", "mlflow.json")  # records that are asked for by name

_urls: dict[str, str] = {}  # copy -> URL, of this process
_mirrors: dict[tuple[int, str], Mirror] = {}  # not for forks: a store's connections don't survive one


def is_url(place: str) -> bool:
    return "://" in place


def copy_of(url: str) -> Path:
    """Where this process has its copy; makes nothing."""
    parent = os.environ.get(VARIABLE)
    if not parent:
        cache = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.environ.get("HOME", "/"), ".cache")
        parent = os.path.join(cache, "dtrain", "runs")
    top = Path(parent, digest_of(url))
    _urls[str(top)] = url.rstrip("/")
    return top


def mirror_of(path: Path) -> Mirror | None:
    """That of the copy in which `path` lies; None for an ordinary run directory."""
    for top in map(str, (path, *path.parents[:3])):
        url = _urls.get(top) or _marked(top)
        if url:
            own = (os.getpid(), top)
            if own not in _mirrors:
                _mirrors[own] = Mirror(url, Path(top))
            return _mirrors[own]
    return None


@lru_cache(maxsize=512)
def _marked(top: str) -> str:
    """The URL of a copy that another process has made; "" for any other folder. Asked of the disk once: a copy is
    marked before a process that works on it starts, and the one that makes it knows it by `_urls`."""
    try:
        return str(json.loads(Path(top, MARK).read_bytes())["url"])
    except (OSError, ValueError):
        return ""


def patiently(ask: Callable[[], None], patience_s: float) -> None:
    """Again and again until the store has answered. Raises StorageError after `patience_s`."""
    deadline = time.monotonic() + patience_s
    while True:
        try:
            return ask()
        except StorageError:
            if time.monotonic() > deadline:
                raise
            time.sleep(_PAUSE_S)


class Mirror:
    """Every method may be called from any thread. Raises StorageError, UsageError, where it says nothing else."""

    def __init__(self, url: str, top: Path) -> None:
        self.url = url
        self.top = top
        top.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not (top / MARK).exists():
            mark = {"url": url, "node": str(top.parent) == os.environ.get(VARIABLE)}
            replace_file(top / MARK, json.dumps(mark).encode())
            if not mark["node"]:
                remove_old(top.parent)
        self.on_node = bool(json.loads((top / MARK).read_bytes())["node"])
        self.wake: Callable[[], None] | None = None  # set by the agent's thread, which then sends what is written
        self.job_id = ""  # whose records are wanted; "": that of job.json
        self._lock = threading.RLock()
        self._depth = 0
        self._state: dict[str, Any] = {}
        self._refreshed_at = -1e9

    @cached_property
    def store(self) -> Storage:
        return open_storage(self.url, retry_s=_RETRY_S)

    @cached_property
    def _patient(self) -> Storage:
        return open_storage(self.url, retry_s=RETRY_S) if self.on_node else self.store

    # ---- what writers call ----

    def create(self, path: Path, raw: bytes, mode: int | None) -> bool:
        """Puts the record, unless somebody has; True for the one who did. Afterwards the copy has the winner's."""
        name = self._name(path)
        with self._session():
            try:
                self._patient.put_if_absent(name, raw)
                won, data = True, raw
            except AlreadyExists:
                try:
                    won, data = False, self._patient.get(name)
                except FileNotFoundError:  # it was removed since
                    return False
            self._keep(name, data, mode)
        return won

    def replaced(self, path: Path) -> None:
        """`path` was written anew."""
        if self.wake is not None:
            self.wake()
        elif self._is_kept_here(name := self._name(path)):
            with self._session():
                self._send_record(name)

    def _is_kept_here(self, name: str) -> bool:
        """On a node everything else is the agent's to send."""
        return kind_of(name) in ("record", "once") and (not self.on_node or "/" in name)

    def append(self, path: Path, line: bytes) -> None:
        """Raises OSError besides."""
        name = self._name(path)
        if not self.on_node:
            with self._session():
                self._incoming().add(name, line)
            return
        append_line(path, line)
        if self.wake is not None:
            self.wake()
        else:
            with self._session():
                self._outgoing().send(name)

    def remove(self, path: Path) -> None:
        name = self._name(path)
        with self._session():
            self.store.delete(name)
            self._seen.pop(name, None)

    def send(self, path: Path) -> None:
        """A file that never changes."""
        name, size = self._name(path), path.stat().st_size
        there = self.store.stat(name)
        if there is None or there.size_bytes != size:
            self.store.upload(name, _chunks(path), size)

    def fetch(self, path: Path) -> None:
        """Raises FileNotFoundError."""
        data = self.store.get(self._name(path))
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, data)

    # ---- keeping the two alike ----

    def refresh(self, max_age_s: float = 0.0) -> None:
        """Brings the copy up to date: records first, so that what was written before a record is there when it is. On
        nodes records only."""
        if time.monotonic() - self._refreshed_at < max_age_s:
            return
        with self._session():
            if self.wake is None:  # no agent looks at them twice
                self._fetch_top()
            if self.job_id or self._job_of_record():
                self._fetch_control(f"control/{self.job_id or self._job_of_record()}/")
            if not self.on_node:
                infos = [info for prefix in GROWING for info in self.store.list(prefix)]
                self._incoming().take(infos)
        self._refreshed_at = time.monotonic()

    def fetch_growing(self, *names: str) -> None:
        """For who goes on with these files in another's place. Those whose newest lines are its own stay."""
        with self._session():
            self.push()
            self._fetch_top()
            for name in names:
                infos = list(self.store.list(f"{name}/"))
                if not self._outgoing().has_newest(name, infos):
                    self._incoming().take(infos)

    def push(self) -> None:
        """Sends all that the processes of this node have written since the last time. Raises OSError besides."""
        with self._session():
            for path in sorted(files_of(self.top)):
                name = self._name(path)
                match kind_of(name):
                    case "newest" | "joined":
                        self._outgoing().send(name)
                    case "record" | "once" as kind:
                        with contextlib.suppress(FileNotFoundError):  # it has gone meanwhile
                            self._push_record(name, once=kind == "once")

    def _push_record(self, name: str, *, once: bool) -> None:
        seen = self._seen.get(name)
        if seen is not None and seen["sign"] == sign_of(self.top / name):
            return
        if once and seen is None:  # by a script, which has only the copy
            data = (self.top / name).read_bytes()
            try:
                self.store.put_if_absent(name, data)
            except AlreadyExists:
                data = self.store.get(name)
            self._keep(name, data, 0o600)
        else:
            self._send_record(name)

    def _send_record(self, name: str) -> None:
        path = self.top / name
        sign = sign_of(path)
        data = path.read_bytes()
        self.store.upload(name, [memoryview(data)], len(data))
        self._seen[name] = {"version": "", "sign": sign, "at": time.time()}

    def _fetch_top(self) -> None:
        for name in _TOP:
            if (info := self.store.stat(name)) is not None:
                self._take(name, info)

    def _fetch_control(self, folder: str) -> None:
        began = time.time()
        found = {info.key: info for info in self.store.list(folder)}
        for name, info in found.items():
            self._take(name, info)
        for name in [name for name in self._seen if name.startswith(folder) and name not in found]:
            if self._seen[name]["at"] < began:  # else it was put after the list was made
                seen, path = self._seen.pop(name), self.top / name
                with contextlib.suppress(FileNotFoundError):
                    if sign_of(path) == seen["sign"]:
                        path.unlink()

    def _take(self, name: str, info: ObjectInfo) -> None:
        """On a node it leaves alone what was written there and not sent yet."""
        path, seen = self.top / name, self._seen.get(name)
        sign = sign_of(path) if path.exists() else None
        version = info.version or f"{info.size_bytes}@{info.modified_at}"
        if self.on_node and sign is not None and (seen is None or seen["sign"] != sign):
            return
        if sign is not None and seen is not None and seen["version"] == version:
            return
        with contextlib.suppress(FileNotFoundError):
            data = self.store.get(name)
            if sign is None or data != path.read_bytes():
                self._keep(name, data, 0o600, modified_at=info.modified_at)
            # A store that tells no versions counts times in seconds: what is young may change within one.
            young = not info.version and time.time() - info.modified_at < 5.0
            self._seen[name] = {"version": "" if young else version, "sign": sign_of(path), "at": time.time()}

    def _keep(self, name: str, data: bytes, mode: int | None, modified_at: float | None = None) -> None:
        path = self.top / name
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        replace_file(path, data, mode)
        if modified_at is not None:
            os.utime(path, (modified_at, modified_at))
        self._seen[name] = {"version": "", "sign": sign_of(path), "at": time.time()}

    # ---- what is known of both sides ----

    @property
    def _seen(self) -> dict[str, dict[str, Any]]:
        """Record -> its version in the store, and what tells whether the copy's file was changed since."""
        seen: dict[str, dict[str, Any]] = self._state.setdefault("seen", {})
        return seen

    def _incoming(self) -> Incoming:
        return Incoming(self.store, self.top, self._state.setdefault("in", {}))

    def _outgoing(self) -> Outgoing:
        out, came = self._state.setdefault("out", {}), self._state.setdefault("in", {})
        return Outgoing(self.store, self.top, out, came, self._save)

    def _name(self, path: Path) -> str:
        return path.relative_to(self.top).as_posix()

    def _job_of_record(self) -> str:
        try:
            return str(json.loads((self.top / "job.json").read_bytes())["job_id"])
        except FileNotFoundError:
            return ""

    @contextlib.contextmanager
    def _session(self) -> Iterator[None]:
        """With what is known loaded, and kept afterwards. One at a time: in this process, and among those that share
        the copy."""
        with self._lock:
            if self._depth or self.wake is not None:
                self._depth += 1
                try:
                    yield
                finally:
                    self._depth -= 1
                    self._save()
                return
            with open(self.top / LOCK, "a") as file:
                os.utime(file.fileno())
                lock_within(file.fileno(), _LOCK_S)
                self._depth = 1
                try:
                    self.load()
                    yield
                finally:
                    self._depth = 0
                    self._save()

    def load(self) -> None:
        try:
            self._state = json.loads((self.top / STATE).read_bytes())
        except (FileNotFoundError, ValueError):
            self._state = {}
        self._saved = json.dumps(self._state)

    _saved = ""

    def _save(self) -> None:
        text = json.dumps(self._state)
        if text != self._saved:
            path = self.top / STATE
            temporary = path.with_name(f"{STATE}.{os.getpid()}")
            temporary.write_text(text)  # it may be lost with the machine: then the copy is, too
            os.replace(temporary, path)
            self._saved = text


def _chunks(path: Path) -> Iterator[memoryview]:
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            yield memoryview(chunk)
