"""What cluster/storage.py promises, held by the file store."""

from __future__ import annotations

import errno
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from dtrain.cluster.errors import AlreadyExists, StorageError, UsageError
from dtrain.cluster.filestore import FileStorage
from dtrain.cluster.storage import open_storage


def test_paths_and_urls_name_the_same_place(tmp_path: Path) -> None:
    here = tmp_path / "a b"
    stores = [open_storage(str(here)), open_storage(here.as_uri()), open_storage("a b"), open_storage(f"file://{here}")]
    assert {store.url for store in stores} == {here.as_uri()}


@pytest.mark.parametrize("url", ["file://host/x", "file:x", "", "file:///x?y=1"])
def test_other_urls_are_refused(url: str) -> None:
    if url == "file:x":
        assert FileStorage(url).root.name == "file:x"  # no "://": a path
    else:
        with pytest.raises(UsageError):
            FileStorage(url)


def test_reading_creates_nothing(tmp_path: Path) -> None:
    store = FileStorage(str(tmp_path / "deep" / "store"))
    assert list(store.list("")) == []
    assert store.list_dirs("") == []
    store.delete("a/b")
    assert store.discard_uploads("", time.time()) == 0
    for read in (lambda: store.get("a/b"), lambda: store.read_into("a/b", 0, memoryview(bytearray(1)))):
        with pytest.raises(FileNotFoundError):
            read()
    assert list(tmp_path.iterdir()) == []


def test_put_and_read(tmp_path: Path) -> None:
    store = FileStorage(str(tmp_path / "store"))
    store.put_if_absent("a/b.json", b"0123456789")
    assert store.get("a/b.json") == b"0123456789"
    target = bytearray(3)
    store.read_into("a/b.json", 4, memoryview(target))
    assert target == b"456"
    with pytest.raises(AlreadyExists):
        store.put_if_absent("a/b.json", b"other")
    assert store.get("a/b.json") == b"0123456789"
    with pytest.raises(StorageError, match="ends at 10"):
        store.read_into("a/b.json", 8, memoryview(bytearray(3)))


