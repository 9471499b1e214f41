"""Deleting what is no longer needed, so that a crash at any point leaves every remaining checkpoint loadable: a
manifest goes before the files that only it names, and a file only when no committed manifest names it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dtrain.cluster.errors import CorruptCheckpoint
from dtrain.cluster.storage import ObjectInfo, Storage
from dtrain.runtime.checkpoint import names
from dtrain.runtime.checkpoint.attempts import CheckpointInfo, check_fence, live_checkpoints, newest_attempt
from dtrain.runtime.checkpoint.read import read_manifest
from dtrain.runtime.checkpoint.scores import BestRule, Scores, best_of

LEASE_S = 3600.0  # a file younger than this may belong to a save that is still going on


@dataclass(frozen=True, slots=True, kw_only=True)
class Deletion:
    """What is to go: first these checkpoints' manifests, in this order, then the files."""

    checkpoints: tuple[CheckpointInfo, ...]
    files: tuple[ObjectInfo, ...]  # manifests not among them
    expired_before: float  # uncommitted uploads older than this go too; seconds since the epoch, by the store's clock

    @property
    def size_bytes(self) -> int:
        return sum(file.size_bytes for file in self.files)


def apply_retention(
    storage: Storage,
    *,
    keep: int,
    best: BestRule | None = None,
    scores: Scores | None = None,
    attempt: int | None = None,
    lease_s: float = LEASE_S,
) -> Deletion:
    """Keeps the newest `keep` live checkpoints, and those that are the best by the rule `best`. `scores`: what is known
    of them already. `attempt`: who asks; raises FencedError where a newer one has begun."""
    infos = live_checkpoints(storage)
    prized = best_of(infos, scores or Scores(storage), best)[: best.keep] if best and best.keep else ()
    kept, doomed = _divide(infos, keep, prized)
    deletion = plan_deletion(storage, kept, doomed, lease_s=lease_s)
    if attempt is not None:
        check_fence(storage, attempt)
    carry_out(storage, deletion)
    return deletion


def plan_deletion(
    storage: Storage, kept: Sequence[CheckpointInfo], doomed: Sequence[CheckpointInfo], *, lease_s: float = LEASE_S
) -> Deletion:
    """`kept` and `doomed`, the one to go first in front, are all that is committed. Deletes nothing."""
    named = named_keys(storage, kept)
    objects = list(storage.list("step-"))
    # By the store's clock: the newest object, as a rule our own commit, was written about now.
    expired_before = max((info.modified_at for info in objects), default=0.0) - lease_s
    emptied = {info.dir for info in doomed}
    newest = newest_attempt(storage)
    files = [info for info in objects if info.key not in named and _is_garbage(info, emptied, newest, expired_before)]
    return Deletion(checkpoints=tuple(doomed), files=tuple(files), expired_before=expired_before)


def carry_out(storage: Storage, deletion: Deletion) -> None:
    for info in deletion.checkpoints:
        storage.delete(names.manifest_key(info.dir))
    storage.delete(*[file.key for file in deletion.files])
    storage.discard_uploads("", deletion.expired_before)


def _divide(
    infos: Sequence[CheckpointInfo], keep: int, prized: Sequence[CheckpointInfo]
) -> tuple[list[CheckpointInfo], list[CheckpointInfo]]:
    """(kept, doomed), the oldest doomed one first. With nothing live all is kept: then the line is not understood."""
    live = [info for info in infos if info.live]
    kept = [info for info in live if info in live[-keep:] or info in prized] if live else list(infos)
    return kept, [info for info in infos if info not in kept]


def named_keys(storage: Storage, kept: Sequence[CheckpointInfo]) -> set[str]:
    """What the kept checkpoints need. A damaged one can't say: its own directory is left as it is."""
    keys = set()
    for info in kept:
        keys |= {names.manifest_key(info.dir), names.score_key(info.dir)}
        try:
            manifest = read_manifest(storage, info.step, info.attempt)
        except CorruptCheckpoint:
            keys |= {found.key for found in storage.list(f"{info.dir}/")}
            continue
        for file in manifest.files:
            keys |= {manifest.key(file, file.name), manifest.key(file, file.index)}
    return keys


def _is_garbage(info: ObjectInfo, emptied: set[str], newest: int, expired_before: float) -> bool:
    """For a file that no kept manifest names: whether nobody can still be writing it."""
    directory, _, name = info.key.partition("/")
    place = names.parse_step_dir(directory)
    if place is None or name == names.MANIFEST:  # not ours; or a commit since we looked
        return False
    return directory in emptied or (place[1] < newest and info.modified_at < expired_before)
