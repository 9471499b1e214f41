"""Garbage: files that no committed checkpoint names, left behind by writers that were killed. Finding them deletes
nothing; whether their run is over, and how old is old, is the caller's to say."""

from __future__ import annotations

import uuid
from dataclasses import dataclass

from dtrain.cluster.storage import ObjectInfo, Storage
from dtrain.runtime.checkpoint import names
from dtrain.runtime.checkpoint.attempts import live_checkpoints
from dtrain.runtime.checkpoint.retention import named_keys

_PROBE = "clock-probe"


@dataclass(frozen=True, slots=True, kw_only=True)
class Garbage:
    """`spared`: as unnamed, but too young, or of an attempt that may be alive."""

    files: tuple[ObjectInfo, ...]
    spared: tuple[ObjectInfo, ...]

    @property
    def size_bytes(self) -> int:
        return sum(file.size_bytes for file in self.files)


def find_garbage(storage: Storage, *, before: float, last_attempt: int) -> Garbage:
    """Files last written before `before` (seconds since the epoch, by the store's clock) by attempts up to
    `last_attempt`. A save that is going on has files that no manifest names yet: leave its attempt out."""
    # In this order: what is committed after the listing is named, and a file that comes later is not listed.
    objects = [(info, attempt) for info in storage.list("step-") if (attempt := _attempt_of(info)) is not None]
    named = named_keys(storage, live_checkpoints(storage))
    files: list[ObjectInfo] = []
    spared: list[ObjectInfo] = []
    for info, attempt in objects:
        if info.key not in named:
            (files if info.modified_at < before and attempt <= last_attempt else spared).append(info)
    return Garbage(files=tuple(files), spared=tuple(spared))


def store_time(storage: Storage) -> float:
    """Seconds since the epoch by the store's clock: that of an object put for it, and deleted again."""
    key = f"{_PROBE}/{uuid.uuid4().hex}"
    storage.put_if_absent(key, b"dtrain looks at the clock")
    try:
        return next(info.modified_at for info in storage.list(key))
    finally:
        storage.delete(key)


def _attempt_of(info: ObjectInfo) -> int | None:
    """None for what is not a file of a checkpoint."""
    directory, _, name = info.key.partition("/")
    place = names.parse_step_dir(directory)
    return None if place is None or name == names.MANIFEST else place[1]
