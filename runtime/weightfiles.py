"""Safetensors files as Hugging Face folders hold them: which tensors a URL offers, and where their bytes lie.

Reads headers only, and believes nothing in them before it is checked. Torch-free. Which tensor fills which of a
model's is weightmatch.py's; reading their bytes, pretrained.py's.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from dtrain.cluster.errors import CheckpointError, StorageError, UsageError
from dtrain.cluster.storage import RETRY_S, Storage, open_storage
from dtrain.runtime.checkpoint import fields
from dtrain.runtime.checkpoint.dtypes import item_bytes

MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library
NUM_THREADS = 8
SUFFIX = ".safetensors"
ONE_FILE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_INDEX_SUFFIX = f"{SUFFIX}.index.json"
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredTensor:
    """Bytes [begin, end) of `file`, row-major; `dtype` in safetensors' names."""

    file: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightFiles:
    """All tensors that a URL offers. `url`: of the folder that the files lie in."""

    url: str
    tensors: Mapping[str, StoredTensor]


def find_weights(url: str, *, retry_s: float = RETRY_S) -> WeightFiles:
    """What lies at `url`: a folder with model.safetensors, or with an index of several files, or with other
    safetensors files; or one file or index itself.

    Raises UsageError where there is none or one is damaged, StorageError where the store can't be read within
    `retry_s`.
    """
    folder, name = _split(url)
    storage = open_storage(folder, retry_s=retry_s)
    try:
        files, claimed = _files(storage, name)
        with ThreadPoolExecutor(NUM_THREADS, thread_name_prefix="weights") as pool:
            headers = list(pool.map(lambda file: read_header(storage, file), files))
        return WeightFiles(url=storage.url, tensors=_merge(headers, claimed))
    except CheckpointError as error:
        raise UsageError(f"{url}: {error}. Download or write it again.") from error
    except FileNotFoundError as error:
        raise UsageError(f"{url}: there is no such file ({error}).") from error


def _split(url: str) -> tuple[str, str]:
    """(folder, file in it); the file is "" where `url` names a folder. Raises UsageError for a pickle."""
    if url.endswith(_PICKLES):
        raise UsageError(
            f"{url}: pickled weights are never loaded, because loading them can run code. Convert them where you trust "
            "them: save_pretrained() and safetensors.torch.save_file() write safetensors."
        )
    if not url.endswith((SUFFIX, _INDEX_SUFFIX)):
        return url, ""
    folder, _, name = url.rpartition("/")
    return folder or ("/" if url.startswith("/") else "."), name


def _files(storage: Storage, name: str) -> tuple[Sequence[str], Mapping[str, str]]:
    """The files to read, and which of them an index says that each tensor is in. Raises FileNotFoundError."""
    if name.endswith(_INDEX_SUFFIX):
        return _indexed(storage.get(name), name)
    if name:
        return [name], {}
    if _exists(storage, ONE_FILE):
        return [ONE_FILE], {}
    try:
        return _indexed(storage.get(INDEX), INDEX)
    except FileNotFoundError:
        pass
    found = [info.key for info in storage.list("") if "/" not in info.key]
    files = [key for key in found if key.endswith(SUFFIX)]
    if not files:
        raise UsageError(f"{storage.url}: {_nothing(storage, found)}")
    return files, {}


def _exists(storage: Storage, key: str) -> bool:
    """By reading it: the cache of the Hugging Face hub holds links, which are no objects of a file system's store."""
    try:
        storage.read_into(key, 0, memoryview(bytearray(8)))
    except FileNotFoundError:
        return False
    return True


def _nothing(storage: Storage, found: Sequence[str]) -> str:
    """Why there is nothing to load, from what is there instead."""
    if any(key.endswith(_PICKLES) for key in found):
        return "it holds pickled weights only, which are never loaded. Convert them: save_pretrained() in transformers."
    if "manifest.json" in found or any(name.startswith("step-") for name in storage.list_dirs("")):
        return "these are checkpoints of dtrain. First: dtrain ckpt export RUN --to safetensors FOLDER"
    there = f"It holds {', '.join(found[:5])}." if found else "There is nothing."
    return f"no {ONE_FILE}, no {INDEX} and no other {SUFFIX} file. {there}"


