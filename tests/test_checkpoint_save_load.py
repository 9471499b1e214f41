"""Saving by several ranks and loading in any other layout, over real files. Ranks are threads that share a board."""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from dtrain.cluster.errors import CheckpointError, CorruptCheckpoint, FencedError, StorageError
from dtrain.cluster.filestore import FileStorage
from dtrain.runtime.checkpoint import names
from dtrain.runtime.checkpoint.attempts import claim_attempt, live_checkpoints, newest_live
from dtrain.runtime.checkpoint.board import LocalBoard
from dtrain.runtime.checkpoint.checkpointer import Checkpointer, Committed, Local
from dtrain.runtime.checkpoint.index import BLOCK_BYTES
from dtrain.runtime.checkpoint.loader import load_model, load_tensors
from dtrain.runtime.checkpoint.read import read_manifest
from dtrain.runtime.checkpoint.torchtypes import DTYPE_NAMES
from dtrain.runtime.checkpoint.verify import verify_checkpoint
from dtrain.strategies.boxes import Box, Layout, Patches, TensorSpec, flat_boxes, grid_boxes, replicated, sharded, whole

Tensors = dict[str, Tensor]
MakeLayout = Callable[[int], Layout | Patches]


@pytest.fixture
def store(tmp_path: Path) -> FileStorage:
    return FileStorage(str(tmp_path / "store"))


def ddp(world_size: int) -> MakeLayout:
    return lambda num_dims: replicated(num_dims, world_size)


def fsdp(world_size: int, dim: int = 0) -> MakeLayout:
    ranks = tuple(range(world_size))
    return lambda num_dims: sharded(num_dims, min(dim, num_dims - 1), ranks) if num_dims else replicated(0, world_size)


def some_tensors(seed: int = 0) -> Tensors:
    """Irregular sizes, smaller than the world, empty, 0-dim, of many types; one of several checksum blocks."""
    generator = torch.Generator().manual_seed(seed)
    values = {
        "model.embed": torch.randn(1001, 130, generator=generator),
        "model.odd": torch.randn(7, 3, 5, generator=generator),
        "model.tiny": torch.randn(1, generator=generator),
        "model.half": torch.randn(33, 9, generator=generator).to(torch.bfloat16),
        "model.empty": torch.empty(0, 4),
        "model.flags": torch.rand(5, generator=generator) > 0.5,
        "model.bytes": torch.randint(0, 255, (11,), generator=generator, dtype=torch.uint8),
        "optim.embed.step": torch.tensor(17.0 + seed),
        "model.count": torch.tensor(2**40 + seed),
        "model.wide": torch.randn(3, 70_000, generator=generator).to(torch.float64),
    }
    return values


def specs_of(tensors: Tensors, layout: MakeLayout) -> list[TensorSpec]:
    return [
        TensorSpec(name=name, dtype=DTYPE_NAMES[t.dtype], shape=tuple(t.shape), layout=layout(t.ndim))
        for name, t in tensors.items()
    ]


def local_of(specs: Sequence[TensorSpec], tensors: Tensors, rank: int) -> dict[str, list[tuple[Box, Tensor]]]:
    """What `rank` holds, in memory of its own."""
    local: dict[str, list[tuple[Box, Tensor]]] = {}
    for spec in specs:
        cells = spec.layout.cells(spec.shape)
        whole_box = whole(spec.shape)
        local[spec.name] = [
            (box, tensors[spec.name][box.relative_to(whole_box)].clone()) for box, owners in cells if rank in owners
        ]
    return local


class Ranks:
    """The checkpointers of one attempt."""

    def __init__(self, store: FileStorage, world_size: int, *, attempt: int = 1, keep: int | None = None) -> None:
        self.board, self.commits = LocalBoard(), list[Committed]()
        self.all = [
            Checkpointer(
                store,
                attempt=attempt,
                rank=rank,
                world_size=world_size,
                strategy={"name": "test"},
                board=self.board,
                on_commit=self.commits.append,
                keep=keep,
                timeout_s=20,
            )
            for rank in range(world_size)
        ]

    def save(self, step: int, tensors: Tensors, layout: MakeLayout, state: dict[str, Any] | None = None) -> None:
        specs = specs_of(tensors, layout)
        for rank, checkpointer in enumerate(self.all):
            checkpointer.save(step, specs, local_of(specs, tensors, rank), state or {"step": step})
        errors = [error for checkpointer in self.all if (error := _wait(checkpointer))]
        if errors:
            raise errors[0]

    def close(self) -> None:
        for checkpointer in self.all:
            checkpointer.close()


