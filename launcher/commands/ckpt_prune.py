"""`dtrain ckpt prune`: retention by hand."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence

from dtrain.cluster import exits
from dtrain.cluster.errors import CheckpointError, UsageError
from dtrain.cluster.storage import Storage
from dtrain.launcher.checkpoints import add_where, find_place
from dtrain.launcher.console import plural, size
from dtrain.runtime.checkpoint.attempts import CheckpointInfo
from dtrain.runtime.checkpoint.retention import Deletion, carry_out, plan_deletion
from dtrain.runtime.checkpoint.scores import Scores, rank
from dtrain.runtime.checkpoint.survey import Surveyed, survey

HELP = "delete checkpoints but the newest N and those of checkpoint.best; those that are never loaded go too"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_where(parser)
    parser.add_argument(
        "--keep", type=int, metavar="N", required=True, help="how many of the live ones stay, 1 or more"
    )
    parser.add_argument("--dry-run", action="store_true", help="say what would be deleted, and delete nothing")


def run(args: argparse.Namespace) -> int:
    if args.keep < 1:
        raise UsageError(f"--keep {args.keep}: expects 1 or more; the newest live checkpoint always stays.")
    storage = find_place(args.where).storage
    found = survey(storage)
    if found and not any(one.info.live for one in found):
        raise CheckpointError(
            f"none of the {plural(len(found), 'checkpoint')} in {storage.url} is live, so nothing is deleted: "
            f"`dtrain ckpt ls {storage.url}` shows them."
        )
    kept, doomed = divide(found, args.keep, _prized(storage, found))
    deletion = plan_deletion(storage, kept, doomed)
    if not args.dry_run:
        carry_out(storage, deletion)
    _report(deletion, len(kept), dry_run=args.dry_run, as_json=args.json)
    return exits.DONE


def _prized(storage: Storage, found: Sequence[Surveyed]) -> frozenset[str]:
    """The directories of those that the run keeps for being the best."""
    ranking = rank([one.info for one in found], Scores(storage))
    return ranking.best if ranking.rule.keep else frozenset()


def divide(
    found: Sequence[Surveyed], keep: int, prized: frozenset[str] = frozenset()
) -> tuple[list[CheckpointInfo], list[CheckpointInfo]]:
    """(kept, doomed). Live ones that are known to be damaged are kept but not counted, as long as they are newer than
    the oldest that is: a person who looks at one now still finds it, and `keep` whole ones remain.
    `prized`: directories of those that stay in any case."""
    live = [one for one in found if one.info.live]
    whole = [one.info.step for one in live if not one.damages]
    oldest = whole[-keep:][0] if whole else 0
    kept = [one.info for one in live if one.info.step >= oldest or one.info.dir in prized]
    return kept, [one.info for one in found if one.info not in kept]


def _report(deletion: Deletion, num_kept: int, *, dry_run: bool, as_json: bool) -> None:
    if as_json:
        gone = [{"step": info.step, "attempt": info.attempt, "live": info.live} for info in deletion.checkpoints]
        print(json.dumps({"deleted": gone, "files": [file.key for file in deletion.files],
                          "bytes": deletion.size_bytes, "kept": num_kept, "dry_run": dry_run}))  # fmt: skip
        return
    would = "would go" if dry_run else "gone"
    for info in deletion.checkpoints:
        print(f"{would}: step {info.step} of attempt {info.attempt}{'' if info.live else ' (dead)'}")
    print(
        f"{plural(len(deletion.checkpoints), 'checkpoint')} and {plural(len(deletion.files), 'file')}, "
        f"{size(deletion.size_bytes)}, {would}; {plural(num_kept, 'checkpoint')} kept."
    )
