"""Verifying: reads every byte of a checkpoint in bounded memory and says what is damaged. Torch-free."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import xxhash

from dtrain.cluster.errors import CheckpointError
from dtrain.cluster.storage import Storage
from dtrain.runtime.checkpoint import names
from dtrain.runtime.checkpoint.attempts import CheckpointInfo
from dtrain.runtime.checkpoint.grid import covers
from dtrain.runtime.checkpoint.index import BLOCK_BYTES, Entry, FileIndex, header_of
from dtrain.runtime.checkpoint.manifest import BoxesRule, FileInfo, GridRule, Manifest, TensorInfo
from dtrain.runtime.checkpoint.read import read_data, read_index, read_manifest
from dtrain.strategies.boxes import Box, grid_boxes, whole

_READ_BLOCKS = 64  # 16 MiB at a time


@dataclass(frozen=True, slots=True, kw_only=True)
class Damage:
    """`tensor` is "" where the damage is not inside one. `what` goes on after the names: "is missing"."""

    file: str
    tensor: str
    what: str


def verify_checkpoint(storage: Storage, info: CheckpointInfo) -> list[Damage]:
    """Everything that is wrong with a committed checkpoint; empty where every byte is as it was written. Raises
    StorageError where the store can't be read."""
    try:
        manifest = read_manifest(storage, info.step, info.attempt)
    except CheckpointError as error:
        return [Damage(file=names.MANIFEST, tensor="", what=_words(error, info, names.MANIFEST))]
    damages: list[Damage] = []
    stored: dict[str, list[tuple[int, Entry]]] = {}
    readable = set()
    directories = {info.dir, *(file.dir or info.dir for file in manifest.files)}
    sizes = {found.key: found.size_bytes for name in directories for found in storage.list(f"{name}/")}
    for file in manifest.files:
        try:
            index = read_index(storage, manifest, file)
        except CheckpointError as error:
            damages.append(Damage(file=file.index, tensor="", what=_words(error, info, file.index)))
            continue
        readable.add(file.writer)
        for entry in index.entries:
            stored.setdefault(entry.name, []).append((file.writer, entry))
        damages += _check_file(storage, manifest, file, index, sizes.get(manifest.key(file, file.name)))
    damages += _check_tensors(manifest, stored, readable)
    return damages


def _check_file(
    storage: Storage, manifest: Manifest, file: FileInfo, index: FileIndex, found_bytes: int | None
) -> Iterator[Damage]:
    if found_bytes is None:
        yield Damage(file=file.name, tensor="", what="is missing")
        return
    if found_bytes != file.size_bytes:
        yield Damage(file=file.name, tensor="", what=f"has {found_bytes} bytes, not {file.size_bytes}")
    if found_bytes >= index.header_bytes and not _header_fits(storage, manifest, file, index):
        yield Damage(file=file.name, tensor="", what="has a header that does not match the index")
    for entry in index.entries:
        if entry.end > found_bytes:
            yield Damage(file=file.name, tensor=entry.name, what="is cut off")
        else:
            yield from _check_entry(storage, manifest, file, entry)


def _header_fits(storage: Storage, manifest: Manifest, file: FileInfo, index: FileIndex) -> bool:
    """The header is a pure function of the entries: compared byte for byte."""
    expected = header_of(index.entries, index.header_bytes)
    found = bytearray(len(expected))
    if len(expected) != index.header_bytes:
        return False
    read_data(storage, manifest, file, 0, memoryview(found), "")
    return found == expected


def _check_entry(storage: Storage, manifest: Manifest, file: FileInfo, entry: Entry) -> Iterator[Damage]:
    buffer = memoryview(bytearray(min(entry.end - entry.begin, _READ_BLOCKS * BLOCK_BYTES)))
    bad = []
    for first in range(0, len(entry.blocks), _READ_BLOCKS):
        begin = entry.begin + first * BLOCK_BYTES
        view = buffer[: min(entry.end - begin, buffer.nbytes)]
        read_data(storage, manifest, file, begin, view, entry.name)
        for number in range(first, min(first + _READ_BLOCKS, len(entry.blocks))):
            at = (number - first) * BLOCK_BYTES
            if xxhash.xxh3_64_intdigest(view[at : at + BLOCK_BYTES]) != entry.blocks[number]:
                bad.append(number)
    if bad:
        where = f"block {bad[0]}" if len(bad) == 1 else f"{len(bad)} blocks, the first is {bad[0]}"
        yield Damage(
            file=file.name, tensor=entry.name, what=f"does not match its checksum in {where} of {len(entry.blocks)}"
        )


def _check_tensors(
    manifest: Manifest, stored: dict[str, list[tuple[int, Entry]]], readable: set[int]
) -> Iterator[Damage]:
    """What the manifest promises of each tensor against what the files hold."""
    writers = {file.writer: file for file in manifest.files}
    for name, info in manifest.tensors.items():
        promised = _promised(info)
        if not isinstance(info.layout, GridRule) and not covers(info.shape, [box for _, box in promised]):
            yield Damage(file=names.MANIFEST, tensor=name, what="has boxes that do not cover it exactly once")
        found = {(writer, entry.box, entry.dtype) for writer, entry in stored.get(name, [])}
        for writer, box in promised:
            if writer not in writers:
                yield Damage(
                    file=names.MANIFEST, tensor=name, what=f"lies in a file of writer {writer}, which has none"
                )
            elif writer in readable and (writer, box, info.dtype) not in found:
                what = f"has no box of {list(box.shape)} at {list(box.offsets)}"
                yield Damage(file=writers[writer].index, tensor=name, what=what)


def _promised(info: TensorInfo) -> list[tuple[int, Box]]:
    """(writer, box) of everything that holds elements."""
    if isinstance(info.layout, BoxesRule):
        return [(writer, box) for writer, box in info.layout.boxes if box.num_elements]
    if not whole(info.shape).num_elements:
        return []
    boxes = grid_boxes(info.shape, info.layout.parts)
    return [(info.layout.writer_of(index), box) for index, box in enumerate(boxes) if box.num_elements]


def _words(error: CheckpointError, info: CheckpointInfo, file: str) -> str:
    """What is wrong, without the names that a Damage gives anyway."""
    words = str(error).removeprefix(f"step {info.step} of attempt {info.attempt} is damaged: ")
    return words.removeprefix(f"{info.dir}/{file}").removeprefix(":").strip()