def _wait(checkpointer: Checkpointer) -> Exception | None:
    try:
        checkpointer.wait()
    except (CheckpointError, StorageError, FencedError) as error:
        return error
    return None


def claim(store: FileStorage) -> int:
    return claim_attempt(store, host="h", job_id="j").number


def load_as(store: FileStorage, step: int, attempt: int, tensors: Tensors, layout: MakeLayout, world: int) -> None:
    """Loads as every rank of a layout would, and compares bit by bit."""
    manifest = read_manifest(store, step, attempt)
    specs = specs_of(tensors, layout)
    for rank in range(world):
        expected = local_of(specs, tensors, rank)
        requests = [(name, box, torch.zeros_like(part)) for name, boxes in expected.items() for box, part in boxes]
        load_tensors(store, manifest, requests)
        for (name, box, got), part in zip(requests, [p for boxes in expected.values() for _, p in boxes], strict=True):
            assert torch.equal(_bits(got), _bits(part)), (rank, name, box)


def _bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


LAYOUTS = [(ddp(1), 1), (ddp(3), 3), (fsdp(2), 2), (fsdp(4), 4), (fsdp(3, dim=1), 3)]


@pytest.mark.parametrize(("layout", "world"), LAYOUTS)
def test_any_layout_loads_what_any_other_saved(store: FileStorage, layout: MakeLayout, world: int) -> None:
    claim(store)
    tensors = some_tensors()
    ranks = Ranks(store, world)
    ranks.save(5, tensors, layout, {"step": 5, "position": [1, 2]})
    ranks.close()
    assert read_manifest(store, 5, 1).state == {"step": 5, "position": [1, 2]}
    (info,) = live_checkpoints(store)
    assert verify_checkpoint(store, info) == []
    for other, other_world in LAYOUTS:
        load_as(store, 5, 1, tensors, other, other_world)


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_any_box_comes_back(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    """Any shape in any grid or flat ranges over any owners; any box of it into memory that is not contiguous."""
    store = FileStorage(str(tmp_path_factory.mktemp("any")))
    claim(store)
    world = data.draw(st.integers(1, 3))
    shape = tuple(data.draw(st.lists(st.integers(1, 40), min_size=1, max_size=3)))
    parts = tuple(data.draw(st.integers(1, 3)) for _ in shape)
    num_parts = len(grid_boxes(shape, parts))
    owners = st.lists(st.integers(0, world - 1), min_size=1, unique=True).map(tuple)
    layout: Layout | Patches = Layout(parts, tuple(data.draw(owners) for _ in range(num_parts)))
    if data.draw(st.booleans()):
        cuts = sorted(data.draw(st.lists(st.integers(0, math.prod(shape)), max_size=4)))
        ranges = zip([0, *cuts], [*cuts, math.prod(shape)], strict=True)
        layout = Patches(tuple((box, data.draw(owners)) for a, b in ranges for box in flat_boxes(shape, a, b)))
    tensors = {"t": torch.randn(shape)}
    ranks = Ranks(store, world)
    ranks.save(1, tensors, lambda num_dims: layout)
    offsets = tuple(data.draw(st.integers(0, size - 1)) for size in shape)
    sizes = tuple(data.draw(st.integers(0, size - begin)) for size, begin in zip(shape, offsets, strict=True))
    box = Box(offsets, sizes)
    target = torch.zeros((*reversed(sizes), 2))[..., 0].permute(*reversed(range(len(sizes))))
    load_tensors(store, read_manifest(store, 1, 1), [("t", box, target)])
    assert torch.equal(target, tensors["t"][box.relative_to(whole(shape))])


def test_files_are_plain_safetensors(store: FileStorage) -> None:
    claim(store)
    tensors = some_tensors()
    ranks = Ranks(store, 1)
    ranks.save(5, tensors, ddp(1))
    path = store.root / names.step_dir(5, 1) / "rank-00000.safetensors"
    loaded = safetensors.torch.load_file(path)
    assert set(loaded) == {name for name, tensor in tensors.items() if tensor.numel()}
    assert all(torch.equal(loaded[name], tensors[name]) for name in loaded)


def test_ranks_without_a_share_write_nothing(store: FileStorage) -> None:
    claim(store)
    ranks = Ranks(store, 3)
    ranks.save(5, {"model.a": torch.ones(1)}, ddp(3))
    manifest = read_manifest(store, 5, 1)
    assert [file.writer for file in manifest.files] == [1]
    assert len(list(store.list(f"{manifest.dir}/"))) == 3
    load_as(store, 5, 1, {"model.a": torch.ones(1)}, fsdp(2), 2)
    ranks.save(6, {}, ddp(3))
    assert read_manifest(store, 6, 1).files == ()


class Gate(FileStorage):
    """A store whose uploads wait until they are let through."""

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self.open = threading.Event()

    def upload(self, key: str, data: Iterable[memoryview], size_bytes: int) -> None:
        assert names.DATA_SUFFIX not in key or self.open.wait(20)
        super().upload(key, data, size_bytes)


def test_the_caller_may_change_its_tensors_when_save_returns(tmp_path: Path) -> None:
    store = Gate(str(tmp_path / "store"))
    claim(store)
    tensor, state = torch.arange(1000.0), {"list": [1]}
    specs = specs_of({"a": tensor}, ddp(1))
    (checkpointer,) = Ranks(store, 1).all
    checkpointer.save(1, specs, {"a": [(whole((1000,)), tensor)]}, state)
    tensor.zero_()
    state["list"].append(2)
    assert list(live_checkpoints(store)) == []
    store.open.set()
    checkpointer.wait()
    load_as(store, 1, 1, {"a": torch.arange(1000.0)}, ddp(1), 1)
    assert read_manifest(store, 1, 1).state == {"list": [1]}


def test_the_next_save_waits_for_the_one_before(tmp_path: Path) -> None:
    store = Gate(str(tmp_path / "store"))
    claim(store)
    first, second = torch.ones(10), torch.full((10,), 2.0)
    ranks = Ranks(store, 1)
    specs = specs_of({"a": first}, ddp(1))
    ranks.all[0].save(1, specs, {"a": [(whole((10,)), first)]}, {})
    timer = threading.Timer(0.2, store.open.set)
    timer.start()
    ranks.all[0].save(2, specs, {"a": [(whole((10,)), second)]}, {})
    ranks.all[0].wait()
    timer.join()
    assert [(done.step, done.attempt) for done in ranks.commits] == [(1, 1), (2, 1)]
    assert ranks.commits[0].seconds >= 0.1
    assert ranks.commits[0].bytes == read_manifest(store, 1, 1).size_bytes > 40
    load_as(store, 1, 1, {"a": first}, ddp(1), 1)
    load_as(store, 2, 1, {"a": second}, ddp(1), 1)


def test_a_saved_step_is_left_as_it_is(store: FileStorage) -> None:
    claim(store)
    ranks = Ranks(store, 2)
    ranks.save(1, {"a": torch.ones(10)}, ddp(2))
    ranks.save(1, {"a": torch.zeros(10)}, ddp(2))
    assert len(ranks.commits) == 1
    load_as(store, 1, 1, {"a": torch.ones(10)}, ddp(2), 2)


def test_tensors_of_any_memory_layout(store: FileStorage) -> None:
    claim(store)
    tensors = {"t": torch.randn(30, 50).t(), "step": torch.randn(9, 4)[::2, 1], "expanded": torch.ones(1).expand(6)}
    specs = specs_of(tensors, ddp(1))
    (checkpointer,) = Ranks(store, 1).all
    checkpointer.save(1, specs, {name: [(whole(tuple(t.shape)), t)] for name, t in tensors.items()}, {})
    checkpointer.wait()
    load_as(store, 1, 1, tensors, ddp(1), 1)


@pytest.mark.parametrize(
    ("local", "message"),
    [
        ({}, r"a: this rank is to write \[4\] at \[0\], but does not hold it"),
        ({"a": [(Box((0,), (3,)), torch.zeros(3))]}, "does not hold it"),
        ({"a": [(Box((0,), (4,)), torch.zeros(5))]}, r"its box is F32 \[4\], but the tensor is torch.float32 \[5\]"),
        ({"a": [(Box((0,), (4,)), torch.zeros(4, dtype=torch.float64))]}, "torch.float64"),
    ],
)
def test_a_state_that_is_not_what_was_announced(store: FileStorage, local: Local, message: str) -> None:
    claim(store)
    specs = specs_of({"a": torch.zeros(4)}, ddp(1))
    with pytest.raises(CheckpointError, match=message):
        Ranks(store, 1).all[0].save(1, specs, local, {})
    assert live_checkpoints(store) == []


class Breaking(FileStorage):
    """A store that fails at keys with `needle` in them."""

    needle = "no such key"

    def upload(self, key: str, data: Iterable[memoryview], size_bytes: int) -> None:
        self._break(key)
        super().upload(key, data, size_bytes)

    def put_if_absent(self, key: str, data: bytes) -> None:
        self._break(key)
        super().put_if_absent(key, data)

    def _break(self, key: str) -> None:
        if self.needle in key:
            raise StorageError(f"can't write {key}: disk full")


@pytest.mark.parametrize("needle", ["rank-00001.safetensors", "rank-00001.index", "manifest.json"])
def test_a_failed_save_leaves_no_manifest_and_no_files(tmp_path: Path, needle: str) -> None:
    store = Breaking(str(tmp_path / "store"))
    claim(store)
    tensors = some_tensors()
    ranks = Ranks(store, 2)
    ranks.save(1, tensors, ddp(2))
    store.needle = needle
    with pytest.raises((CheckpointError, StorageError), match="disk full"):
        ranks.save(2, tensors, ddp(2))
    with pytest.raises((CheckpointError, StorageError), match="disk full"):
        ranks.all[0].wait()  # asked again it says the same
    if needle != "manifest.json":
        assert list(store.list(names.step_dir(2, 1))) == []
    store.needle = "no such key"
    with pytest.raises((CheckpointError, StorageError), match="disk full"):
        ranks.all[0].save(2, [], {}, {})  # the same step can't seem to be saved
    ranks.save(3, tensors, ddp(2))
    assert [info.step for info in live_checkpoints(store)] == [1, 3]
    load_as(store, 3, 1, tensors, fsdp(3), 3)


def test_a_failure_nobody_waited_for_is_raised_by_the_next_save(tmp_path: Path) -> None:
    store = Breaking(str(tmp_path / "store"))
    claim(store)
    store.needle = "rank-00000"
    (checkpointer,) = Ranks(store, 1).all
    specs = specs_of({"a": torch.ones(3)}, ddp(1))
    checkpointer.save(1, specs, {"a": [(whole((3,)), torch.ones(3))]}, {})
    with pytest.raises(StorageError, match="disk full"):
        checkpointer.save(2, specs, {"a": [(whole((3,)), torch.ones(3))]}, {})


def test_a_rank_that_never_reports_fails_the_save(store: FileStorage) -> None:
    claim(store)
    tensors = {"a": torch.ones(10)}
    specs = specs_of(tensors, ddp(2))
    alone = Checkpointer(
        store,
        attempt=1,
        rank=0,
        world_size=2,
        strategy={},
        board=LocalBoard(),
        on_commit=lambda done: None,
        keep=None,
        timeout_s=0.1,
    )
    alone.save(1, specs, local_of(specs, tensors, 0), {})
    with pytest.raises(CheckpointError, match="rank 1 did not report"):
        alone.wait()
    assert live_checkpoints(store) == []


def test_an_old_attempt_sees_the_fence(store: FileStorage) -> None:
    claim(store)
    old = Ranks(store, 2)
    old.save(10, some_tensors(1), ddp(2))
    claim(store)
    with pytest.raises(FencedError):
        old.save(20, some_tensors(2), ddp(2))
    assert [(info.step, info.attempt) for info in live_checkpoints(store)] == [(10, 1)]
    with pytest.raises(FencedError):  # and never seems to succeed again
        old.all[0].save(30, [], {}, {})


class Late(FileStorage):
    """A new attempt begins between an old one's look at the fence and its commit."""

    attempt_began = False

    def put_if_absent(self, key: str, data: bytes) -> None:
        if key.endswith(names.MANIFEST) and "step-00000020-a0001" in key and not self.attempt_began:
            self.attempt_began = True
            claim(self)
        super().put_if_absent(key, data)


def test_an_old_attempt_that_races_past_the_fence_is_never_loaded(tmp_path: Path) -> None:
    store = Late(str(tmp_path / "store"))
    claim(store)
    old = Ranks(store, 2, keep=1)
    old.save(10, some_tensors(1), ddp(2))
    old.save(20, some_tensors(2), ddp(2))
    # It committed, but it deleted nothing that the new attempt went on from.
    assert [(info.step, info.live) for info in live_checkpoints(store)] == [(10, True), (20, False)]
    new = Ranks(store, 3, attempt=2, keep=1)
    load_as(store, 10, 1, some_tensors(1), fsdp(3), 3)
    new.save(20, some_tensors(3), fsdp(3))
    assert [(info.step, info.attempt, info.live) for info in live_checkpoints(store)] == [(20, 2, True)]
    load_as(store, 20, 2, some_tensors(3), ddp(1), 1)


def test_everything_that_does_not_fit_is_said_at_once(store: FileStorage) -> None:
    claim(store)
    Ranks(store, 1).save(1, {"a": torch.ones(4), "b": torch.ones(2, 2), "c": torch.ones(3)}, ddp(1))
    target = torch.zeros(5)
    requests = [
        ("gone", whole((4,)), torch.zeros(4)),
        ("a", whole((5,)), target),
        ("b", whole((4,)), torch.zeros(4)),
        ("c", whole((3,)), torch.zeros(3, dtype=torch.bfloat16)),
        ("c", whole((2,)), torch.zeros(3)),
    ]
    with pytest.raises(CheckpointError) as caught:
        load_tensors(store, read_manifest(store, 1, 1), requests)
    words = str(caught.value)
    assert "gone: not in the checkpoint" in words
    assert "a: asked for [5] at [0], but it has the shape [4]" in words
    assert "b: asked for [4]" in words
    assert "c: stored as F32 (torch.float32), but the destination is torch.bfloat16" in words
    assert "c: a box of [2] does not fit a destination of [3]" in words
    assert torch.equal(target, torch.zeros(5))


def test_damage_names_step_file_and_tensor(store: FileStorage) -> None:
    claim(store)
    tensors = some_tensors()
    Ranks(store, 2).save(7, tensors, fsdp(2))
    index = json.loads(store.get(f"{names.step_dir(7, 1)}/rank-00001.index.json"))
    (entry,) = [entry for entry in index["entries"] if entry["name"] == "model.embed"]
    path = store.root / names.step_dir(7, 1) / "rank-00001.safetensors"
    with path.open("r+b") as file:
        file.seek(entry["end"] - 1)
        last = file.read(1)
        file.seek(entry["end"] - 1)
        file.write(bytes([last[0] ^ 1]))
    manifest = read_manifest(store, 7, 1)
    with pytest.raises(CorruptCheckpoint) as caught:
        load_tensors(store, manifest, [("model.embed", whole((1001, 130)), torch.zeros(1001, 130))])
    error = caught.value
    assert (error.step, error.attempt, error.file, error.tensor) == (7, 1, "rank-00001.safetensors", "model.embed")
    rows = Box((0, 0), (501, 130))  # the other rank's half is whole
    target = torch.zeros(501, 130)
    load_tensors(store, manifest, [("model.embed", rows, target)])
    assert torch.equal(target, tensors["model.embed"][:501])


@pytest.mark.parametrize("what", ["cut", "gone", "index cut", "index gone"])
def test_files_that_are_cut_or_gone_are_damage(store: FileStorage, what: str) -> None:
    claim(store)
    Ranks(store, 1).save(7, {"a": torch.ones(100)}, ddp(1))
    path = store.root / names.step_dir(7, 1) / ("rank-00000" + (".index.json" if "index" in what else ".safetensors"))
    if "cut" in what:
        path.write_bytes(path.read_bytes()[:-4])
    else:
        path.unlink()
    with pytest.raises(CorruptCheckpoint) as caught:
        load_tensors(store, read_manifest(store, 7, 1), [("a", whole((100,)), torch.zeros(100))])
    assert caught.value.file == path.name


class Counting(FileStorage):
    def __init__(self, url: str) -> None:
        super().__init__(url)
        self.bytes_read = 0
        self.gets: list[str] = []

    def get(self, key: str) -> bytes:
        self.gets.append(key)
        return super().get(key)

    def read_into(self, key: str, offset: int, target: memoryview) -> None:
        self.bytes_read += target.nbytes
        super().read_into(key, offset, target)


def test_only_blocks_that_are_needed_are_read(tmp_path: Path) -> None:
    store = Counting(str(tmp_path / "store"))
    claim(store)
    tensor = torch.randn(4096, 2048)  # 32 MiB, 128 blocks
    Ranks(store, 2).save(1, {"a": tensor}, fsdp(2))
    manifest = read_manifest(store, 1, 1)
    for box, blocks in [
        (Box((0, 0), (4096, 2048)), 128),
        (Box((100, 0), (1, 1)), 1),
        (Box((31, 0), (2, 2048)), 2),  # a block is 32 rows
        (Box((2040, 0), (16, 2048)), 2),  # the end of one file, the beginning of the other
        (Box((0, 5), (4096, 1)), 128),
    ]:
        store.bytes_read = 0
        store.gets.clear()
        target = torch.zeros(box.shape)
        load_tensors(store, manifest, [("a", box, target)])
        assert torch.equal(target, tensor[box.relative_to(whole((4096, 2048)))])
        assert store.bytes_read == blocks * BLOCK_BYTES
        assert len(store.gets) == len(set(store.gets))  # each index once


def test_rows_wider_than_a_block_are_skipped_over(tmp_path: Path) -> None:
    store = Counting(str(tmp_path / "store"))
    claim(store)
    tensor = torch.randn(12, 300_000)  # a row of 1.2 MB: 4.6 blocks
    Ranks(store, 1).save(1, {"a": tensor}, ddp(1))
    target = torch.zeros(12, 10)
    load_tensors(store, read_manifest(store, 1, 1), [("a", Box((0, 0), (12, 10)), target)])
    assert torch.equal(target, tensor[:, :10])
    assert store.bytes_read == 12 * BLOCK_BYTES


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 4)
        self.norm = nn.BatchNorm1d(4)
        self.head = nn.Linear(4, 10, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("scratch", torch.zeros(3), persistent=False)


def test_a_plain_model_is_filled(store: FileStorage) -> None:
    claim(store)
    torch.manual_seed(1)
    trained, fresh = Tied(), Tied()
    tensors = {f"model.{name}": p.detach() for name, p in trained.named_parameters()}
    tensors |= {f"model.{name}": b for name, b in trained.named_buffers() if name != "scratch"}
    assert "model.head.weight" not in tensors
    ranks = Ranks(store, 2)
    ranks.save(3, {**tensors, "optim.x.step": torch.ones(())}, fsdp(2))
    ranks.save(4, {name: tensor * 2 for name, tensor in tensors.items()}, fsdp(2))
    assert load_model(store.url, fresh).step == 4
    assert torch.equal(fresh.head.weight, trained.embed.weight * 2)
    assert load_model(store.url, fresh, step=3).step == 3
    for name, value in trained.state_dict().items():
        assert torch.equal(fresh.state_dict()[name], value)
    with pytest.raises(CheckpointError, match="Live steps there: 3, 4"):
        load_model(store.url, fresh, step=9)


def test_a_model_of_other_shapes_is_refused(store: FileStorage) -> None:
    claim(store)
    Ranks(store, 1).save(3, {"model.weight": torch.ones(4, 4), "model.bias": torch.ones(4)}, ddp(1))
    with pytest.raises(CheckpointError, match=r"model.weight: shape \[4, 4\] there, \[3, 4\] in the model"):
        load_model(store.url, nn.Linear(4, 3))


def test_saving_and_loading_never_unpickles(store: FileStorage, monkeypatch: pytest.MonkeyPatch) -> None:
    import pickle

    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("pickle")

    for name in ("load", "loads", "dump", "dumps", "Pickler", "Unpickler"):
        monkeypatch.setattr(pickle, name, refuse)
    claim(store)
    Ranks(store, 2).save(1, some_tensors(), fsdp(2))
    load_as(store, 1, 1, some_tensors(), ddp(1), 1)
    assert newest_live(live_checkpoints(store)) is not None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_tensors_on_a_gpu(store: FileStorage) -> None:
    claim(store)
    tensors = {name: tensor.cuda() for name, tensor in some_tensors().items()}
    Ranks(store, 2).save(1, tensors, ddp(2))
    load_as(store, 1, 1, tensors, fsdp(3), 3)
    load_as(store, 1, 1, some_tensors(), fsdp(2), 2)
