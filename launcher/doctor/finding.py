"""One thing that was looked at, and what came of it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

Level = Literal["ok", "warn", "problem"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """`advice` is there for what is not ok. Something to know is a warn; what will fail is a problem."""

    topic: str  # "storage", "machine", "software"
    name: str
    level: Level
    found: str
    advice: str = ""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def ok(topic: str, name: str, found: str) -> Finding:
    return Finding(topic=topic, name=name, level="ok", found=found)


def warn(topic: str, name: str, found: str, advice: str) -> Finding:
    return Finding(topic=topic, name=name, level="warn", found=found, advice=advice)


def problem(topic: str, name: str, found: str, advice: str) -> Finding:
    return Finding(topic=topic, name=name, level="problem", found=found, advice=advice)
