"""The process behind `dtrain ckpt export`: builds the run's model where its names and config are needed, and fills a
folder. Reads one request, a JSON object, on standard input; answers with one on standard output.

What is exported, and where the folder comes to lie, is launcher/commands/ckpt_export.py's.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sys
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dtrain.cluster.errors import CheckpointError, DtrainError, StorageError, UsageError
from dtrain.cluster.rundir import RunDir
from dtrain.cluster.storage import open_storage
from dtrain.runtime import targets
from dtrain.runtime.checkpoint.export import FILE_BYTES, model_names, write_weights
from dtrain.runtime.checkpoint.manifest import Manifest
from dtrain.runtime.checkpoint.read import read_manifest
from dtrain.runtime.config import read_run_config
from dtrain.runtime.hfnames import as_they_are, names_for_files
from dtrain.runtime.modelconfig import ModelConfig

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}

# What belongs to a model beside its weights: small, and of no use without it.
COMPANIONS = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "tokenizer.model"),
    *("vocab.json", "vocab.txt", "merges.txt", "spiece.model", "sentencepiece.bpe.model", "chat_template.jinja"),
    *("preprocessor_config.json", "processor_config.json", "generation_config.json"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    checkpoint_url: str
    step: int
    attempt: int
    folder: str  # exists and is empty
    form: str  # "hf" or "safetensors"
    dtype: str | None  # of DTYPES
    config: str | None  # a folder with config.json, in place of the model's own
    run_dir: str | None  # None: only the checkpoint is known
    sys_path: tuple[str, ...]
    file_bytes: int = FILE_BYTES


def export(request: Request) -> dict[str, Any]:
    """Fills the folder; what there is to tell of it. Raises DtrainError."""
    storage = open_storage(request.checkpoint_url)
    manifest = read_manifest(storage, request.step, request.attempt)
    folder = Path(request.folder)
    names = as_they_are(model_names(manifest))
    if not names:
        raise CheckpointError(f"step {request.step} in {storage.url} holds no tensor of a model")
    if request.form == "hf":
        names = _describe(request, manifest, folder, names)
    dtype = None if request.dtype is None else DTYPES[request.dtype]
    size = write_weights(storage, manifest, names, folder, dtype=dtype, file_bytes=request.file_bytes)
    return {"tensors": len(names), "bytes": size, "files": sorted(path.name for path in folder.iterdir())}


def _describe(request: Request, manifest: Manifest, folder: Path, names: dict[str, str]) -> dict[str, str]:
    """Writes the config and what goes with it; the names that the weights shall have."""
    model_config = read_run_config(RunDir(request.run_dir).config)[0].model if request.run_dir else None
    model = None if model_config is None else _plain_model(model_config)
    if model is not None:
        names = names_for_files(model, _checked(model, list(names)))
    if request.config is not None:
        shutil.copyfile(Path(request.config) / "config.json", folder / "config.json")
        _copy_companions(request.config, folder)
    elif model is not None:
        _write_own_config(model, folder)
        if model_config is not None and model_config.init_from is not None:
            _copy_companions(model_config.init_from.url, folder)
    _set_dtype(folder / "config.json", manifest, request.dtype)
    return names


def _plain_model(config: ModelConfig) -> nn.Module:
    """The run's model for its names and config: without memory for its weights, where its code takes that."""
    try:
        with torch.device("meta"):
            model = targets.build(config.target)
    except UsageError:
        raise
    except Exception:
        model = targets.build(config.target)
    if not isinstance(model, nn.Module):
        raise UsageError(f"model: {config.target.target} returned {type(model).__name__}, not a torch.nn.Module")
    return model


def _checked(model: nn.Module, names: list[str]) -> list[str]:
    """Raises UsageError where the code does not make the model that was saved."""
    there = {name for name, _ in model.named_parameters()}
    if lost := [name for name in there if name not in names]:
        raise UsageError(
            f"the model that {type(model).__name__} is now has {lost[0]}, which the checkpoint does not hold: the code "
            "has changed since. Export with the code of then, or with --to safetensors"
        )
    return names


def _write_own_config(model: nn.Module, folder: Path) -> None:
    config: Any = getattr(model, "config", None)
    if not hasattr(config, "save_pretrained"):
        raise UsageError(
            f"--to hf: {type(model).__name__} is no model of transformers (it has no such config). Give a folder with "
            "the config.json that fits it (--config FOLDER), or take --to safetensors"
        )
    config.architectures = [type(model).__name__]
    config.save_pretrained(folder)
    generation: Any = getattr(model, "generation_config", None)
    if generation is not None:
        generation.save_pretrained(folder)


def _copy_companions(url: str, folder: Path) -> None:
    """A tokenizer and the like, as far as they are there and the folder has no own; a store that is gone has none."""
    for name in COMPANIONS:
        if not (folder / name).exists():
            with contextlib.suppress(FileNotFoundError, StorageError, UsageError):
                (folder / name).write_bytes(open_storage(url).get(name))


def _set_dtype(path: Path, manifest: Manifest, asked: str | None) -> None:
    """transformers opens a folder in the dtype that its config says."""
    stored = {tensor.dtype for name, tensor in manifest.tensors.items() if name.startswith("model.")}
    widest = next((name for kind, name in (("F32", "fp32"), ("BF16", "bf16"), ("F16", "fp16")) if kind in stored), None)
    chosen = asked or widest
    content = json.loads(path.read_text())
    content.pop("torch_dtype", None)
    if chosen is not None:
        content["dtype"] = str(DTYPES[chosen]).removeprefix("torch.")
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")


def _main() -> None:
    request = json.loads(sys.stdin.buffer.read())
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what the user's modules print must not mix with the answer
    sys.path[:0] = request["sys_path"]
    try:
        answer = export(Request(**{**request, "sys_path": tuple(request["sys_path"])}))
    except DtrainError as error:
        answer = {"problem": str(error), "exit_code": error.exit_code}
    except Exception as error:  # of the user's model
        answer = {"problem": "".join(traceback.format_exception(error)).strip(), "exit_code": 1}
    print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    _main()
