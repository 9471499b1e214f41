"""What cluster/storage.py promises, held by every store: one suite over file, memory, moto and rclone, the latter two
through obstore and through s3fs."""

from __future__ import annotations

import os
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import pytest
from s3servers import S3Server, moto, rclone

from dtrain.cluster.errors import AlreadyExists, StorageError
from dtrain.cluster.storage import Storage, open_storage
from dtrain.runtime.stores.limits import MIB

KINDS = ("file", "memory", "moto", "moto-s3fs", "rclone", "rclone-s3fs")
BUCKET = "checkpoints"
MULTIPART_BYTES = 17 * MIB  # more than one part


@pytest.fixture(
    scope="module",
    params=[kind if kind in ("file", "memory") else pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS],
)
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, S3Server]]:
    """(kind, the server that it needs), started once for all tests of a kind."""
    kind = request.param
    with ExitStack() as stack:
        if kind.startswith("moto"):
            running = stack.enter_context(moto())
        elif kind.startswith("rclone"):
            running = stack.enter_context(rclone(tmp_path_factory.mktemp("rclone")))
        else:
            yield kind, S3Server(name="none", endpoint="")
            return
        running.make_bucket(BUCKET)
        yield kind, running


@pytest.fixture
def url(server: tuple[str, S3Server], tmp_path: Path) -> Iterator[str]:
    kind, running = server
    folder = f"runs/{uuid.uuid4().hex}"
    if kind == "file":
        yield str(tmp_path / "store")
    elif kind == "memory":
        yield f"memory://{folder}"
    else:
        with running.environment():
            yield f"{'fsspec+' if kind.endswith('s3fs') else ''}s3://{BUCKET}/{folder}"


@pytest.fixture
def store(url: str) -> Storage:
    return open_storage(url)


def upload(store: Storage, key: str, data: bytes) -> None:
    store.upload(key, [memoryview(data)], len(data))


def names_in(store: Storage, prefix: str = "") -> list[str]:
    return [info.key for info in store.list(prefix)]


def test_an_empty_store(store: Storage) -> None:
    assert list(store.list("")) == []
    assert list(store.list("step-1/x")) == []
    assert store.list_dirs("") == []
    assert store.list_dirs("attempts/") == []
    assert store.stat("a") is None
    assert store.stat("a/b") is None
    with pytest.raises(FileNotFoundError):
        store.get("a")
    with pytest.raises(FileNotFoundError):
        store.read_into("a", 0, memoryview(bytearray(1)))
    store.delete("a", "b/c")


def test_put_if_absent_keeps_the_first(store: Storage) -> None:
    before = time.time()
    store.put_if_absent("attempts/0001.json", b"first")
    with pytest.raises(AlreadyExists):
        store.put_if_absent("attempts/0001.json", b"second")
    assert store.get("attempts/0001.json") == b"first"
    info = store.stat("attempts/0001.json")
    assert info is not None
    assert (info.key, info.size_bytes) == ("attempts/0001.json", 5)
    assert before - 2 < info.modified_at < time.time() + 2
    assert names_in(store) == ["attempts/0001.json"]
    assert store.list_dirs("") == ["attempts"]


def test_of_racing_callers_one_wins(url: str) -> None:
    store, start = open_storage(url), threading.Barrier(16)

    def put(number: int) -> bool:
        mine = store if number % 2 else open_storage(url)  # some as if from processes of their own
        start.wait()
        try:
            mine.put_if_absent("attempts/0001.json", str(number).encode() * 100)
        except AlreadyExists:
            return False
        return True

    with ThreadPoolExecutor(16) as pool:
        won = [number for number, first in enumerate(pool.map(put, range(16))) if first]
    assert len(won) == 1
    assert store.get("attempts/0001.json") == str(won[0]).encode() * 100
    assert names_in(store) == ["attempts/0001.json"]


