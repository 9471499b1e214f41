"""`dtrain ckpt show`: what one checkpoint holds, from its manifest alone."""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Iterator
from typing import Any

from dtrain.cluster import exits
from dtrain.cluster.storage import Storage
from dtrain.launcher.checkpoints import add_where, add_which, choose, find_place
from dtrain.launcher.console import plural, size
from dtrain.runtime.checkpoint.attempts import CheckpointInfo, live_checkpoints
from dtrain.runtime.checkpoint.dtypes import ITEM_BYTES
from dtrain.runtime.checkpoint.manifest import BoxesRule, GridRule, Manifest, TensorInfo
from dtrain.runtime.checkpoint.read import read_manifest
from dtrain.runtime.checkpoint.survey import file_damages

HELP = "what one checkpoint holds: tensors, shapes, layout, files, state"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_where(parser)
    add_which(parser)


def run(args: argparse.Namespace) -> int:
    storage = find_place(args.where).storage
    info = choose(storage, live_checkpoints(storage), args.step, args.attempt)
    manifest = read_manifest(storage, info.step, info.attempt)
    if args.json:
        print(json.dumps(record(storage, info, manifest), ensure_ascii=False))
    else:
        _print(storage, info, manifest)
    return exits.DONE


def record(storage: Storage, info: CheckpointInfo, manifest: Manifest) -> dict[str, Any]:
    """The documented object of `ckpt show --json`."""
    return {
        "step": info.step,
        "attempt": info.attempt,
        "live": info.live,
        "url": f"{storage.url}/{info.dir}",
        "bytes": manifest.size_bytes,
        "committed_at": info.committed_at,
        "strategy": manifest.strategy,
        "world_size": manifest.world_size,
        "damage": "; ".join(_damages(storage, info, manifest)) or None,
        "files": [{"writer": file.writer, "key": manifest.key(file, file.name), "bytes": file.size_bytes}
                  for file in manifest.files],
        "tensors": [{"name": name, "dtype": tensor.dtype, "shape": tensor.shape, "bytes": _bytes(tensor),
                     "layout": layout_words(tensor)} for name, tensor in manifest.tensors.items()],
        "state": manifest.state,
    }  # fmt: skip


def _print(storage: Storage, info: CheckpointInfo, manifest: Manifest) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False, soft_wrap=True)
    if not console.is_terminal:
        console.width = 1000  # a name that is cut in two can't be searched for
    for line in _head(storage, info, manifest):
        console.print(line, markup=False)
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("TENSOR", overflow="fold")
    for name in ("TYPE", "SHAPE", "SIZE", "LAYOUT"):
        table.add_column(name, no_wrap=name != "LAYOUT")
    for name, tensor in manifest.tensors.items():
        shape = " x ".join(map(str, tensor.shape)) or "scalar"
        table.add_row(name.replace("[", r"\["), tensor.dtype, shape, size(_bytes(tensor)), layout_words(tensor))
    console.print(table)


def _head(storage: Storage, info: CheckpointInfo, manifest: Manifest) -> Iterator[str]:
    yield f"{storage.url}/{info.dir}"
    when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(info.committed_at))
    live = "live" if info.live else "dead: its attempt was replaced before, it is never loaded"
    yield f"  step {info.step} of attempt {info.attempt}, committed {when}, {live}"
    strategy = " ".join(
        f"{key} {value}" for key, value in manifest.strategy.items() if key != "name" and value is not None
    )
    name = manifest.strategy.get("name", "?")
    yield f"  {name} on {plural(manifest.world_size, 'rank')}{f' ({strategy})' if strategy else ''}"
    files = plural(len(manifest.files), "file")
    yield f"  {plural(len(manifest.tensors), 'tensor')}, {size(manifest.size_bytes)} in {files}"
    for file in manifest.files:
        yield f"    {manifest.key(file, file.name)}  {size(file.size_bytes)}"
    for what in _damages(storage, info, manifest):
        yield f"  DAMAGED: {what}"
    for key, value in manifest.state.items():
        yield f"  state {key}: {json.dumps(value, ensure_ascii=False)}"


def _damages(storage: Storage, info: CheckpointInfo, manifest: Manifest) -> tuple[str, ...]:
    directories = {info.dir, *(file.dir or info.dir for file in manifest.files)}
    sizes = {found.key: found.size_bytes for name in directories for found in storage.list(f"{name}/")}
    return tuple(file_damages(manifest, sizes))


def _bytes(tensor: TensorInfo) -> int:
    return math.prod(tensor.shape) * ITEM_BYTES[tensor.dtype]


def layout_words(tensor: TensorInfo) -> str:
    """`whole, by rank 0`; `4 x 1 parts, by ranks 0-3`; `3 boxes, by ranks 0, 2`."""
    match tensor.layout:
        case GridRule(parts=parts, writers=runs):
            writers = {writer for first, count in runs for writer in range(first, first + count)}
            count = math.prod(parts)
            words = "whole" if count == 1 else f"{' x '.join(map(str, parts))} parts"
        case BoxesRule(boxes=boxes):
            writers = {writer for writer, _ in boxes}
            words = plural(len(boxes), "box")
    return f"{words}, by rank{'' if len(writers) == 1 else 's'} {_ranges(sorted(writers))}"


def _ranges(numbers: list[int]) -> str:
    """[0, 1, 2, 5] -> "0-2, 5"."""
    runs: list[tuple[int, int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1] = (runs[-1][0], number)
        else:
            runs.append((number, number))
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)
