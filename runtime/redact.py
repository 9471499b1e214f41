"""Takes the values of named secrets out of what a worker says, before it reaches a log or a record."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

_MIN_CHARS = 6  # anything shorter is no secret, and would tear holes into ordinary text


@dataclass(frozen=True, slots=True, kw_only=True)
class Redactor:
    line: Callable[[bytes], bytes]
    record: Callable[[dict[str, Any]], dict[str, Any]]  # of a worker's report, at any depth


def redactor(names: Sequence[str], environ: Mapping[str, str]) -> Redactor:
    """Each value becomes `[NAME]`. A value of several lines, like a key, goes line by line, as logs do."""
    known = {
        line: f"[{name}]"
        for name in names
        for line in sorted(environ.get(name, "").splitlines(), key=len, reverse=True)
        if len(line.strip()) >= _MIN_CHARS
    }
    if not known:
        return Redactor(line=bytes, record=lambda record: record)
    pattern = re.compile("|".join(re.escape(text) for text in sorted(known, key=len, reverse=True)))
    raw = re.compile(pattern.pattern.encode(errors="surrogateescape"))
    marks = {text.encode(errors="surrogateescape"): mark.encode() for text, mark in known.items()}

    def clean(value: Any) -> Any:
        if isinstance(value, str):
            return pattern.sub(lambda found: known[found[0]], value)
        if isinstance(value, list):
            return [clean(item) for item in value]
        return {clean(key): clean(item) for key, item in value.items()} if isinstance(value, dict) else value

    return Redactor(line=lambda line: raw.sub(lambda found: marks[found[0]], line), record=clean)
