"""Every flipped byte of every file of a step is found, and its tensor named."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from dtrain.cluster.filestore import FileStorage
from dtrain.runtime.checkpoint import names
from dtrain.runtime.checkpoint.attempts import CheckpointInfo, claim_attempt, live_checkpoints
from dtrain.runtime.checkpoint.board import LocalBoard
from dtrain.runtime.checkpoint.checkpointer import Checkpointer
from dtrain.runtime.checkpoint.index import FileIndex
from dtrain.runtime.checkpoint.read import read_index, read_manifest
from dtrain.runtime.checkpoint.verify import verify_checkpoint
from dtrain.strategies.boxes import TensorSpec, replicated, whole

TENSORS = {
    "model.big": torch.randn(700, 300, generator=torch.Generator().manual_seed(0)),  # 840 kB: several blocks
    "model.small": torch.arange(10, dtype=torch.uint8),
    "optim.big.step": torch.tensor(3.0),
}


@pytest.fixture
def store(tmp_path: Path) -> FileStorage:
    """One step, written by two ranks."""
    store, board = FileStorage(str(tmp_path / "store")), LocalBoard()
    claim_attempt(store, host="h", job_id="j")
    specs = [
        TensorSpec(
            name=name, dtype="U8" if tensor.dtype == torch.uint8 else "F32", shape=tuple(tensor.shape),
            layout=replicated(tensor.ndim, 2),
        )
        for name, tensor in TENSORS.items()
    ]  # fmt: skip
    ranks = [
        Checkpointer(
            store, attempt=1, rank=rank, world_size=2, strategy={"name": "ddp"}, board=board,
            on_commit=lambda done: None, keep=None,
        )
        for rank in range(2)
    ]  # fmt: skip
    for checkpointer in ranks:
        local = {name: [(whole(tuple(tensor.shape)), tensor)] for name, tensor in TENSORS.items()}
        checkpointer.save(1, specs, local, {"step": 1})
    for checkpointer in ranks:
        checkpointer.wait()
    return store


def newest(store: FileStorage) -> CheckpointInfo:
    (info,) = live_checkpoints(store)
    return info


def files(store: FileStorage) -> list[Path]:
    return sorted((store.root / names.step_dir(1, 1)).iterdir())


def index_of(store: FileStorage, data_file: str) -> FileIndex:
    manifest = read_manifest(store, 1, 1)
    (file,) = [file for file in manifest.files if file.name == data_file]
    return read_index(store, manifest, file)


def test_a_whole_checkpoint_has_no_damage(store: FileStorage) -> None:
    assert [path.name for path in files(store)] == [
        "manifest.json",
        "rank-00000.index.json",
        "rank-00000.safetensors",
        "rank-00001.index.json",
        "rank-00001.safetensors",
    ]
    assert verify_checkpoint(store, newest(store)) == []


def test_every_flip_is_found_and_named(store: FileStorage) -> None:
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    rng, info = random.Random(seed), newest(store)
    for path in files(store):
        raw = path.read_bytes()
        index = index_of(store, path.name) if path.suffix == ".safetensors" else None
        edges = {0, 7, 8, len(raw) - 1} | ({e.begin for e in index.entries} if index else set())
        for position in sorted(edges | {rng.randrange(len(raw)) for _ in range(25)}):
            damaged = bytearray(raw)
            damaged[position] ^= 1 << rng.randrange(8)
            path.write_bytes(damaged)
            damages = verify_checkpoint(store, info)
            tensors = [e.name for e in index.entries if e.begin <= position < e.end] if index else []
            assert [(d.file, d.tensor) for d in damages] == [(path.name, tensors[0] if tensors else "")], position
        path.write_bytes(raw)
    assert verify_checkpoint(store, info) == []


@pytest.mark.parametrize("suffix", [".safetensors", ".index.json", "manifest.json"])
@pytest.mark.parametrize(
    "change", [lambda raw: raw[:-1], lambda raw: raw[:5], lambda raw: b"", lambda raw: raw + b"\0"]
)
def test_files_of_another_length(store: FileStorage, suffix: str, change: Callable[[bytes], bytes]) -> None:
    info = newest(store)
    path = next(path for path in files(store) if path.name.endswith(suffix))
    path.write_bytes(change(path.read_bytes()))
    damages = verify_checkpoint(store, info)
    assert {damage.file for damage in damages} == {path.name}
    assert all(damage.what and "step-" not in damage.what for damage in damages)


@pytest.mark.parametrize("name", ["rank-00001.safetensors", "rank-00001.index.json"])
def test_a_missing_file(store: FileStorage, name: str) -> None:
    (store.root / names.step_dir(1, 1) / name).unlink()
    assert [(damage.file, damage.what) for damage in verify_checkpoint(store, newest(store))] == [(name, "is missing")]


def test_memory_stays_bounded(store: FileStorage, monkeypatch: pytest.MonkeyPatch) -> None:
    largest = 0
    read = FileStorage.read_into

    def watch(self: FileStorage, key: str, offset: int, target: memoryview) -> None:
        nonlocal largest
        largest = max(largest, target.nbytes)
        read(self, key, offset, target)

    monkeypatch.setattr(FileStorage, "read_into", watch)
    monkeypatch.setattr("dtrain.runtime.checkpoint.verify._READ_BLOCKS", 1)
    assert verify_checkpoint(store, newest(store)) == []
    assert largest == 256 * 1024
