"""The manifest: the file whose existence makes a checkpoint exist. It says which tensors there are, which writer holds
which part of them, and carries the small state. Parsing is strict, so bad bytes raise CheckpointError and nothing else.

    {"digest":"<xxh3-128 of all that follows the newline>",
    "format":1, "step":100, "attempt":3, "created_at":..., "world_size":2, "strategy":{...}, "state":{...},
    "files":[...], "tensors":{name: {"dtype":"F32","shape":[8,4],"layout":{"grid":[2,1],"writers":[[0,2]]}}}}
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import xxhash

from dtrain.cluster.errors import CheckpointError, CorruptCheckpoint
from dtrain.runtime.checkpoint import fields, names
from dtrain.runtime.checkpoint.dtypes import ITEM_BYTES
from dtrain.runtime.checkpoint.grid import part_box, parts_within
from dtrain.strategies.boxes import Box

MAX_PARTS = 2**20
_DIGEST_LINE = re.compile(rb'\{"digest":"([0-9a-f]{32})",\n')


@dataclass(frozen=True, slots=True, kw_only=True)
class GridRule:
    """Each part of the grid is one box in one writer's file. `writers`: runs (first writer, count) that give the writer
    of every part, in row-major order of parts."""

    parts: tuple[int, ...]
    writers: tuple[tuple[int, int], ...]

    def writer_of(self, index: int) -> int:
        for first, count in self.writers:
            if index < count:
                return first + index
            index -= count
        raise IndexError(index)


@dataclass(frozen=True, slots=True, kw_only=True)
class BoxesRule:
    """(writer, box) one by one, where no grid describes them."""

    boxes: tuple[tuple[int, Box], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorInfo:
    dtype: str
    shape: tuple[int, ...]
    layout: GridRule | BoxesRule

    def stored_boxes(self, within: Box) -> Iterator[tuple[int, Box]]:
        """(writer, stored box) of everything stored that shares an element with `within`."""
        if isinstance(self.layout, GridRule):
            for index in parts_within(self.shape, self.layout.parts, within):
                yield self.layout.writer_of(index), part_box(self.shape, self.layout.parts, index)
        else:
            for writer, box in self.layout.boxes:
                common = box.intersect(within)
                if common is not None and common.num_elements:
                    yield writer, box


@dataclass(frozen=True, slots=True, kw_only=True)
class FileInfo:
    """One writer's file, and the index file that says what lies where in it."""

    writer: int
    name: str
    size_bytes: int
    index: str
    index_xxh3: str  # xxh3-128 of the index file
    dir: str | None = None  # another step's directory that holds both; None: this checkpoint's own


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    step: int
    attempt: int
    created_at: float  # seconds since the epoch
    world_size: int
    strategy: dict[str, Any]
    tensors: Mapping[str, TensorInfo]
    files: tuple[FileInfo, ...]
    state: dict[str, Any]

    @property
    def dir(self) -> str:
        return names.step_dir(self.step, self.attempt)

    @property
    def size_bytes(self) -> int:
        return sum(file.size_bytes for file in self.files)

    def key(self, file: FileInfo, name: str) -> str:
        """The storage key of `name`, one of the two names in `file`."""
        return f"{file.dir or self.dir}/{name}"


def encode_manifest(manifest: Manifest) -> bytes:
    """Raises CheckpointError where the state or the strategy is not plain JSON."""
    content = {
        "format": names.FORMAT_VERSION,
        "step": manifest.step,
        "attempt": manifest.attempt,
        "created_at": manifest.created_at,
        "world_size": manifest.world_size,
        "strategy": manifest.strategy,
        "state": manifest.state,
        "files": [_file_to_json(file) for file in manifest.files],
        "tensors": {
            name: {"dtype": info.dtype, "shape": info.shape, "layout": _layout_to_json(info.layout)}
            for name, info in manifest.tensors.items()
        },
    }
    try:
        body = json.dumps(content, separators=(",", ":"), allow_nan=False)[1:].encode()
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"step {manifest.step}: state or strategy holds what JSON can't: {error}") from error
    return b'{"digest":"' + xxhash.xxh3_128_hexdigest(body).encode() + b'",\n' + body


def decode_manifest(raw: bytes, directory: str) -> Manifest:
    """`directory` is where the manifest lies. Raises CorruptCheckpoint where bytes are damaged, CheckpointError where
    they are whole but say something impossible."""
    place = names.parse_step_dir(directory)
    if place is None:
        raise CheckpointError(f"{directory!r} is not the name of a checkpoint's directory")
    what = names.manifest_key(directory)
    line = _DIGEST_LINE.match(raw)
    if line is None or xxhash.xxh3_128_hexdigest(raw[line.end() :]).encode() != line[1]:
        raise CorruptCheckpoint(
            f"{what} is damaged: its content does not match its digest",
            step=place[0],
            attempt=place[1],
            file=names.MANIFEST,
            tensor="",
        )
    data = fields.parse_object(raw, what)
    version = fields.get(data, "format", what)
    if version != names.FORMAT_VERSION:
        raise CheckpointError(
            f"{what}: format {version!r}, but this dtrain reads format {names.FORMAT_VERSION}. "
            "Use the dtrain that wrote it."
        )
    manifest = _from_json(data, what)
    if (manifest.step, manifest.attempt) != place:
        raise CheckpointError(
            f"{what}: says step {manifest.step} of attempt {manifest.attempt}, but lies in {directory}"
        )
    return manifest


