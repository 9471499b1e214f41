"""Retention: what goes and what stays, and that a crash or a failure at any point leaves checkpoints that load."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import pytest
import torch

from dtrain.cluster.errors import FencedError, StorageError
from dtrain.cluster.filestore import FileStorage
from dtrain.cluster.storage import ObjectInfo
from dtrain.runtime.checkpoint import names
from dtrain.runtime.checkpoint.attempts import claim_attempt, live_checkpoints
from dtrain.runtime.checkpoint.board import LocalBoard
from dtrain.runtime.checkpoint.checkpointer import Checkpointer
from dtrain.runtime.checkpoint.loader import load_tensors
from dtrain.runtime.checkpoint.manifest import decode_manifest, encode_manifest
from dtrain.runtime.checkpoint.read import read_manifest
from dtrain.runtime.checkpoint.retention import apply_retention
from dtrain.runtime.checkpoint.verify import verify_checkpoint
from dtrain.strategies.boxes import TensorSpec, replicated, whole

SPECS = [TensorSpec(name="a", dtype="F32", shape=(10,), layout=replicated(1, 1))]


@pytest.fixture
def store(tmp_path: Path) -> FileStorage:
    return FileStorage(str(tmp_path / "store"))


def save(store: FileStorage, step: int, attempt: int, keep: int | None = None) -> None:
    """A step whose tensor holds its number."""
    checkpointer = Checkpointer(
        store, attempt=attempt, rank=0, world_size=1, strategy={}, board=LocalBoard(), on_commit=lambda done: None,
        keep=keep,
    )  # fmt: skip
    checkpointer.save(step, SPECS, {"a": [(whole((10,)), torch.full((10,), float(step)))]}, {})
    checkpointer.wait()


def claim(store: FileStorage, *skip: tuple[int, int]) -> int:
    return claim_attempt(store, host="h", job_id="j", skip=frozenset(skip)).number


def steps(store: FileStorage) -> list[tuple[int, int, bool]]:
    return [(info.step, info.attempt, info.live) for info in live_checkpoints(store)]


def directories(store: FileStorage) -> list[str]:
    return [name for name in os.listdir(store.root) if name.startswith("step-")]


def age(store: FileStorage, prefix: str, seconds: float) -> None:
    then = time.time() - seconds
    for path in store.root.glob(f"{prefix}*/*"):
        os.utime(path, (then, then))


def assert_loads(store: FileStorage, step: int, attempt: int) -> None:
    target = torch.zeros(10)
    load_tensors(store, read_manifest(store, step, attempt), [("a", whole((10,)), target)])
    assert torch.equal(target, torch.full((10,), float(step)))


def test_the_newest_live_ones_stay(store: FileStorage) -> None:
    claim(store)
    for step in (1, 2, 3, 4):
        save(store, step, 1, keep=2)
    assert steps(store) == [(3, 1, True), (4, 1, True)]
    assert len(directories(store)) == 2
    assert_loads(store, 3, 1)


def test_dead_ones_go_and_the_starting_point_stays(store: FileStorage) -> None:
    claim(store)
    for step in (1, 2, 3):
        save(store, step, 1)
    claim(store, (3, 1))
    assert steps(store) == [(1, 1, True), (2, 1, True), (3, 1, False)]
    save(store, 3, 2, keep=2)
    assert steps(store) == [(2, 1, True), (3, 2, True)]


def test_all_is_kept_without_a_number(store: FileStorage) -> None:
    claim(store)
    for step in (1, 2, 3, 4):
        save(store, step, 1)
    assert len(steps(store)) == 4


def test_with_nothing_live_nothing_goes(store: FileStorage) -> None:
    claim(store)
    save(store, 1, 1)
    claim_attempt(store, host="h", job_id="j", fresh_from=(0, 0))
    apply_retention(store, keep=1)
    assert steps(store) == [(1, 1, False)]


def test_an_old_attempt_deletes_nothing(store: FileStorage) -> None:
    claim(store)
    for step in (1, 2, 3):
        save(store, step, 1)
    claim(store)
    with pytest.raises(FencedError):
        apply_retention(store, keep=1, attempt=1)
    assert len(steps(store)) == 3


def test_leftovers_go_when_nobody_can_be_writing_them(store: FileStorage) -> None:
    claim(store)
    for number in (1, 2):
        store.put_if_absent(f"{names.step_dir(50, number)}/rank-00000.safetensors", b"left over")

    def upload_that_is_too_slow() -> Iterator[memoryview]:
        yield memoryview(b"left ")
        claim(store)
        save(store, 1, 2)
        apply_retention(store, keep=1)
        assert len(directories(store)) == 4  # all young
        age(store, "step-00000050", 7200)
        age(store, "step-00000051", 7200)
        apply_retention(store, keep=1)
        # The file of the newest attempt may belong to a save that is going on.
        assert sorted(directories(store)) == [names.step_dir(1, 2), names.step_dir(50, 2)]
        yield memoryview(b"over")

    with pytest.raises(StorageError, match="removed while it was going on"):
        store.upload(f"{names.step_dir(51, 1)}/rank-00000.safetensors", upload_that_is_too_slow(), 9)


def test_age_is_told_by_the_stores_clock(store: FileStorage) -> None:
    """A store whose clock is days behind: nothing is old there, however late it is here."""
    claim(store)
    store.put_if_absent(f"{names.step_dir(50, 1)}/rank-00000.safetensors", b"left over")
    claim(store)
    save(store, 1, 2)
    age(store, "step-", 3 * 86400)
    apply_retention(store, keep=1)
    assert len(directories(store)) == 2


def test_files_that_another_manifest_names_stay(store: FileStorage) -> None:
    """Step 2 names the file of step 1, as an unchanged tensor's would be."""
    claim(store)
    save(store, 1, 1)
    first = read_manifest(store, 1, 1)
    directory = names.step_dir(2, 1)
    raw = encode_manifest(first).replace(b'"step":1,', b'"step":2,').replace(b'"writer":0,', b'"writer":0,"dir":"X",')
    raw = raw.replace(b'"X"', f'"{first.dir}"'.encode())
    store.put_if_absent(names.manifest_key(directory), _resealed(raw))
    assert decode_manifest(store.get(names.manifest_key(directory)), directory).files[0].dir == first.dir
    apply_retention(store, keep=1, lease_s=0.0)
    assert steps(store) == [(2, 1, True)]
    target = torch.zeros(10)
    load_tensors(store, read_manifest(store, 2, 1), [("a", whole((10,)), target)])
    assert torch.equal(target, torch.ones(10))
    (info,) = live_checkpoints(store)
    assert verify_checkpoint(store, info) == []


