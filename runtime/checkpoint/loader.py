"""Loading: fills tensors with boxes of a checkpoint, whatever boxes it was saved in. Reads the blocks that hold the
wanted bytes and no others, and verifies every block before its bytes are used."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal

import torch
import xxhash
from torch import Tensor, nn

from dtrain.cluster.errors import CheckpointError
from dtrain.cluster.storage import Storage, open_storage
from dtrain.runtime.checkpoint.attempts import CheckpointInfo, live_checkpoints, newest_live
from dtrain.runtime.checkpoint.dtypes import item_bytes
from dtrain.runtime.checkpoint.index import BLOCK_BYTES, Entry
from dtrain.runtime.checkpoint.manifest import FileInfo, Manifest, TensorInfo
from dtrain.runtime.checkpoint.ranges import byte_span, needed_blocks, pieces, strides_of
from dtrain.runtime.checkpoint.read import corrupt, read_data, read_index, read_manifest
from dtrain.runtime.checkpoint.scores import find_best
from dtrain.runtime.checkpoint.torchtypes import TORCH_DTYPES
from dtrain.strategies.boxes import Box, whole

Request = tuple[str, Box, Tensor]
NUM_THREADS = 4


def load_tensors(storage: Storage, manifest: Manifest, requests: Iterable[Request]) -> None:
    """Fills each (name, box, destination) with that box of the named tensor. A destination has the box's shape and the
    tensor's dtype; it may lie on any device and need not be contiguous.

    Raises CheckpointError listing everything that is missing or does not fit, before anything is read;
    CorruptCheckpoint where stored bytes do not match their checksums. After an error destinations hold anything.
    """
    wanted = list(requests)
    files = {file.writer: file for file in manifest.files}
    problems = [problem for request in wanted for problem in _problems(manifest, files, request)]
    if problems:
        raise CheckpointError(
            f"step {manifest.step} of attempt {manifest.attempt} can't serve the request:\n  " + "\n  ".join(problems)
        )
    reader = _Reader(storage, manifest)
    run_all(reader.fill, (piece for request in wanted for piece in _plan(manifest, files, request)))


def run_all(work: Callable[..., None], calls: Iterable[tuple[Any, ...]]) -> None:
    """`work(*call)` for each call, some at once. The first error is raised, and what has not begun is left undone."""
    with ThreadPoolExecutor(NUM_THREADS, thread_name_prefix="checkpoint-load") as pool:
        futures = [pool.submit(work, *call) for call in calls]
        try:
            for future in futures:
                future.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def load_model(url: str, model: nn.Module, step: int | Literal["best"] | None = None) -> CheckpointInfo:
    """Fills a plain module's parameters and persistent buffers from the newest live checkpoint in `url`, from that of
    `step`, or from the best one by the run's evaluations. Returns which one it was. Raises CheckpointError."""
    storage = open_storage(url)
    info = _find(storage, step)
    manifest = read_manifest(storage, info.step, info.attempt)
    requests, problems = [], []
    for name, tensor in _canonical_tensors(model):
        found = manifest.tensors.get(name)
        if found is not None and found.shape != tuple(tensor.shape):
            problems.append(f"{name}: shape {list(found.shape)} there, {list(tensor.shape)} in the model")
        requests.append((name, whole(tuple(tensor.shape)), tensor))
    if problems:
        raise CheckpointError(f"{info.dir} does not fit this model:\n  " + "\n  ".join(problems))
    load_tensors(storage, manifest, requests)
    return info


def _find(storage: Storage, step: int | Literal["best"] | None) -> CheckpointInfo:
    if step == "best":
        return find_best(storage)
    live = [info for info in live_checkpoints(storage) if info.live]
    info = newest_live(info for info in live if step is None or info.step == step)
    if info is None:
        found = ", ".join(str(info.step) for info in live) or "none"
        wanted = "live checkpoint" if step is None else f"live checkpoint of step {step}"
        raise CheckpointError(f"no {wanted} in {storage.url}. Live steps there: {found}.")
    return info


