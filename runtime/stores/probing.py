"""Whether a store can be written to, tried before anything starts, within a time that a person will wait."""

from __future__ import annotations

import re
import threading
import uuid
from typing import Protocol

from dtrain.cluster.errors import DtrainError, StorageError, UsageError

FOLDER = ".probe"
PROBE = b"dtrain was here\n"
_KEY = re.compile(rf"{re.escape(FOLDER)}/[0-9a-f]{{32}}")


class Probed(Protocol):
    def put(self, key: str, data: bytes) -> None: ...

    def get(self, key: str) -> bytes | None: ...

    def remove(self, key: str) -> None: ...


def new_probe_key() -> str:
    return f"{FOLDER}/{uuid.uuid4().hex}"


def check_writable(store: Probed, url: str, timeout_s: float) -> None:
    """Writes, reads and deletes a small object. Raises UsageError, after `timeout_s` seconds at the latest."""
    errors: list[BaseException] = []

    def probe() -> None:
        try:
            _probe(store, url)
        except BaseException as error:
            errors.append(error)

    # Looking up a name or the machine's role may hang for longer than any limit of ours.
    thread = threading.Thread(target=probe, name="storage-probe", daemon=True)
    thread.start()
    thread.join(timeout_s)
    if thread.is_alive():
        raise UsageError(f"{url} does not answer within {timeout_s:.0f} s. Is it up, and may this machine reach it?")
    if errors:
        error = errors[0]
        if isinstance(error, DtrainError):
            raise UsageError(_KEY.sub("a small object", str(error))) from error
        raise error


def _probe(store: Probed, url: str) -> None:
    key = new_probe_key()
    store.put(key, PROBE)
    found = store.get(key)
    store.remove(key)
    if found != PROBE:
        raise StorageError(f"{url} does not give back what was written to it, but {found!r}. Choose another store.")