@pytest.mark.parametrize("size_bytes", [0, 1, 1000, MULTIPART_BYTES])
def test_an_upload_appears_when_it_is_whole(store: Storage, size_bytes: int) -> None:
    content = os.urandom(size_bytes)

    def parts() -> Iterator[memoryview]:
        middle = size_bytes * 2 // 3
        yield memoryview(content)[:middle]
        assert names_in(store) == []
        assert store.stat("step/a.bin") is None
        yield memoryview(content)[middle:]

    store.upload("step/a.bin", parts(), size_bytes)
    assert store.get("step/a.bin") == content
    info = store.stat("step/a.bin")
    assert info is not None
    (listed,) = store.list("")
    assert (info.key, info.size_bytes) == (listed.key, listed.size_bytes) == ("step/a.bin", size_bytes)
    assert abs(info.modified_at - listed.modified_at) <= 1  # HTTP's headers have whole seconds
    upload(store, "step/a.bin", b"again")
    assert store.get("step/a.bin") == b"again"


def test_an_upload_that_fails_leaves_nothing(store: Storage) -> None:
    def parts() -> Iterator[memoryview]:
        yield memoryview(bytes(MULTIPART_BYTES - 1))
        raise RuntimeError("the disk of my dreams")

    with pytest.raises(RuntimeError, match="dreams"):
        store.upload("step/a.bin", parts(), MULTIPART_BYTES)
    assert names_in(store) == []
    assert store.discard_uploads("", before=time.time() + 60) == 0


def test_ranges_are_read_into_place(store: Storage) -> None:
    content = os.urandom(70 * MIB // 10)
    upload(store, "a.bin", content)
    for begin, end in ((0, 0), (0, 1), (5, 6), (0, len(content)), (1, len(content)), (12345, 67890)):
        target = bytearray(b"\xff" * (end - begin + 2))
        store.read_into("a.bin", begin, memoryview(target)[1:-1])
        assert target[1:-1] == content[begin:end]
        assert target[0] == target[-1] == 0xFF
    for begin, end in ((len(content) - 1, len(content) + 1), (len(content), len(content) + 1), (10**9, 10**9 + 5)):
        with pytest.raises(StorageError, match=f"ends at {len(content)}"):
            store.read_into("a.bin", begin, memoryview(bytearray(end - begin)))


def test_lists_are_in_key_order(store: Storage) -> None:
    keys = ["a.b", "a/b", "a/c/d", "a0", "b", "step-1/x", "step-10/y y%20", "step-10/é"]
    for key in reversed(keys):
        upload(store, key, key.encode())
    assert names_in(store) == sorted(keys)
    assert names_in(store, "a/") == ["a/b", "a/c/d"]
    assert names_in(store, "step-1") == ["step-1/x", "step-10/y y%20", "step-10/é"]
    assert names_in(store, "step-10/y") == ["step-10/y y%20"]
    assert names_in(store, "a/c/d") == ["a/c/d"]
    assert store.list_dirs("") == ["a", "step-1", "step-10"]
    assert store.list_dirs("a/") == ["c"]
    assert store.get("step-10/y y%20") == b"step-10/y y%20"
    assert store.stat("a/c") is None
    store.delete(*keys[1:], "not-there")
    assert names_in(store) == keys[:1]
    assert store.list_dirs("") == []
    with pytest.raises(StorageError, match="must be empty or end in"):
        store.list_dirs("a")


def test_keys_never_leave_the_root(store: Storage) -> None:
    acts: tuple[Callable[[str], object], ...] = (
        store.get,
        lambda key: store.read_into(key, 0, memoryview(bytearray(1))),
        store.stat,
        lambda key: store.put_if_absent(key, b""),
        lambda key: upload(store, key, b""),
        store.delete,
    )
    for key in ("", "/etc/passwd", "../x", "a/../../x", "a//b", "a/", ".x", "a/.x", "a\0b", "."):
        for act in acts:
            with pytest.raises(StorageError, match="is not a key"):
                act(key)
    assert names_in(store) == []


def test_a_store_that_can_be_written_to(store: Storage) -> None:
    store.check_writable(15)
    assert names_in(store) == []
    assert store.list_dirs("") == []
