"""`dtrain ckpt gc`: deletes what killed writers left behind; committed checkpoints are not touched."""

from __future__ import annotations

import argparse
import json
import re
import time

from dtrain.cluster import exits
from dtrain.cluster.errors import UsageError
from dtrain.launcher.checkpoints import Place, add_where, find_place
from dtrain.launcher.console import duration, plural, size
from dtrain.runtime.checkpoint.attempts import newest_attempt
from dtrain.runtime.checkpoint.garbage import Garbage, find_garbage, store_time
from dtrain.runtime.checkpoint.retention import LEASE_S

HELP = "delete what killed writers left: files that no checkpoint names, uploads that were never completed"
_DURATION = re.compile(r"(\d+(?:\.\d+)?)\s*(s|min|h|d)")
_UNIT_S = {"s": 1.0, "min": 60.0, "h": 3600.0, "d": 86400.0}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_where(parser)
    parser.add_argument(
        "--older-than", type=_duration, default=86400.0, metavar="TIME",
        help="30min, 24h, 7d; left out: 24h. Below an hour only where the run is known to be over",
    )  # fmt: skip
    parser.add_argument("--dry-run", action="store_true", help="say what would be deleted, and delete nothing")


def run(args: argparse.Namespace) -> int:
    place = find_place(args.where)
    storage = place.storage
    newest = newest_attempt(storage)  # before it is asked whether the run is over: a launch may be about to begin one
    is_over = place.is_over()
    if args.older_than < LEASE_S and not is_over:
        raise UsageError(
            f"--older-than {duration(args.older_than)}: a file that young may belong to a save that is going on. "
            f"{_who(place)} Ask for {duration(LEASE_S)} or more, or for the run once it is over."
        )
    # A dry run writes nothing, so it goes by the clock of this machine.
    before = (time.time() if args.dry_run else store_time(storage)) - args.older_than
    garbage = find_garbage(storage, before=before, last_attempt=newest if is_over else newest - 1)
    uploads = 0
    if not args.dry_run:
        storage.delete(*[file.key for file in garbage.files])
        uploads = storage.discard_uploads("", before)
    _report(garbage, uploads, place, is_over, args)
    return exits.DONE


def _report(garbage: Garbage, uploads: int, place: Place, is_over: bool, args: argparse.Namespace) -> None:
    if args.json:
        print(json.dumps({"files": [file.key for file in garbage.files], "bytes": garbage.size_bytes,
                          "uploads": None if args.dry_run else uploads, "spared": [file.key for file in garbage.spared],
                          "dry_run": args.dry_run}))  # fmt: skip
        return
    would = "would go" if args.dry_run else "gone"
    for file in garbage.files:
        print(f"{would}: {file.key}  {size(file.size_bytes)}")
    rest = "uploads are looked for when it is done" if args.dry_run else plural(uploads, "uncompleted upload") + " gone"
    print(f"{plural(len(garbage.files), 'file')}, {size(garbage.size_bytes)}, {would}; {rest}.")
    if garbage.spared:
        why = f"younger than {duration(args.older_than)}" + (
            "" if is_over else f", or of the newest attempt. {_who(place)}"
        )
        print(f"{plural(len(garbage.spared), 'file')} that no checkpoint names left: {why}")


def _who(place: Place) -> str:
    if place.job is None:
        return "No run that writes there is known here: name the run instead of the URL if there is one."
    return f"{place.job.plan.name} ({place.job.run.path}) is not known to be over."


def _duration(text: str) -> float:
    match = _DURATION.fullmatch(text.strip())
    if match is None:
        raise argparse.ArgumentTypeError(f'expects a time (30min, 24h, 7d), found "{text}"')
    return float(match[1]) * _UNIT_S[match[2]]
