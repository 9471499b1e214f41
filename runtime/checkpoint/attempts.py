"""Attempts: who may write next, from which checkpoint it goes on, and which checkpoints are live.

Each attempt's record names the checkpoint that it went on from. The newest attempt's line of parents decides what is
live: all its own checkpoints, those of its parent up to the step it went on from, and so on. What an old attempt
commits after it was replaced lies beyond that step and is never loaded.
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from dtrain.cluster.errors import AlreadyExists, CheckpointError, FencedError
from dtrain.cluster.storage import Storage
from dtrain.runtime.checkpoint import fields, names

NUM_LOOKS = 16
Parent = tuple[int, int] | None  # (step, attempt) that an attempt went on from; None: from the beginning


@dataclass(frozen=True, slots=True, kw_only=True)
class Attempt:
    """`from_step` 0 and `from_attempt` 0: it starts from the beginning."""

    number: int
    from_step: int
    from_attempt: int


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointInfo:
    """A committed checkpoint: its manifest exists. It may still be damaged, only reading tells."""

    step: int
    attempt: int
    live: bool
    dir: str
    committed_at: float  # seconds since the epoch, by the store's clock


def claim_attempt(
    storage: Storage,
    *,
    host: str,
    job_id: str,
    skip: frozenset[tuple[int, int]] = frozenset(),
    fresh_from: tuple[int, int] | None = None,
    from_nothing: bool = True,
) -> Attempt:
    """Takes the next attempt number: from here on every older attempt is fenced off.

    It goes on from the newest live checkpoint that is not in `skip`, pairs (step, attempt) that can't be loaded; or
    from `fresh_from`, a committed (step, attempt), with (0, 0) for the beginning. Where none is left it begins anew, or
    with `from_nothing` False raises CheckpointError and takes no number.
    """
    while True:
        parents, committed = _Parents(storage), _committed(storage)
        parent = _choose(parents, committed, skip) if fresh_from is None else _named(fresh_from, committed)
        if parent is None and fresh_from is None and not from_nothing:
            raise CheckpointError(_nothing_left(storage, skip))
        number = max(parents, default=0) + 1
        record = {
            "from": None if parent is None else {"step": parent[0], "attempt": parent[1]},
            "host": host,
            "job_id": job_id,
            "started_at": time.time(),
            "nonce": uuid.uuid4().hex,  # so that a store can tell this record from any other
        }
        try:
            storage.put_if_absent(names.attempt_key(number), json.dumps(record).encode())
        except AlreadyExists:
            continue
        # The attempt before this one may have committed a newer step since we looked, and deleted ours as too old.
        # Then this attempt is void (see _head) and the next one goes on from the newer step.
        if parent is None or fresh_from is not None or parent in _committed(storage):
            step, attempt = parent or (0, 0)
            return Attempt(number=number, from_step=step, from_attempt=attempt)


def live_checkpoints(storage: Storage) -> list[CheckpointInfo]:
    """Every committed checkpoint, live or not, by step and then attempt."""
    committed = _committed(storage)
    live = live_steps(_Parents(storage), committed)
    return [
        CheckpointInfo(
            step=step,
            attempt=attempt,
            live=(step, attempt) in live,
            dir=names.step_dir(step, attempt),
            committed_at=committed_at,
        )
        for (step, attempt), committed_at in sorted(committed.items())
    ]


def newest_live(infos: Iterable[CheckpointInfo]) -> CheckpointInfo | None:
    return max((info for info in infos if info.live), key=lambda info: (info.step, info.attempt), default=None)


def newest_attempt(storage: Storage) -> int:
    """0 where no attempt has begun."""
    return max(_attempt_numbers(storage), default=0)


def check_fence(storage: Storage, attempt: int) -> None:
    """Raises FencedError where an attempt newer than `attempt` has begun."""
    newest = newest_attempt(storage)
    if newest > attempt:
        raise FencedError(f"attempt {newest} has taken over this run: attempt {attempt} stops here and commits nothing")


def live_steps(parents: Mapping[int, Parent], committed: Iterable[tuple[int, int]]) -> set[tuple[int, int]]:
    """The live ones of `committed`, pairs (step, attempt). `parents` has every attempt that was begun."""
    committed = set(committed)
    steps_of: dict[int, list[int]] = {}
    for step, attempt in committed:
        steps_of.setdefault(attempt, []).append(step)
    attempt, bound = _head(parents, committed), None
    live = set()
    while attempt:
        live |= {(step, attempt) for step in steps_of.get(attempt, []) if bound is None or step <= bound}
        parent = parents.get(attempt)
        if parent is None:
            break
        bound, attempt = parent[0] if bound is None else min(bound, parent[0]), parent[1]
    return live


def _head(parents: Mapping[int, Parent], committed: set[tuple[int, int]]) -> int:
    """The newest attempt that is not void; 0 for none.

    Void is an attempt that committed nothing and whose starting point is gone: nobody can have loaded that, so the
    attempt did nothing, and the line goes on from the attempt before it.
    """
    with_commits = {attempt for _, attempt in committed}
    for attempt in sorted(parents, reverse=True):
        parent = parents[attempt]
        if attempt in with_commits or parent is None or parent in committed:
            return attempt
    return 0


def _choose(
    parents: Mapping[int, Parent], committed: Mapping[tuple[int, int], float], skip: frozenset[tuple[int, int]]
) -> Parent:
    return max(live_steps(parents, committed) - skip, default=None)


def _nothing_left(storage: Storage, skip: frozenset[tuple[int, int]]) -> str:
    damaged = ", ".join(names.step_dir(*pair) for pair in sorted(skip))
    if damaged:
        return (
            f"no checkpoint in {storage.url} can be loaded any more: {damaged} are damaged. Nothing was deleted; "
            "`dtrain ckpt verify` names the files. To begin anew: dtrain launch --fresh"
        )
    return (
        f"checkpoints of this run were committed to {storage.url}, but none is there now. Is it the right disk, and is "
        "it mounted? To begin anew: dtrain launch --fresh"
    )


def _named(wanted: tuple[int, int], committed: Mapping[tuple[int, int], float]) -> Parent:
    if wanted == (0, 0):
        return None
    if wanted not in committed:
        found = ", ".join(names.step_dir(*pair) for pair in sorted(committed)) or "none"
        raise CheckpointError(f"no committed checkpoint {names.step_dir(*wanted)}. Found: {found}.")
    return wanted


def _attempt_numbers(storage: Storage) -> list[int]:
    numbers = (names.parse_attempt_key(info.key) for info in storage.list(names.ATTEMPTS))
    return [number for number in numbers if number]


class _Parents(Mapping[int, Parent]):
    """Every attempt that was begun; a record is read when it is asked for, so that a long history costs no more than
    the line of parents."""

    def __init__(self, storage: Storage) -> None:
        self._storage = storage
        self._numbers = frozenset(_attempt_numbers(storage))
        self._read: dict[int, Parent] = {}

    def __getitem__(self, number: int) -> Parent:
        if number not in self._numbers:
            raise KeyError(number)
        if number not in self._read:
            self._read[number] = _read_parent(self._storage, number)
        return self._read[number]

    def __iter__(self) -> Iterator[int]:
        return iter(self._numbers)

    def __len__(self) -> int:
        return len(self._numbers)


def _read_parent(storage: Storage, number: int) -> Parent:
    key = names.attempt_key(number)
    data = fields.parse_object(storage.get(key), key)
    if fields.get(data, "from", key) is None:
        return None
    parent = fields.mapping(data["from"], f"{key}: from")
    step = fields.integer(fields.get(parent, "step", key), f"{key}: from.step")
    attempt = fields.integer(fields.get(parent, "attempt", key), f"{key}: from.attempt", 1)
    if attempt >= number:
        raise CheckpointError(f"{key}: attempt {number} can't have gone on from attempt {attempt}, which began later")
    return step, attempt


def _committed(storage: Storage) -> dict[tuple[int, int], float]:
    """(step, attempt) -> when it was committed. One listing, and one look at each step's manifest, several at a time:
    a store may be far away, and a step may have thousands of files."""
    pairs = [pair for pair in map(names.parse_step_dir, storage.list_dirs("")) if pair is not None]
    keys = [names.manifest_key(names.step_dir(*pair)) for pair in pairs]
    with ThreadPoolExecutor(NUM_LOOKS, thread_name_prefix="checkpoint-list") as pool:
        commits = list(pool.map(storage.stat, keys))
    return {pair: commit.modified_at for pair, commit in zip(pairs, commits, strict=True) if commit is not None}
