"""A checkpoint's model as plain safetensors files that other tools open: whole tensors, no optimizer.

Holds one tensor at a time. What the files are called and say beside the tensors is as transformers has it; the rest
of a Hugging Face folder is runtime/export.py's.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from dtrain.cluster.storage import Storage
from dtrain.runtime.checkpoint.dtypes import item_bytes
from dtrain.runtime.checkpoint.loader import load_tensors
from dtrain.runtime.checkpoint.manifest import Manifest
from dtrain.runtime.checkpoint.torchtypes import DTYPE_NAMES, TORCH_DTYPES
from dtrain.strategies.boxes import whole

FILE_BYTES = 5_000_000_000  # a folder with more tensor bytes gets several files and an index
_PREFIX = "model."


@dataclass(frozen=True, slots=True, kw_only=True)
class _Output:
    """One tensor of the files to be."""

    stored: str  # its name in the manifest
    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    size_bytes: int


def model_names(manifest: Manifest) -> list[str]:
    """The model's own tensors, by the names that the model gives them."""
    return [name.removeprefix(_PREFIX) for name in manifest.tensors if name.startswith(_PREFIX)]


def write_weights(
    storage: Storage,
    manifest: Manifest,
    names: Mapping[str, str],
    folder: Path,
    *,
    dtype: torch.dtype | None = None,
    file_bytes: int = FILE_BYTES,
) -> int:
    """Writes model.safetensors into `folder`, or several files and their index. `names`: what each of the model's
    tensors is called there. Floating tensors come in `dtype` where it is given. Returns the bytes of all tensors.

    Raises CheckpointError, CorruptCheckpoint; OSError where the folder can't be written.
    """
    outputs = [_output(manifest, own, name, dtype) for own, name in names.items()]
    parts = _parts(outputs, file_bytes)
    total = len(parts)
    files = [
        "model.safetensors" if total == 1 else f"model-{number:05d}-of-{total:05d}.safetensors"
        for number in range(1, total + 1)
    ]
    for file, part in zip(files, parts, strict=True):
        _write_file(storage, manifest, part, folder / file)
    size = sum(output.size_bytes for output in outputs)
    if total > 1:
        places = {output.name: file for file, part in zip(files, parts, strict=True) for output in part}
        index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(places.items()))}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    return size


def _output(manifest: Manifest, own: str, name: str, dtype: torch.dtype | None) -> _Output:
    info = manifest.tensors[_PREFIX + own]
    kind = TORCH_DTYPES[info.dtype]
    kind = dtype if dtype is not None and kind.is_floating_point else kind
    size = whole(info.shape).num_elements * item_bytes(DTYPE_NAMES[kind])
    return _Output(stored=_PREFIX + own, name=name, dtype=kind, shape=info.shape, size_bytes=size)


def _parts(outputs: Sequence[_Output], limit: int) -> list[list[_Output]]:
    """Files filled in order; a tensor larger than the limit has one of its own."""
    parts: list[list[_Output]] = [[]]
    filled = 0
    for output in outputs:
        if parts[-1] and filled + output.size_bytes > limit:
            parts.append([])
            filled = 0
        parts[-1].append(output)
        filled += output.size_bytes
    return parts


def _write_file(storage: Storage, manifest: Manifest, outputs: Sequence[_Output], path: Path) -> None:
    # safetensors' own writer puts wide element types first, so that every tensor is aligned
    ordered = sorted(outputs, key=lambda output: -output.dtype.itemsize)
    with open(path, "xb") as file:
        file.write(_header(ordered))
        for output in ordered:
            _write_tensor(storage, manifest, output, file)
        file.flush()
        os.fsync(file.fileno())


def _header(outputs: Sequence[_Output]) -> bytes:
    content: dict[str, object] = {"__metadata__": {"format": "pt"}}
    position = 0
    for output in outputs:
        offsets = [position, position + output.size_bytes]
        content[output.name] = {"dtype": DTYPE_NAMES[output.dtype], "shape": output.shape, "data_offsets": offsets}
        position += output.size_bytes
    text = json.dumps(content, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _write_tensor(storage: Storage, manifest: Manifest, output: _Output, file: BinaryIO) -> None:
    tensor: Tensor = torch.empty(output.shape, dtype=TORCH_DTYPES[manifest.tensors[output.stored].dtype])
    if tensor.numel():
        load_tensors(storage, manifest, [(output.stored, whole(output.shape), tensor)])
        file.write(tensor.to(output.dtype).reshape(-1).view(torch.uint8).numpy().data)
