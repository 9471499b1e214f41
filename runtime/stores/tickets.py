"""Put-if-absent for stores without it: who wants a key takes a ticket, and only who is alone with his may write.

Safe where a listing shows every object that was written before it began (S3 since 2020, and all that imitates it): of
two that want the same key, the one who took his ticket later sees the other's. Who sees a smaller ticket gives his own
back; so the smallest is alone at last, and writes if the key is still free.

It rests on time in one point: a ticket that is STALE_S old by the store's clock was left by a dead process and is
removed. Who holds one therefore writes only in its first FRESH_S seconds, and the store gives up on that write within
WRITE_S. Only a process that is frozen between that look at the clock and the write, for longer than the rest, could
overwrite what another has put meanwhile.
"""

from __future__ import annotations

import contextlib
import os
import random
import socket
import time
import uuid
from collections.abc import Callable, Iterable
from typing import Protocol

from dtrain.cluster.errors import AlreadyExists, StorageError
from dtrain.cluster.storage import ObjectInfo

FOLDER = ".tickets"
STALE_S = 60.0
FRESH_S = 10.0
WRITE_S = 30.0
GIVE_UP_S = 600.0


class Plain(Protocol):
    """A store's plain operations, on any key."""

    def put(self, key: str, data: bytes) -> None:
        """Overwrites; gives up within WRITE_S seconds."""

    def get(self, key: str) -> bytes | None: ...

    def remove(self, key: str) -> None: ...

    def listing(self, directory: str) -> Iterable[ObjectInfo]:
        """Everything directly in `directory`."""


def put_if_absent(store: Plain, key: str, data: bytes, *, sleep: Callable[[float], None] = time.sleep) -> None:
    """Raises AlreadyExists where the key holds other bytes, StorageError where no turn came within GIVE_UP_S."""
    give_up = time.monotonic() + GIVE_UP_S
    pause = 0.02
    while time.monotonic() < give_up:
        if _is_there(store, key, data):
            return
        if _try(store, key, data, sleep):
            return
        sleep(random.uniform(0, pause))
        pause = min(2 * pause, 2.0)
    raise StorageError(f"can't write {key}: others want the same name, and for {GIVE_UP_S:.0f} s none of us got a turn")


def _is_there(store: Plain, key: str, data: bytes) -> bool:
    """True for our own bytes. Raises AlreadyExists for others."""
    found = store.get(key)
    if found is None:
        return False
    if found != data:
        raise AlreadyExists(f"{key} exists already")
    return True


def _try(store: Plain, key: str, data: bytes, sleep: Callable[[float], None]) -> bool:
    """One ticket: whether it came to its turn, and the key holds `data` now."""
    folder = f"{FOLDER}/{key}"
    mine = f"{folder}/{uuid.uuid4().hex}"
    fresh_until = time.monotonic() + FRESH_S
    store.put(mine, f"{socket.gethostname()} {os.getpid()}".encode())
    try:
        turn = _await_turn(store, folder, mine, fresh_until, sleep)
        done = turn and _is_there(store, key, data)
    except BaseException:
        _give_back(store, mine)
        raise
    if turn and not done and time.monotonic() < fresh_until:
        # Should this fail, the ticket stays until it is stale: the bytes may still be on their way.
        store.put(key, data)
        if store.get(key) != data:
            raise StorageError(f"can't write {key}: it does not hold what was written, another process writes it too")
        done = True
    _give_back(store, mine)
    return done


def _await_turn(store: Plain, folder: str, mine: str, until: float, sleep: Callable[[float], None]) -> bool:
    while time.monotonic() < until:
        others = _others(store, folder, mine)
        if not others:
            return True
        if min(others) < mine:
            return False
        sleep(random.uniform(0.01, 0.05))
    return False


def _others(store: Plain, folder: str, mine: str) -> list[str]:
    """The tickets of living others. Removes stale ones."""
    tickets = {info.key: info.modified_at for info in store.listing(folder)}
    if mine not in tickets:
        raise StorageError(
            f"can't write {folder.removeprefix(FOLDER)[1:]}: this store can't create an object only if it is absent, "
            "and its listing does not show what was just written. No run is safe there: choose another store"
        )
    now = tickets.pop(mine)
    stale = [key for key, taken_at in tickets.items() if now - taken_at > STALE_S]
    for key in stale:
        store.remove(key)
    return [key for key in tickets if key not in stale]


def _give_back(store: Plain, ticket: str) -> None:
    with contextlib.suppress(StorageError):  # then it grows stale
        store.remove(ticket)
