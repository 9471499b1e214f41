"""`dtrain ckpt ls | verify`: the checkpoints in a store, and whether their bytes are what was written."""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

from dtrain.cluster import exits
from dtrain.cluster.errors import CheckpointError, UsageError
from dtrain.cluster.storage import Storage, open_storage
from dtrain.launcher.console import plural, size
from dtrain.launcher.runs import read_job, resolve
from dtrain.runtime.checkpoint.attempts import CheckpointInfo, live_checkpoints, newest_live
from dtrain.runtime.checkpoint.read import read_manifest
from dtrain.runtime.checkpoint.verify import Damage, verify_checkpoint

HELP = "List the checkpoints of a run or a store, and verify that their bytes are what was written."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    commands = parser.add_subparsers(dest="ckpt_command", metavar="COMMAND", required=True)
    listing = commands.add_parser("ls", help="every committed checkpoint; the newest live one is where a run goes on")
    verifying = commands.add_parser("verify", help="read every byte of one checkpoint; exit 1 where one is damaged")
    for command in (listing, verifying):
        command.add_argument("where", metavar="URL|RUN", help="a checkpoint URL or path, or a run")
        command.add_argument("--json", action="store_true", help="print JSON")
    verifying.add_argument("--step", type=int, metavar="N", help="which step; left out: the newest live one")
    verifying.add_argument("--attempt", type=int, metavar="A", help="by which attempt; left out: the live one")


def run(args: argparse.Namespace) -> int:
    storage = open_storage(_url(args.where))
    infos = live_checkpoints(storage)
    if args.ckpt_command == "ls":
        _list(storage, infos, as_json=args.json)
        return exits.DONE
    info = _choose(storage, infos, args.step, args.attempt)
    damages = verify_checkpoint(storage, info)
    _report(storage, info, damages, as_json=args.json)
    return exits.FAILED if damages else exits.DONE


def _url(where: str) -> str:
    """The store that a person means: a URL, a run, or a directory that holds checkpoints."""
    if "://" in where:
        return where
    path = Path(where).expanduser()
    if path.is_dir():
        job = read_job(path)
        if job is not None:
            return job.plan.checkpoint_url
        return str(path / "checkpoints" if (path / "checkpoints").is_dir() else path)
    try:
        job, remark = resolve(where, Path.cwd())
    except UsageError as error:
        raise UsageError(f"{error} Nor is {where} a directory of checkpoints.") from None
    if remark:
        print(f"dtrain: {remark}", file=sys.stderr)
    return job.plan.checkpoint_url


def _list(storage: Storage, infos: list[CheckpointInfo], *, as_json: bool) -> None:
    rows = [_row(storage, info) for info in infos]
    if as_json:
        print(json.dumps(rows, ensure_ascii=False))
    elif not rows:
        print(f"No checkpoints in {storage.url}.")
    else:
        _print_table(storage, rows)


def _row(storage: Storage, info: CheckpointInfo) -> dict[str, Any]:
    """What a manifest says; its fields are null where it is damaged."""
    try:
        manifest = read_manifest(storage, info.step, info.attempt)
    except CheckpointError:
        manifest = None
    return {
        "step": info.step,
        "attempt": info.attempt,
        "live": info.live,
        "url": f"{storage.url}/{info.dir}",
        "bytes": manifest and manifest.size_bytes,
        "committed_at": info.committed_at,
        "strategy": manifest and manifest.strategy.get("name"),
        "world_size": manifest and manifest.world_size,
    }


def _print_table(storage: Storage, rows: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("STEP", "ATTEMPT"):
        table.add_column(name, justify="right")
    for name in ("STATE", "SIZE", "STRATEGY", "RANKS", "COMMITTED"):
        table.add_column(name)
    newest = max((row for row in rows if row["live"]), key=lambda row: (row["step"], row["attempt"]), default=None)
    for row in rows:
        state = "newest" if row is newest else "live" if row["live"] else "dead"
        damaged = row["bytes"] is None
        table.add_row(
            str(row["step"]),
            str(row["attempt"]),
            state,
            "damaged" if damaged else size(row["bytes"]),
            str(row["strategy"] or "?"),
            str(row["world_size"] or "?"),
            time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(row["committed_at"])),
        )
    console = Console()
    console.print(storage.url, highlight=False, soft_wrap=True)
    console.print(table)
    if any(not row["live"] for row in rows):
        console.print("dead: committed by an attempt that was replaced before; never loaded", style="dim")


def _choose(storage: Storage, infos: list[CheckpointInfo], step: int | None, attempt: int | None) -> CheckpointInfo:
    fitting = [info for info in infos if step in (None, info.step) and attempt in (None, info.attempt)]
    chosen = newest_live(fitting) or max(
        (info for info in fitting if step is not None), key=lambda info: info.attempt, default=None
    )
    if chosen is not None:
        return chosen
    asked = " ".join(
        [
            *([f"of step {step}"] if step is not None else []),
            *([f"by attempt {attempt}"] if attempt is not None else []),
        ]
    )
    steps = ", ".join(f"{info.step} (attempt {info.attempt})" for info in infos) or "none"
    raise CheckpointError(
        f"no {'live ' if step is None else ''}checkpoint {asked or 'at all'} in {storage.url}. "
        f"Committed steps: {steps}."
    )


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