def _resealed(raw: bytes) -> bytes:
    import xxhash

    _, _, body = raw.partition(b"\n")
    return b'{"digest":"' + xxhash.xxh3_128_hexdigest(body).encode() + b'",\n' + body


def test_a_damaged_manifest_does_not_stop_the_cleaning(store: FileStorage) -> None:
    claim(store)
    for step in (1, 2, 3):
        save(store, step, 1)
    (store.root / names.step_dir(2, 1) / "manifest.json").write_bytes(b"garbage")
    apply_retention(store, keep=2)
    assert steps(store) == [(2, 1, True), (3, 1, True)]
    assert len(os.listdir(store.root / names.step_dir(2, 1))) == 3
    assert_loads(store, 3, 1)


class Crash(BaseException):
    """The process is gone: nothing catches this."""


class Faulty(FileStorage):
    """Fails at operation number `at`: a crash before it, a crash after it, or an error that the store reports."""

    def __init__(self, root: Path, at: int, kind: str) -> None:
        super().__init__(str(root))
        self.at, self.kind, self.count = at, kind, 0

    def _enter(self) -> None:
        self.count += 1
        if self.count == self.at and self.kind != "after":
            raise Crash if self.kind == "before" else StorageError("the store is out of order")

    def _leave(self) -> None:
        if self.count == self.at and self.kind == "after":
            raise Crash

    def put_if_absent(self, key: str, data: bytes) -> None:
        self._enter()
        super().put_if_absent(key, data)
        self._leave()

    def upload(self, key: str, data: Iterable[memoryview], size_bytes: int) -> None:
        self._enter()
        super().upload(key, data, size_bytes)
        self._leave()

    def get(self, key: str) -> bytes:
        self._enter()
        return super().get(key)

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        self._enter()
        return super().list(prefix)

    def list_dirs(self, prefix: str) -> Sequence[str]:
        self._enter()
        return super().list_dirs(prefix)

    def stat(self, key: str) -> ObjectInfo | None:
        self._enter()
        return super().stat(key)

    def delete(self, *keys: str) -> None:
        for key in keys:
            self._enter()
            super().delete(key)
            self._leave()


SLOW = [pytest.param(kind, marks=pytest.mark.slow) for kind in ("after", "error")]


@pytest.mark.parametrize("kind", ["before", *SLOW])
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_fault_at_any_operation_leaves_steps_that_load(tmp_path: Path, kind: str) -> None:
    """Save step 4 and keep two, with a fault at each storage operation in turn; then a new attempt goes on."""
    before = FileStorage(str(tmp_path / "before"))
    claim(before)
    for step in (1, 2, 3):
        save(before, step, 1)
    for at in range(1, 200):
        root = tmp_path / f"{at}"
        shutil.copytree(before.root, root)
        sound = FileStorage(str(root))
        faulty = Faulty(root, at, kind)
        try:
            save(faulty, 4, 1, keep=2)
        except StorageError:
            assert kind == "error"
        assert_all_load(sound)
        newest = max(step for step, _, live in steps(sound) if live)
        assert newest in (3, 4)
        number = claim(sound)
        save(sound, newest + 1, number, keep=2)
        assert_all_load(sound)
        assert len(steps(sound)) == 2
        if faulty.count < at:  # it did not come so far: every operation has been tried
            assert at > 10
            return
    raise AssertionError("more operations than expected")


def assert_all_load(store: FileStorage) -> None:
    infos = live_checkpoints(store)
    assert infos
    for info in infos:
        assert verify_checkpoint(store, info) == []
        assert_loads(store, info.step, info.attempt)