def test_one_of_many_wins(tmp_path: Path) -> None:
    store, won = FileStorage(str(tmp_path / "store")), []
    start = threading.Barrier(8)

    def put(number: int) -> None:
        start.wait()
        try:
            store.put_if_absent("attempts/0001.json", str(number).encode() * 1000)
            won.append(number)
        except AlreadyExists:
            pass

    threads = [threading.Thread(target=put, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == 1
    assert store.get("attempts/0001.json") == str(won[0]).encode() * 1000
    assert os.listdir(tmp_path / "store" / "attempts") == ["0001.json"]


def test_an_upload_appears_when_it_is_whole(tmp_path: Path) -> None:
    store = FileStorage(str(tmp_path))

    def parts() -> Iterator[memoryview]:
        yield memoryview(b"abc")
        assert list(store.list("")) == []
        assert store.list_dirs("") == []
        assert store.stat("step/a.bin") is None
        yield memoryview(b"defg").cast("B", (2, 2))

    store.upload("step/a.bin", parts(), 7)
    assert store.get("step/a.bin") == b"abcdefg"
    assert os.listdir(tmp_path / "step") == ["a.bin"]
    store.upload("step/a.bin", [memoryview(b"x")], 1)
    assert store.get("step/a.bin") == b"x"


def test_an_upload_that_fails_leaves_nothing(tmp_path: Path) -> None:
    def parts() -> Iterator[memoryview]:
        yield memoryview(b"abc")
        raise RuntimeError

    with pytest.raises(RuntimeError):
        FileStorage(str(tmp_path)).upload("step/a.bin", parts(), 6)
    assert list(tmp_path.iterdir()) == []


def test_list_is_in_key_order_and_shows_no_uploads(tmp_path: Path) -> None:
    store = FileStorage(str(tmp_path))
    keys = ["a.b", "a/b", "a/c/d", "a0", "b", "step-1/x", "step-10/y"]
    for key in reversed(keys):
        store.put_if_absent(key, key.encode())
    (tmp_path / "b-link").symlink_to(tmp_path / "a")
    (tmp_path / ".hidden").write_text("x")
    assert [info.key for info in store.list("")] == sorted(keys)
    assert [info.key for info in store.list("a/")] == ["a/b", "a/c/d"]
    assert [info.key for info in store.list("step-1")] == ["step-1/x", "step-10/y"]
    assert [info.key for info in store.list("a/c/d")] == ["a/c/d"]
    assert [info.size_bytes for info in store.list("step-10/")] == [9]
    assert store.list_dirs("") == ["a", "step-1", "step-10"]
    assert store.list_dirs("a/") == ["c"]
    info = store.stat("a/c/d")
    assert info is not None
    assert [info] == list(store.list("a/c/d"))
    assert store.stat("a/c") is None


@pytest.mark.parametrize("key", ["", "/etc/passwd", "../x", "a/../../x", "a//b", "a/", ".x", "a/.x", "a\0b", "."])
def test_keys_never_leave_the_root(tmp_path: Path, key: str) -> None:
    store = FileStorage(str(tmp_path / "root"))
    for act in (
        lambda: store.get(key),
        lambda: store.put_if_absent(key, b""),
        lambda: store.upload(key, [], 0),
        lambda: store.delete(key),
    ):
        with pytest.raises(StorageError, match="is not a key"):
            act()
    assert list(tmp_path.iterdir()) == []


def test_delete_takes_empty_directories_along(tmp_path: Path) -> None:
    store = FileStorage(str(tmp_path / "root"))
    for key in ("step/deep/a", "step/b"):
        store.put_if_absent(key, b"")
    store.delete("step/deep/a")
    store.delete("step/deep/a")
    assert os.listdir(tmp_path / "root" / "step") == ["b"]
    store.delete("step/b")
    assert os.listdir(tmp_path / "root") == []


def test_what_killed_processes_left_is_discarded(tmp_path: Path) -> None:
    store = FileStorage(str(tmp_path))

    def parts() -> Iterator[memoryview]:
        yield memoryview(b"a")
        (path,) = tmp_path.glob("step/.a.*")
        assert store.discard_uploads("", before=time.time() - 60) == 0
        os.utime(path, (1.0, 1.0))
        assert store.discard_uploads("", before=time.time() - 60) == 1
        yield memoryview(b"b")

    with pytest.raises(StorageError, match="removed while it was going on"):
        store.upload("step/a", parts(), 2)
    assert list(store.list("")) == []


def test_a_full_disk_is_said_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int, data: memoryview, offset: int) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(StorageError, match=r"a\.bin: disk full"):
        FileStorage(str(tmp_path)).put_if_absent("a.bin", b"x")
    assert list(tmp_path.iterdir()) == []


def test_a_repeated_link_on_nfs_is_not_a_lost_race(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    link = os.link

    def link_twice(source: Path, target: Path) -> None:
        link(source, target)
        link(source, target)

    monkeypatch.setattr(os, "link", link_twice)
    store = FileStorage(str(tmp_path))
    store.put_if_absent("a", b"x")
    with pytest.raises(AlreadyExists):
        store.put_if_absent("a", b"y")
    assert store.get("a") == b"x"


def test_a_file_system_without_links_is_refused_with_a_way_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(source: Path, target: Path) -> None:
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, "link", refuse)
    with pytest.raises(StorageError, match="no hard links"):
        FileStorage(str(tmp_path)).put_if_absent("a", b"x")


def test_files_follow_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        FileStorage(str(tmp_path)).put_if_absent("d/a", b"x")
    finally:
        os.umask(before)
    assert (tmp_path / "d" / "a").stat().st_mode & 0o777 == 0o640
    assert (tmp_path / "d").stat().st_mode & 0o777 == 0o750
