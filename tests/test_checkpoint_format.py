"""The files of a checkpoint: what is written is read back, and bad bytes raise CheckpointError and nothing else."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from dtrain.cluster.errors import CheckpointError, CorruptCheckpoint
from dtrain.runtime.checkpoint import names
from dtrain.runtime.checkpoint.grid import covers, part_box, parts_within
from dtrain.runtime.checkpoint.index import (
    BLOCK_BYTES,
    Entry,
    FileIndex,
    block_sums,
    decode_index,
    encode_index,
    header_of,
)
from dtrain.runtime.checkpoint.manifest import (
    BoxesRule,
    FileInfo,
    GridRule,
    Manifest,
    TensorInfo,
    decode_manifest,
    encode_manifest,
)
from dtrain.runtime.checkpoint.ranges import byte_span, needed_blocks, pieces
from dtrain.strategies.boxes import Box, grid_boxes

TORCH_FREE = [
    "names",
    "dtypes",
    "fields",
    "grid",
    "manifest",
    "index",
    "attempts",
    "read",
    "plan",
    "verify",
    "retention",
]
DIRECTORY = names.step_dir(100, 3)

MANIFEST = Manifest(
    step=100,
    attempt=3,
    created_at=1.5,
    world_size=2,
    strategy={"name": "ddp"},
    state={"step": 100, "nested": {"lr": [0.1]}},
    files=(
        FileInfo(writer=0, name="rank-00000.safetensors", size_bytes=9, index="i.json", index_xxh3="0" * 32),
        FileInfo(writer=1, name="b.st", size_bytes=0, index="j.json", index_xxh3="f" * 32, dir=names.step_dir(50, 1)),
    ),
    tensors={
        "model.w": TensorInfo(dtype="F32", shape=(5, 2), layout=GridRule(parts=(2, 1), writers=((0, 2),))),
        "model.b": TensorInfo(
            dtype="BF16", shape=(3,), layout=BoxesRule(boxes=((0, Box((0,), (2,))), (1, Box((2,), (1,)))))
        ),
        "model.s": TensorInfo(dtype="I64", shape=(), layout=GridRule(parts=(), writers=((1, 1),))),
    },
)


def test_the_readers_do_not_import_torch() -> None:
    modules = ", ".join(f"dtrain.runtime.checkpoint.{name}" for name in TORCH_FREE)
    check = f"import sys, {modules}, dtrain.launcher.commands.ckpt; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", check], check=True, timeout=60)


def test_a_manifest_comes_back() -> None:
    assert decode_manifest(encode_manifest(MANIFEST), DIRECTORY) == MANIFEST


def test_a_manifest_is_plain_json() -> None:
    data = json.loads(encode_manifest(MANIFEST))
    assert data["tensors"]["model.w"] == {
        "dtype": "F32",
        "shape": [5, 2],
        "layout": {"grid": [2, 1], "writers": [[0, 2]]},
    }
    assert data["tensors"]["model.b"]["layout"] == {"boxes": [[0, [0], [2]], [1, [2], [1]]]}


def test_every_flipped_byte_of_a_manifest_is_found() -> None:
    raw = encode_manifest(MANIFEST)
    for position in range(len(raw)):
        damaged = bytearray(raw)
        damaged[position] ^= 1 << position % 8
        with pytest.raises(CorruptCheckpoint) as caught:
            decode_manifest(bytes(damaged), DIRECTORY)
        assert (caught.value.step, caught.value.attempt, caught.value.file) == (100, 3, "manifest.json")


@pytest.mark.parametrize("state", [{"x": float("nan")}, {"x": object()}])
def test_a_state_that_is_no_json_is_refused(state: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError, match="what JSON can't"):
        encode_manifest(replace(MANIFEST, state=state))


def _sealed(data: Any) -> bytes:
    """A manifest whose digest is right, whatever it says."""
    body = (json.dumps(data)[1:] if isinstance(data, dict) else str(data)).encode()
    return b'{"digest":"' + xxhash.xxh3_128_hexdigest(body).encode() + b'",\n' + body


def _plain() -> Any:
    data = json.loads(encode_manifest(MANIFEST))
    del data["digest"]
    return data


def _paths(node: Any) -> list[list[Any]]:
    children = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else []
    return [path for key, child in children for path in [[key], *([key, *rest] for rest in _paths(child))]]


HOSTILE: list[Any] = [
    None,
    True,
    -1,
    10**30,
    2.5,
    "",
    "../../etc/passwd",
    "a\0b",
    "..",
    [],
    [[]],
    {},
    [-1],
    [2**62] * 70,
    [[0, -1]],
]


def test_a_hostile_manifest_raises_checkpoint_errors_only() -> None:
    """Every field of it replaced by everything unfit, and left out."""
    tried = refused = 0
    for path in _paths(_plain()):
        for value in [*HOSTILE, ...]:
            data = _plain()
            node = data
            for key in path[:-1]:
                node = node[key]
            if value is ... and isinstance(node, dict):
                del node[path[-1]]
            else:
                node[path[-1]] = value if value is not ... else HOSTILE[3]
            tried += 1
            try:
                manifest = decode_manifest(_sealed(data), DIRECTORY)
            except CheckpointError:
                refused += 1
                continue
            for file in manifest.files:
                assert ".." not in manifest.key(file, file.name)
                assert manifest.key(file, file.index).count("/") == 1
    assert refused > tried / 2


@pytest.mark.parametrize("content", ['"a":' + "[" * 100_000, '"a":NaN}', '"a":1e999}', "}", "", '"a":1,"a":2}', "\xff"])
def test_hostile_json_raises_checkpoint_errors_only(content: str) -> None:
    with pytest.raises(CheckpointError):
        decode_manifest(_sealed(content), DIRECTORY)


@given(st.binary(max_size=200))
def test_any_bytes_raise_checkpoint_errors_only(raw: bytes) -> None:
    for decode in (lambda: decode_manifest(raw, DIRECTORY), lambda: decode_index(raw, "index")):
        with pytest.raises(CheckpointError):
            decode()


@pytest.mark.parametrize("cut", [0, 1, 40, -1])
def test_a_truncated_manifest_is_corrupt(cut: int) -> None:
    with pytest.raises(CorruptCheckpoint):
        decode_manifest(encode_manifest(MANIFEST)[:cut], DIRECTORY)


def test_a_manifest_in_another_directory_is_refused() -> None:
    with pytest.raises(CheckpointError, match="but lies in"):
        decode_manifest(encode_manifest(MANIFEST), names.step_dir(101, 3))


@pytest.mark.parametrize(
    "name",
    ["step-1-a1", "step-00000100-a0003/", "step-00000100-a003", "step-000000100-a0003", "x", "", "step--1-a0001"],
)
def test_other_directory_names_are_none_of_ours(name: str) -> None:
    assert names.parse_step_dir(name) is None


def test_names_come_back() -> None:
    for step, attempt in [(0, 1), (100, 3), (10**9, 12345)]:
        assert names.parse_step_dir(names.step_dir(step, attempt)) == (step, attempt)
        assert names.parse_attempt_key(names.attempt_key(attempt)) == attempt
    assert names.parse_attempt_key("attempts/x.json") is None


def _index() -> tuple[FileIndex, bytes]:
    """An index and the file that it describes."""
    data = random.Random(0).randbytes(2 * BLOCK_BYTES + 24)
    entries = [
        Entry(name="model.w", dtype="F32", box=Box((4, 0), (2, 65536)), begin=0, end=2 * BLOCK_BYTES, whole=False),
        Entry(name="model.b", dtype="I64", box=Box((), ()), begin=2 * BLOCK_BYTES, end=2 * BLOCK_BYTES + 8, whole=True),
        Entry(name="x", dtype="U8", box=Box((0,), (16,)), begin=2 * BLOCK_BYTES + 8, end=len(data), whole=True),
    ]
    header = header_of(entries)
    placed = tuple(
        replace(
            entry,
            begin=entry.begin + len(header),
            end=entry.end + len(header),
            blocks=block_sums(memoryview(data)[entry.begin : entry.end]),
        )
        for entry in entries
    )
    size = len(header) + len(data)
    return FileIndex(file="a.safetensors", header_bytes=len(header), size_bytes=size, entries=placed), header + data


def test_an_index_comes_back() -> None:
    index, _ = _index()
    assert decode_index(encode_index(index), "index") == index
    assert [len(entry.blocks) for entry in index.entries] == [2, 1, 1]


def test_the_data_file_is_plain_safetensors(tmp_path: Path) -> None:
    _, raw = _index()
    (tmp_path / "a.safetensors").write_bytes(raw)
    with safetensors.safe_open(tmp_path / "a.safetensors", "np") as file:
        assert set(file.keys()) == {"model.w@4,0", "model.b", "x"}
        assert file.get_tensor("x").tobytes() == raw[-16:]
        assert file.get_tensor("model.w@4,0").shape == (2, 65536)
    assert int.from_bytes(raw[:8], "little") % 8 == 0


def test_two_tensors_of_one_name_in_a_file_are_refused() -> None:
    entry = Entry(name="a", dtype="U8", box=Box((1,), (1,)), begin=0, end=1, whole=False)
    other = Entry(name="a@1", dtype="U8", box=Box((0,), (1,)), begin=1, end=2, whole=True)
    with pytest.raises(CheckpointError, match="two tensors"):
        header_of([entry, other])


def test_a_hostile_index_raises_checkpoint_errors_only() -> None:
    index, _ = _index()
    plain = json.loads(encode_index(index))
    for path in _paths(plain):
        for value in HOSTILE:
            data = json.loads(encode_index(index))
            node = data
            for key in path[:-1]:
                node = node[key]
            node[path[-1]] = value
            try:
                decoded = decode_index(json.dumps(data).encode(), "index")
            except CheckpointError:
                continue
            assert decoded.size_bytes == index.size_bytes


SHAPES = st.lists(st.integers(0, 7), max_size=3).flatmap(
    lambda shape: st.tuples(st.just(tuple(shape)), st.tuples(*[st.integers(1, 5)] * len(shape)))
)


@given(SHAPES)
def test_grid_arithmetic_is_the_list_of_boxes(case: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
    shape, parts = case
    boxes = grid_boxes(shape, parts)
    assert [part_box(shape, parts, index) for index in range(len(boxes))] == boxes
    assert covers(shape, boxes)
    for box in boxes:
        expected = [i for i, other in enumerate(boxes) if box.num_elements and (box.intersect(other) is not None)]
        assert list(parts_within(shape, parts, box)) == expected


def test_boxes_that_do_not_cover_are_seen() -> None:
    left, right = Box((0, 0), (4, 1)), Box((0, 1), (4, 1))
    assert covers((4, 2), [left, right])
    assert not covers((4, 2), [left])
    assert not covers((4, 2), [left, left])
    assert not covers((4, 2), [left, Box((1, 1), (4, 1))])
    assert not covers((), [Box((), ()), Box((), ())])


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_pieces_and_blocks_hold_a_part_exactly(data: st.DataObject) -> None:
    """Against a list of every element's byte position."""
    dims = data.draw(st.integers(1, 3))
    shape = tuple(data.draw(st.integers(1, 60_000 if d == dims - 1 else 12)) for d in range(dims))
    offsets = tuple(data.draw(st.integers(0, size - 1)) for size in shape)
    sizes = tuple(data.draw(st.integers(1, size - begin)) for size, begin in zip(shape, offsets, strict=True))
    stored, part, item, limit = Box((0,) * dims, shape), Box(offsets, sizes), 4, BLOCK_BYTES
    cut = list(pieces(part, stored, item, limit))
    assert sum(piece.num_elements for piece in cut) == part.num_elements
    assert all(piece.intersect(part) == piece for piece in cut)
    for piece in cut:
        begin, end = byte_span(piece, stored, item)
        assert end - begin <= limit
        rows = _row_starts(piece, shape)
        touched = {
            block
            for row in rows
            for block in range(row * item // BLOCK_BYTES, ((row + piece.shape[-1]) * item - 1) // BLOCK_BYTES + 1)
        }
        runs = needed_blocks(piece, stored, item)
        assert {block for first, last in runs for block in range(first, last)} == touched
        assert (begin, end) == (rows[0] * item, (rows[-1] + piece.shape[-1]) * item)


def _row_starts(part: Box, shape: tuple[int, ...]) -> list[int]:
    """Where each of the part's innermost rows begins, in elements."""
    starts = [0]
    for dim in range(len(shape)):
        count = part.shape[dim] if dim < len(shape) - 1 else 1
        starts = [start * shape[dim] + part.offsets[dim] + i for start in starts for i in range(count)]
    return starts
