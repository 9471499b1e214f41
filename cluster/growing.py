"""Files of a run directory that grow, carried to an object store in parts and joined again from them.

Nothing is lost or doubled by a process that dies anywhere: which bytes a part has follows from its number alone, and
what was taken is known with the size that the joined file then had.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from dtrain.cluster.atomic import append_line, replace_file
from dtrain.cluster.errors import AlreadyExists
from dtrain.cluster.remote import PART_BYTES, generations, kind_of, part_key
from dtrain.cluster.storage import ObjectInfo, Storage

Known = dict[str, Any]  # name -> what is known of it, as JSON


class Outgoing:
    """`known`: name -> {"generation", "file": its inode, "size": how much of it was sent, "claimed"}. `came`: that of
    Incoming, whose files are not sent back."""

    def __init__(self, store: Storage, top: Path, known: Known, came: Known, save: Callable[[], None]) -> None:
        self._store = store
        self._top = top
        self._known = known
        self._came = came
        self._save = save

    def send(self, name: str) -> None:
        """What was added to the file since the last time; all of it, where another has taken its place."""
        with contextlib.suppress(FileNotFoundError), open(self._top / name, "rb") as file:
            status = os.fstat(file.fileno())
            if status.st_size == 0 or self._came.get(name, {}).get("file") == status.st_ino:
                return
            own = self._known.get(name)
            if own is None or own["file"] != status.st_ino or status.st_size < own["size"]:
                own = self._known[name] = {"generation": 0, "file": status.st_ino, "size": 0, "claimed": False}
            if not own["claimed"]:
                self._claim(name, own, file.read(PART_BYTES))
            for number in range(own["size"] // PART_BYTES, -(-status.st_size // PART_BYTES)):
                file.seek(number * PART_BYTES)
                data = file.read(min(PART_BYTES, status.st_size - number * PART_BYTES))
                self._store.upload(part_key(name, own["generation"], number), [memoryview(data)], len(data))
            own["size"] = status.st_size

    def has_newest(self, name: str, infos: Iterable[ObjectInfo]) -> bool:
        """Whether the newest generation of `infos`, a listing, was sent from here; or there is none."""
        newest = max(generations(info.key for info in infos).get(name, {0: 0}))
        return newest == 0 or newest == self._known.get(name, {"generation": -1})["generation"]

    def _claim(self, name: str, own: Known, first: bytes) -> None:
        """Takes the next generation by its first part. One that an earlier process was about to take may be taken."""
        before = own["generation"]
        number = before or newest_generation(self._store, name) + 1
        while True:
            own["generation"] = number
            self._save()
            try:
                self._store.put_if_absent(part_key(name, number, 0), first)
                break
            except AlreadyExists:
                if number == before and first.startswith(self._store.get(part_key(name, number, 0))):
                    break
                number += 1
        own["claimed"] = True
        self._save()


def newest_generation(store: Storage, name: str) -> int:
    """0 where there is none."""
    found = generations(info.key for info in store.list(f"{name}/"))
    return max(found.get(name, {0: 0}))


class Incoming:
    """`known`: name -> {"taken": generation -> bytes of it that are in the file, "size": the file's, "file": its
    inode}. Of a file of which only the newest generation counts, "taken" has that one."""

    def __init__(self, store: Storage, top: Path, known: Known) -> None:
        self._store = store
        self._top = top
        self._known = known

    def take(self, infos: Iterable[ObjectInfo]) -> None:
        """Adds what `infos`, a listing, has beyond what was taken."""
        listed = list(infos)
        sizes = {info.key: info.size_bytes for info in listed}
        for name, counts in generations(sizes).items():
            totals = {
                generation: (count - 1) * PART_BYTES + sizes.get(part_key(name, generation, count - 1), 0)
                for generation, count in counts.items()
            }
            if kind_of(name) == "joined":
                self._join(name, totals)
            else:
                self._follow(name, max(totals), totals[max(totals)])

    def _follow(self, name: str, generation: int, total: int) -> None:
        path, known = self._top / name, self._checked(name)
        taken = known["taken"].get(str(generation))
        if taken is not None and taken >= total:
            return
        data = self._bytes(name, generation, taken or 0, total)
        if taken is None:
            path.parent.mkdir(parents=True, exist_ok=True)
            replace_file(path, data)
            known["taken"] = {}
        else:
            _append(path, data)
        known["taken"][str(generation)] = (taken or 0) + len(data)
        self._measure(known, path)

    def _join(self, name: str, totals: dict[int, int]) -> None:
        """Whole lines only; those of several writers by time, where they tell it."""
        path, known = self._top / name, self._checked(name)
        lines: list[bytes] = []
        for generation, total in sorted(totals.items()):
            taken = known["taken"].get(str(generation), 0)
            if taken < total:
                data = self._bytes(name, generation, taken, total)
                whole = data[: data.rfind(b"\n") + 1]
                lines += whole.splitlines(keepends=True)
                known["taken"][str(generation)] = taken + len(whole)
        if lines:
            path.parent.mkdir(parents=True, exist_ok=True)
            if name.endswith(".jsonl"):
                lines.sort(key=_time)
            _append(path, b"".join(lines))
            self._measure(known, path)

    def add(self, name: str, line: bytes) -> None:
        """One line of this process's own, as a generation of its own."""
        path = self._top / name
        self._checked(name)
        number = newest_generation(self._store, name) + 1
        while True:
            with contextlib.suppress(AlreadyExists):
                self._store.put_if_absent(part_key(name, number, 0), line)
                break
            number += 1
        append_line(path, line)
        self._known[name]["taken"][str(number)] = len(line)
        self._measure(self._known[name], path)

    def _checked(self, name: str) -> Known:
        """What is known, with the file brought to the size that it tells: a process may have died in between."""
        known: Known = self._known.setdefault(name, {"taken": {}, "size": 0, "file": 0})
        path = self._top / name
        size = path.stat().st_size if path.exists() else 0
        if size > known["size"] and known["taken"]:
            os.truncate(path, known["size"])
        elif size < known["size"] or size > known["size"]:
            known.update(taken={}, size=0, file=0)
            path.unlink(missing_ok=True)
        return known

    def _measure(self, known: Known, path: Path) -> None:
        status = path.stat()
        known.update(size=status.st_size, file=status.st_ino)

    def _bytes(self, name: str, generation: int, start: int, end: int) -> bytes:
        """From `start` on, at least to `end`: the last part may have grown meanwhile."""
        numbers = range(start // PART_BYTES, -(-end // PART_BYTES))
        data = b"".join(self._store.get(part_key(name, generation, number)) for number in numbers)
        return data[start % PART_BYTES :]


def _append(path: Path, data: bytes) -> None:
    with open(path, "ab") as file:
        file.write(data)


def _time(line: bytes) -> float:
    try:
        return float(json.loads(line)["time"])
    except (ValueError, KeyError, TypeError):
        return 0.0
