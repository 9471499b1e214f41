"""`dtrain ckpt verify`: whether a checkpoint's bytes are what was written."""

from __future__ import annotations

import argparse
import json

from dtrain.cluster import exits
from dtrain.cluster.storage import Storage
from dtrain.launcher.checkpoints import add_where, add_which, choose, find_place
from dtrain.launcher.console import plural, size
from dtrain.runtime.checkpoint.attempts import CheckpointInfo, live_checkpoints
from dtrain.runtime.checkpoint.read import read_manifest
from dtrain.runtime.checkpoint.verify import Damage, verify_checkpoint

HELP = "read every byte of one checkpoint; exit 1 where one is damaged"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_where(parser)
    add_which(parser)


def run(args: argparse.Namespace) -> int:
    storage = find_place(args.where).storage
    info = choose(storage, live_checkpoints(storage), args.step, args.attempt)
    damages = verify_checkpoint(storage, info)
    _report(storage, info, damages, as_json=args.json)
    return exits.FAILED if damages else exits.DONE


def _report(storage: Storage, info: CheckpointInfo, damages: list[Damage], *, as_json: bool) -> None:
    if as_json:
        found = [{"file": damage.file, "tensor": damage.tensor, "what": damage.what} for damage in damages]
        print(json.dumps({"step": info.step, "attempt": info.attempt, "url": f"{storage.url}/{info.dir}",
                          "damages": found}, ensure_ascii=False))  # fmt: skip
        return
    for damage in damages:
        tensor = f"tensor {damage.tensor} " if damage.tensor else ""
        print(f"{info.dir}/{damage.file}: {tensor}{damage.what}")
    if damages:
        print(f"Step {info.step} of attempt {info.attempt} is damaged in {plural(len(damages), 'place')}. "
              "A relaunch passes over it and goes on from the step before.")  # fmt: skip
        return
    manifest = read_manifest(storage, info.step, info.attempt)
    tensors = plural(len(manifest.tensors), "tensor")
    print(
        f"Step {info.step} of attempt {info.attempt} is whole: {tensors}, {size(manifest.size_bytes)}, every byte read."
    )
