"""How a run directory looks in an object store: which file is kept how, and the names of parts. Pure.

Records are objects under their own names. A file that grows is a folder of parts, GENERATION-NUMBER: a writer takes the
next generation by put-if-absent and fills parts of PART_BYTES one after the other, replacing the last as it grows.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from typing import Literal

PART_BYTES = 256 << 10
GROWING = ("events.jsonl/", "metrics.jsonl/", "evaluations.jsonl/", "logs/")  # where parts are looked for

# record: replaced as a whole. once: the first one stays. newest: grows, and a new file takes the old one's place.
# joined: grows, by several writers, all of whose lines count. other: nobody keeps it here.
Kind = Literal["record", "once", "newest", "joined", "other"]

_ONCE = re.compile(r"control/[^/]+/(token|cancel|ended\.json|kubernetes\.json|(coordinator|stop|start|without)-\d.*)")
_JOINED = re.compile(r"events\.jsonl|logs/agent-\d+\.log")
_RECORD = re.compile(r"control/[^/]+/[^/]+|[^/]+\.(json|yaml)")
_PART = re.compile(r"(.+)/(\d{6})-(\d{6})")


def digest_of(url: str) -> str:
    """The name of the folder that stands for it on a machine."""
    return hashlib.sha256(url.rstrip("/").encode()).hexdigest()[:16]


def kind_of(name: str) -> Kind:
    """`name`: a path in the run directory, with slashes."""
    if any(part.startswith(".") for part in name.split("/")) or name.startswith(("code/", "checkpoints/")):
        return "other"
    if _ONCE.fullmatch(name):
        return "once"
    if _JOINED.fullmatch(name):
        return "joined"
    return "record" if _RECORD.fullmatch(name) else "newest"


def part_key(name: str, generation: int, number: int) -> str:
    return f"{name}/{generation:06d}-{number:06d}"


def generations(keys: Iterable[str]) -> dict[str, dict[int, int]]:
    """Name of a file that grows -> its generations, and how many parts each has."""
    found: dict[str, dict[int, int]] = {}
    for key in keys:
        if match := _PART.fullmatch(key):
            parts = found.setdefault(match[1], {})
            parts[int(match[2])] = max(parts.get(int(match[2]), 0), int(match[3]) + 1)
    return found
