"""Machines as Open MPI and DeepSpeed list them: one a line, `slots=N` behind it where it is to have so many processes.

node1 slots=8
me@node2 slots=8   # a comment
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

# What ssh takes for a machine: never a word that begins with a dash, which would be an option.
_HOST = re.compile(r"(?:[^\s@,;'\"`$\\-][^\s@,;'\"`$\\]*@)?[A-Za-z0-9\[_:][A-Za-z0-9._:%\]-]*")
_SETTING = re.compile(r"(slots|max_slots|max-slots)=(\d+)")


@dataclass(frozen=True, slots=True, kw_only=True)
class Host:
    name: str  # as ssh takes it: perhaps user@name, or what the user's ssh configuration calls it
    slots: int | None = None  # processes that it is to have; None: nobody said


def parse_hosts(lines: Iterable[str], place: str) -> list[Host]:
    """In their order; a machine that is listed again has the slots of all its lines. Raises ValueError with the line,
    called `place` and its number."""
    found: dict[str, Host] = {}
    for number, line in enumerate(lines, start=1):
        words = line.partition("#")[0].split()
        if not words:
            continue
        host = _read(words, f"{place}:{number}")
        before = found.get(host.name)
        found[host.name] = host if before is None else replace(host, slots=(before.slots or 1) + (host.slots or 1))
    return list(found.values())


def _read(words: Sequence[str], place: str) -> Host:
    name, slots = words[0], None
    if not _HOST.fullmatch(name):
        raise ValueError(f'{place}: "{name}" is no name of a machine. Write node1, or user@node1.')
    for word in words[1:]:
        setting = _SETTING.fullmatch(word)
        if setting is None:
            raise ValueError(f'{place}: expects slots=N behind a machine, found "{word}".')
        if setting[1] == "slots":
            slots = int(setting[2])
    if slots == 0:
        raise ValueError(f"{place}: slots=0 leaves {name} without a process. Take the line out.")
    return Host(name=name, slots=slots)
