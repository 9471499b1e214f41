"""Whether a store can hold checkpoints, tried for real on objects of its own that are gone afterwards."""

from __future__ import annotations

import contextlib
import os
import secrets
import time
from collections.abc import Iterator
from pathlib import Path

from dtrain.cluster.errors import AlreadyExists, DtrainError
from dtrain.cluster.filestore import FileStorage
from dtrain.cluster.storage import IMPATIENT_RETRY_S, Storage, open_storage
from dtrain.launcher.doctor.finding import Finding, ok, problem, warn

TOPIC = "storage"
PROBE_BYTES = 8 << 20  # enough for a multipart upload, quick on any link
_TIMEOUT_S = 15.0
_MAX_SKEW_S = 60.0  # leases of checkpoints are minutes


def examine(url: str) -> Iterator[Finding]:
    """One finding a right, up to the first that is refused: the rest would be refused as well."""
    probe = f"doctor-{secrets.token_hex(4)}"
    try:
        storage = open_storage(url, retry_s=IMPATIENT_RETRY_S)
        made = _missing_folders(storage)
        storage.check_writable(_TIMEOUT_S)
    except (DtrainError, OSError) as error:
        yield problem(TOPIC, url, str(error), "The run needs to put, read, list and delete objects there.")
        return
    try:
        for check in (_small_object, _second_put, _large_object, _range, _listing):
            yield check(storage, probe)
    except (DtrainError, OSError) as error:
        yield problem(TOPIC, storage.url, str(error), "The run needs to put, read, list and delete objects there.")
    finally:
        for key in (f"{probe}/small", f"{probe}/large"):
            with contextlib.suppress(DtrainError, OSError):
                storage.delete(key)
    yield from _deleted(storage, probe)
    for folder in made:
        with contextlib.suppress(OSError):
            folder.rmdir()


def _missing_folders(storage: Storage) -> list[Path]:
    """Those that a first file below a local directory makes, innermost first."""
    if not isinstance(storage, FileStorage):
        return []
    return [folder for folder in (storage.root, *storage.root.parents) if not folder.exists()]


def _small_object(storage: Storage, probe: str) -> Finding:
    began = time.monotonic()
    storage.put_if_absent(f"{probe}/small", b"dtrain doctor")
    return ok(TOPIC, storage.url, f"a small object is put in {1e3 * (time.monotonic() - began):.0f} ms")


def _second_put(storage: Storage, probe: str) -> Finding:
    """Commits rest on this: of two writers of one name, one must be told."""
    try:
        storage.put_if_absent(f"{probe}/small", b"somebody else")
    except AlreadyExists:
        return ok(TOPIC, storage.url, "a name that is taken is not written again")
    advice = "Two attempts could both commit. Use another store for checkpoints, and report this one."
    return problem(TOPIC, storage.url, "a name that was taken was written again", advice)


def _large_object(storage: Storage, probe: str) -> Finding:
    data = memoryview(os.urandom(PROBE_BYTES))
    began = time.monotonic()
    storage.upload(f"{probe}/large", [data], len(data))
    return ok(TOPIC, storage.url, f"uploads at {_rate(began)}")


def _range(storage: Storage, probe: str) -> Finding:
    target = bytearray(PROBE_BYTES // 2)
    began = time.monotonic()
    storage.read_into(f"{probe}/large", PROBE_BYTES // 4, memoryview(target))
    return ok(TOPIC, storage.url, f"reads a range at {_rate(began, PROBE_BYTES // 2)}")


def _listing(storage: Storage, probe: str) -> Finding:
    found = {info.key: info for info in storage.list(f"{probe}/")}
    if set(found) != {f"{probe}/small", f"{probe}/large"}:
        advice = "Listings must show what was written at once: use a store with strong consistency."
        return problem(TOPIC, storage.url, f"lists {sorted(found)} where two objects were put", advice)
    skew = found[f"{probe}/large"].modified_at - time.time()
    if abs(skew) > _MAX_SKEW_S:
        advice = "Ages of files are told wrongly by that much: set this machine's clock (NTP)."
        return warn(TOPIC, storage.url, f"its clock is {skew:+.0f} s from this machine's", advice)
    return ok(TOPIC, storage.url, f"lists what was put; its clock is {skew:+.1f} s from this machine's")


def _deleted(storage: Storage, probe: str) -> Iterator[Finding]:
    with contextlib.suppress(DtrainError, OSError):
        left = [info.key for info in storage.list(f"{probe}/")]
        if left:
            advice = f"Old checkpoints could not be removed. Allow deletion, and delete {', '.join(left)} by hand."
            yield problem(TOPIC, storage.url, "objects can't be deleted", advice)


def _rate(began: float, size: int = PROBE_BYTES) -> str:
    return f"{size / 2**20 / max(1e-6, time.monotonic() - began):.0f} MiB/s"
