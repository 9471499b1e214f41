"""One writer's files: the safetensors header, and the index that says where each box lies and what its blocks hash to.

The data file is plain safetensors, so any tool can read it; the index adds what safetensors lacks, checksums.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass

import xxhash

from dtrain.cluster.errors import CheckpointError
from dtrain.runtime.checkpoint import fields, names
from dtrain.runtime.checkpoint.dtypes import ITEM_BYTES
from dtrain.strategies.boxes import Box

BLOCK_BYTES = 256 * 1024
_DIGEST_CHARS = 16  # xxh3-64 in hex


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One box in the file: bytes [begin, end), row-major. `blocks` has a checksum a block, counted from `begin`."""

    name: str
    dtype: str
    box: Box
    begin: int
    end: int
    whole: bool  # the box is the whole tensor
    blocks: tuple[int, ...] = ()

    @property
    def header_name(self) -> str:
        return self.name if self.whole else f"{self.name}@{','.join(map(str, self.box.offsets))}"


@dataclass(frozen=True, slots=True, kw_only=True)
class FileIndex:
    file: str
    header_bytes: int
    size_bytes: int
    entries: tuple[Entry, ...]  # in file order, without gaps


def header_of(entries: Sequence[Entry], data_begin: int = 0) -> bytes:
    """The safetensors header, its length field included, padded so that data begins at a multiple of 8. The entries'
    offsets count from byte `data_begin` of the file."""
    content: dict[str, object] = {"__metadata__": {"format": "pt", "dtrain": str(names.FORMAT_VERSION)}}
    for entry in entries:
        if entry.header_name in content:
            raise CheckpointError(f"two tensors would be called {entry.header_name!r} in one file. Rename one of them.")
        content[entry.header_name] = {
            "dtype": entry.dtype,
            "shape": entry.box.shape,
            "data_offsets": (entry.begin - data_begin, entry.end - data_begin),
        }
    text = json.dumps(content, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def block_sums(data: memoryview) -> tuple[int, ...]:
    return tuple(
        xxhash.xxh3_64_intdigest(data[begin : begin + BLOCK_BYTES]) for begin in range(0, data.nbytes, BLOCK_BYTES)
    )


def encode_index(index: FileIndex) -> bytes:
    content = {
        "format": names.FORMAT_VERSION,
        "file": index.file,
        "header_bytes": index.header_bytes,
        "bytes": index.size_bytes,
        "block_bytes": BLOCK_BYTES,
        "entries": [
            {
                "name": entry.name,
                "dtype": entry.dtype,
                "offsets": entry.box.offsets,
                "shape": entry.box.shape,
                "begin": entry.begin,
                "end": entry.end,
                "whole": entry.whole,
                "xxh3": "".join(f"{block:016x}" for block in entry.blocks),
            }
            for entry in index.entries
        ],
    }
    return json.dumps(content, separators=(",", ":")).encode()


def decode_index(raw: bytes, what: str) -> FileIndex:
    """`what` names the file in messages. Raises CheckpointError."""
    data = fields.parse_object(raw, what)
    for key, known in (("format", names.FORMAT_VERSION), ("block_bytes", BLOCK_BYTES)):
        if (found := fields.get(data, key, what)) != known:
            raise CheckpointError(f"{what}: {key} {found!r}, but this dtrain reads {known}")
    position = header_bytes = fields.integer(fields.get(data, "header_bytes", what), what)
    entries = []
    for item in fields.items(fields.get(data, "entries", what), what):
        entry = _entry_from_json(fields.mapping(item, what), what)
        if entry.begin != position:
            raise CheckpointError(f"{what}: {entry.header_name} begins at {entry.begin}, expected {position}")
        position = entry.end
        entries.append(entry)
    size_bytes = fields.integer(fields.get(data, "bytes", what), what)
    if size_bytes != position:
        raise CheckpointError(f"{what}: the file has {size_bytes} bytes, but its entries end at {position}")
    file = fields.text(fields.get(data, "file", what), what)
    return FileIndex(file=file, header_bytes=header_bytes, size_bytes=size_bytes, entries=tuple(entries))


def _entry_from_json(data: dict[str, object], what: str) -> Entry:
    name = fields.text(fields.get(data, "name", what), what)
    what = f"{what}: {name}"
    dtype = fields.text(fields.get(data, "dtype", what), what)
    if dtype not in ITEM_BYTES:
        raise CheckpointError(f"{what}: unknown element type {dtype!r}")
    shape = fields.integers(fields.get(data, "shape", what), what)
    box = Box(fields.integers(fields.get(data, "offsets", what), what, length=len(shape)), shape)
    begin = fields.integer(fields.get(data, "begin", what), what)
    size = math.prod(shape) * ITEM_BYTES[dtype]
    if fields.integer(fields.get(data, "end", what), what) != begin + size:
        raise CheckpointError(f"{what}: {size} bytes by its shape, but the range in the file says otherwise")
    digits = fields.hex_digits(
        fields.get(data, "xxh3", what), f"{what}: xxh3", length=_DIGEST_CHARS * -(-size // BLOCK_BYTES)
    )
    blocks = tuple(int(digits[at : at + _DIGEST_CHARS], 16) for at in range(0, len(digits), _DIGEST_CHARS))
    whole = fields.get(data, "whole", what) is True
    return Entry(name=name, dtype=dtype, box=box, begin=begin, end=begin + size, whole=whole, blocks=blocks)
