"""Manifests and indexes out of a store, checked. Torch-free."""

from __future__ import annotations

import xxhash

from dtrain.cluster.errors import CheckpointError, CorruptCheckpoint, StorageError
from dtrain.cluster.storage import Storage
from dtrain.runtime.checkpoint import names
from dtrain.runtime.checkpoint.index import FileIndex, decode_index
from dtrain.runtime.checkpoint.manifest import FileInfo, Manifest, decode_manifest


def read_manifest(storage: Storage, step: int, attempt: int) -> Manifest:
    """Raises CheckpointError where there is none, CorruptCheckpoint where it is damaged."""
    directory = names.step_dir(step, attempt)
    try:
        raw = storage.get(names.manifest_key(directory))
    except FileNotFoundError as error:
        raise CheckpointError(
            f"no checkpoint of step {step} by attempt {attempt} in {storage.url}: {names.manifest_key(directory)} "
            f"does not exist. `dtrain ckpt ls {storage.url}` shows what there is."
        ) from error
    return decode_manifest(raw, directory)


def read_index(storage: Storage, manifest: Manifest, file: FileInfo) -> FileIndex:
    """The index of one of the manifest's files. Raises CorruptCheckpoint where it is damaged or gone."""
    key = manifest.key(file, file.index)
    try:
        raw = storage.get(key)
    except FileNotFoundError as error:
        raise corrupt(manifest, file.index, "", "is missing") from error
    if xxhash.xxh3_128_hexdigest(raw) != file.index_xxh3:
        raise corrupt(manifest, file.index, "", "does not match its digest in the manifest")
    index = decode_index(raw, key)
    if (index.file, index.size_bytes) != (file.name, file.size_bytes):
        raise CheckpointError(
            f"{key} describes {index.file} of {index.size_bytes} bytes, "
            f"but the manifest says {file.name} of {file.size_bytes}"
        )
    return index


def read_data(
    storage: Storage, manifest: Manifest, file: FileInfo, offset: int, target: memoryview, tensor: str
) -> None:
    """Fills `target` from byte `offset` of a data file on. Raises CorruptCheckpoint where the file is gone or short;
    StorageError for what another try may mend."""
    key = manifest.key(file, file.name)
    try:
        storage.read_into(key, offset, target)
    except FileNotFoundError as error:
        raise corrupt(manifest, file.name, tensor, "is missing") from error
    except StorageError as error:
        found = storage.stat(key)
        if found is None or found.size_bytes >= file.size_bytes:
            raise
        what = f"has {found.size_bytes} bytes, not {file.size_bytes}"
        raise corrupt(manifest, file.name, tensor, what) from error


def corrupt(manifest: Manifest, file: str, tensor: str, what: str) -> CorruptCheckpoint:
    """`what` goes on after the file's name: "is missing"."""
    needed = f" (it holds {tensor})" if tensor else ""
    return CorruptCheckpoint(
        f"step {manifest.step} of attempt {manifest.attempt} is damaged: {manifest.dir}/{file}{needed} {what}",
        step=manifest.step,
        attempt=manifest.attempt,
        file=file,
        tensor=tensor,
    )