def _from_json(data: dict[str, Any], what: str) -> Manifest:
    files = tuple(_file_from_json(item, what) for item in fields.items(fields.get(data, "files", what), what))
    if len({file.writer for file in files}) != len(files):
        raise CheckpointError(f"{what}: a writer has two files")
    tensors = fields.mapping(fields.get(data, "tensors", what), what)
    return Manifest(
        step=fields.integer(fields.get(data, "step", what), f"{what}: step"),
        attempt=fields.integer(fields.get(data, "attempt", what), f"{what}: attempt", 1),
        created_at=fields.number(fields.get(data, "created_at", what), f"{what}: created_at"),
        world_size=fields.integer(fields.get(data, "world_size", what), f"{what}: world_size", 1),
        strategy=fields.mapping(fields.get(data, "strategy", what), f"{what}: strategy"),
        state=fields.mapping(fields.get(data, "state", what), f"{what}: state"),
        files=files,
        tensors={name: _tensor_from_json(entry, f"{what}: {name}") for name, entry in tensors.items()},
    )


def _file_to_json(file: FileInfo) -> dict[str, Any]:
    entry = {
        "writer": file.writer,
        "name": file.name,
        "bytes": file.size_bytes,
        "index": file.index,
        "index_xxh3": file.index_xxh3,
    }
    return entry if file.dir is None else {**entry, "dir": file.dir}


def _file_from_json(value: Any, what: str) -> FileInfo:
    data = fields.mapping(value, f"{what}: files")
    name = fields.text(fields.get(data, "name", what), f"{what}: file name")
    index = fields.text(fields.get(data, "index", what), f"{what}: index name")
    directory = data.get("dir")
    for part in (name, index):
        if not names.is_file_name(part):
            raise CheckpointError(f"{what}: {part!r} can't be the name of a checkpoint's file")
    if directory is not None and names.parse_step_dir(fields.text(directory, f"{what}: dir")) is None:
        raise CheckpointError(f"{what}: {directory!r} is not the name of a checkpoint's directory")
    return FileInfo(
        writer=fields.integer(fields.get(data, "writer", what), f"{what}: writer"),
        name=name,
        size_bytes=fields.integer(fields.get(data, "bytes", what), f"{what}: bytes of {name}"),
        index=index,
        index_xxh3=fields.hex_digits(fields.get(data, "index_xxh3", what), f"{what}: index_xxh3", length=32),
        dir=directory,
    )


def _layout_to_json(layout: GridRule | BoxesRule) -> dict[str, Any]:
    if isinstance(layout, GridRule):
        return {"grid": layout.parts, "writers": layout.writers}
    return {"boxes": [[writer, box.offsets, box.shape] for writer, box in layout.boxes]}


def _tensor_from_json(value: Any, what: str) -> TensorInfo:
    data = fields.mapping(value, what)
    dtype = fields.text(fields.get(data, "dtype", what), what)
    if dtype not in ITEM_BYTES:
        raise CheckpointError(f"{what}: unknown element type {dtype!r}")
    shape = fields.integers(fields.get(data, "shape", what), f"{what}: shape")
    layout = fields.mapping(fields.get(data, "layout", what), f"{what}: layout")
    rule = _grid_from_json(layout, len(shape), what) if "grid" in layout else _boxes_from_json(layout, shape, what)
    return TensorInfo(dtype=dtype, shape=shape, layout=rule)


def _grid_from_json(data: dict[str, Any], num_dims: int, what: str) -> GridRule:
    parts = fields.integers(data["grid"], f"{what}: grid", least=1, length=num_dims)
    runs = []
    for run in fields.items(fields.get(data, "writers", what), f"{what}: writers"):
        first, count = fields.integers(run, f"{what}: writers", length=2)
        runs.append((first, count))
    if math.prod(parts) > MAX_PARTS:
        raise CheckpointError(f"{what}: a grid of {math.prod(parts)} parts, more than {MAX_PARTS}")
    if sum(count for _, count in runs) != math.prod(parts):
        raise CheckpointError(f"{what}: a grid of {math.prod(parts)} parts, but writers for {sum(c for _, c in runs)}")
    return GridRule(parts=parts, writers=tuple(runs))


def _boxes_from_json(data: dict[str, Any], shape: tuple[int, ...], what: str) -> BoxesRule:
    boxes = []
    for entry in fields.items(fields.get(data, "boxes", what), f"{what}: boxes"):
        writer, offsets, sizes = fields.items(entry, f"{what}: boxes", 3)
        box = Box(
            fields.integers(offsets, f"{what}: offsets", length=len(shape)),
            fields.integers(sizes, f"{what}: shape", length=len(shape)),
        )
        if any(begin + length > size for begin, length, size in zip(box.offsets, box.shape, shape, strict=True)):
            raise CheckpointError(f"{what}: a box at {list(box.offsets)} of {list(box.shape)} leaves {list(shape)}")
        boxes.append((fields.integer(writer, f"{what}: writer"), box))
    return BoxesRule(boxes=tuple(boxes))