def _indexed(raw: bytes, name: str) -> tuple[Sequence[str], Mapping[str, str]]:
    places = fields.mapping(fields.get(fields.parse_object(raw, name), "weight_map", name), name)
    for tensor, file in places.items():
        parts = fields.text(file, f"{name}: {tensor}").split("/")
        if any(not part or part.startswith(".") for part in parts):
            raise CheckpointError(f"{name}: {tensor} is said to be in {file!r}, which is no name of a file there")
    if not places:
        raise CheckpointError(f"{name}: names no tensor")
    return sorted(set(places.values())), places


def read_header(storage: Storage, file: str) -> dict[str, StoredTensor]:
    """The tensors of one safetensors file. Raises CheckpointError where it is damaged or cut short,
    FileNotFoundError."""
    size = int.from_bytes(_read(storage, file, 0, 8), "little")
    if not 2 <= size <= MAX_HEADER_BYTES:
        raise CheckpointError(f"{file} is no safetensors file: its header would have {size} bytes")
    data_begin = 8 + size
    header = fields.parse_object(_read(storage, file, 8, size), f"the header of {file}")
    header.pop("__metadata__", None)
    found = {name: _tensor(file, name, entry, data_begin) for name, entry in header.items()}
    position = data_begin
    for name, tensor in sorted(found.items(), key=lambda item: (item[1].begin, item[1].end)):
        if tensor.begin != position:
            raise CheckpointError(
                f"{file}: {name} begins at byte {tensor.begin}, but the one before ends at {position}"
            )
        position = tensor.end
    if position > data_begin:
        _read(storage, file, position - 1, 1)  # the last byte that the header promises
    return found


def _tensor(file: str, name: str, entry: object, data_begin: int) -> StoredTensor:
    what = f"{file}: {name}"
    data = fields.mapping(entry, what)
    dtype = fields.text(fields.get(data, "dtype", what), what)
    shape = fields.integers(fields.get(data, "shape", what), what)
    begin, end = fields.integers(fields.get(data, "data_offsets", what), what, length=2)
    if end - begin != math.prod(shape) * item_bytes(dtype):
        raise CheckpointError(f"{what}: {dtype} {list(shape)} does not have the {end - begin} bytes that it is given")
    return StoredTensor(file=file, dtype=dtype, shape=shape, begin=data_begin + begin, end=data_begin + end)


def _read(storage: Storage, file: str, offset: int, size: int) -> bytes:
    raw = bytearray(size)
    try:
        storage.read_into(file, offset, memoryview(raw))
    except StorageError as error:
        if _is_short(storage, file, offset + size):
            raise CheckpointError(f"{file} is cut short: it ends before byte {offset + size}") from error
        raise
    return bytes(raw)


def _is_short(storage: Storage, file: str, wanted_bytes: int) -> bool:
    info = storage.stat(file)
    return info is not None and info.size_bytes < wanted_bytes


def _merge(headers: Sequence[Mapping[str, StoredTensor]], claimed: Mapping[str, str]) -> dict[str, StoredTensor]:
    merged: dict[str, StoredTensor] = {}
    for header in headers:
        for name, tensor in header.items():
            if claimed.get(name, tensor.file) != tensor.file:
                continue
            if name in merged:
                raise CheckpointError(f"{name} is in {merged[name].file} and in {tensor.file}, and no index says which")
            merged[name] = tensor
    for name, file in claimed.items():
        if name not in merged:
            raise CheckpointError(f"the index says that {name} is in {file}, but it is not")
    if not merged:
        raise CheckpointError("there is no tensor in it")
    return merged
