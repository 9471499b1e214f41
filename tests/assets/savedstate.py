"""What a run directory's checkpoints hold, whatever layout saved them: as tensors, and as one SHA-256."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

import torch
from torch import Tensor

from dtrain.cluster.filestore import FileStorage
from dtrain.runtime.checkpoint.loader import load_tensors
from dtrain.runtime.checkpoint.names import manifest_key
from dtrain.runtime.checkpoint.read import read_manifest
from dtrain.runtime.checkpoint.torchtypes import TORCH_DTYPES
from dtrain.strategies.boxes import whole


def committed(folder: Path) -> list[tuple[int, int]]:
    """(step, attempt) of what is committed, oldest first."""
    found = [re.fullmatch(r"step-(\d+)-a(\d+)", path.name) for path in (folder / "checkpoints").glob("step-*")]
    pairs = [(m, (int(m[1]), int(m[2]))) for m in found if m]
    return sorted(pair for m, pair in pairs if (folder / "checkpoints" / manifest_key(m[0])).exists())


def tensors_of(folder: Path, step: int, attempt: int) -> dict[str, Tensor]:
    """Weights, moments and all, by their names."""
    storage = FileStorage(str(folder / "checkpoints"))
    manifest = read_manifest(storage, step, attempt)
    found = {name: torch.empty(info.shape, dtype=TORCH_DTYPES[info.dtype]) for name, info in manifest.tensors.items()}
    load_tensors(storage, manifest, [(name, whole(tuple(t.shape)), t) for name, t in found.items()])
    return found


def digest(folder: Path, steps: int) -> str:
    """Of the last checkpoint, which must be that of step `steps`."""
    step, attempt = committed(folder)[-1]
    assert step == steps
    sha = hashlib.sha256()
    for name, tensor in sorted(tensors_of(folder, step, attempt).items()):
        sha.update(name.encode() + tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()