def _canonical_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Each tensor once, under the first of its names."""
    for name, parameter in model.named_parameters():
        yield f"model.{name}", parameter.detach()
    kept = model.state_dict(keep_vars=True).keys()
    for name, buffer in model.named_buffers():
        if name in kept:
            yield f"model.{name}", buffer


def _problems(manifest: Manifest, files: Mapping[int, FileInfo], request: Request) -> Iterator[str]:
    name, box, target = request
    info = manifest.tensors.get(name)
    if info is None:
        yield f"{name}: not in the checkpoint"
        return
    if len(box.shape) != len(info.shape) or any(
        begin < 0 or begin + length > size
        for begin, length, size in zip(box.offsets, box.shape, info.shape, strict=False)
    ):
        yield f"{name}: asked for {list(box.shape)} at {list(box.offsets)}, but it has the shape {list(info.shape)}"
        return
    if tuple(target.shape) != box.shape:
        yield f"{name}: a box of {list(box.shape)} does not fit a destination of {list(target.shape)}"
    if target.dtype != TORCH_DTYPES[info.dtype]:
        yield f"{name}: stored as {info.dtype} ({TORCH_DTYPES[info.dtype]}), but the destination is {target.dtype}"
    stored = list(info.stored_boxes(box))
    if any(writer not in files for writer, _ in stored) or _count(stored, box) != box.num_elements:
        yield f"{name}: the manifest does not say where all of it lies"


def _count(stored: Sequence[tuple[int, Box]], box: Box) -> int:
    common = [inner.intersect(box) for _, inner in stored]
    return sum(part.num_elements for part in common if part is not None)


Piece = tuple[str, TensorInfo, FileInfo, Box, Box, Tensor]


def _plan(manifest: Manifest, files: Mapping[int, FileInfo], request: Request) -> Iterator[Piece]:
    """One read each: (name, tensor, file, stored box, the part of it, where that goes)."""
    name, box, target = request
    info = manifest.tensors[name]
    for writer, stored in info.stored_boxes(box):
        common = stored.intersect(box)
        if common is not None and common.num_elements:
            for part in pieces(common, stored, item_bytes(info.dtype)):
                yield name, info, files[writer], stored, part, target.detach()[part.relative_to(box)]


@dataclass(slots=True)
class _Index:
    lock: threading.Lock
    entries: dict[tuple[str, Box], Entry] | None = None


class _Reader:
    """Reads pieces, from any thread. Each index file is read once."""

    def __init__(self, storage: Storage, manifest: Manifest) -> None:
        self._storage = storage
        self._manifest = manifest
        self._indexes = {file.writer: _Index(threading.Lock()) for file in manifest.files}

    def fill(self, name: str, info: TensorInfo, file: FileInfo, stored: Box, part: Box, target: Tensor) -> None:
        entry = self._entry(file, name, stored, info.dtype)
        item = item_bytes(info.dtype)
        begin, end = byte_span(part, stored, item)
        base = begin // BLOCK_BYTES * BLOCK_BYTES
        size = min(-(-end // BLOCK_BYTES) * BLOCK_BYTES, entry.end - entry.begin) - base
        buffer = torch.empty(size, dtype=torch.uint8)
        view = buffer.numpy().data
        for first, last in needed_blocks(part, stored, item):
            low, high = first * BLOCK_BYTES, min(last * BLOCK_BYTES, entry.end - entry.begin)
            self._read_verified(file, entry, low, view[low - base : high - base])
        source = torch.as_strided(
            buffer.view(TORCH_DTYPES[info.dtype]), part.shape, strides_of(stored.shape), (begin - base) // item
        )
        target.copy_(source)

    def _read_verified(self, file: FileInfo, entry: Entry, low: int, view: memoryview) -> None:
        """Blocks of `entry` from its byte `low` on, a block boundary."""
        read_data(self._storage, self._manifest, file, entry.begin + low, view, entry.name)
        for at in range(0, view.nbytes, BLOCK_BYTES):
            number = (low + at) // BLOCK_BYTES
            if xxhash.xxh3_64_intdigest(view[at : at + BLOCK_BYTES]) != entry.blocks[number]:
                raise corrupt(
                    self._manifest,
                    file.name,
                    entry.name,
                    f"does not match its checksum in block {number} of this tensor",
                )

    def _entry(self, file: FileInfo, name: str, stored: Box, dtype: str) -> Entry:
        index = self._indexes[file.writer]
        with index.lock:
            if index.entries is None:
                entries = read_index(self._storage, self._manifest, file).entries
                index.entries = {(entry.name, entry.box): entry for entry in entries}
        entry = index.entries.get((name, stored))
        if entry is None or entry.dtype != dtype:
            raise corrupt(
                self._manifest, file.index, name, f"has no {dtype} {list(stored.shape)} at {list(stored.offsets)}"
            )
        return entry
