"""What a worker says, before it reaches a log or a record: without the values of named secrets, and in records with the
places where the user's files really are instead of those of the job's copy."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

_MIN_CHARS = 6  # anything shorter is no secret, and would tear holes into ordinary text


@dataclass(frozen=True, slots=True, kw_only=True)
class Redactor:
    line: Callable[[bytes], bytes]
    record: Callable[[Any], Any]  # of a worker's report: every text in it, at any depth


def redactor(secrets: Mapping[str, str], places: Mapping[str, str] | None = None) -> Redactor:
    """Each value of `secrets` (name -> value) becomes `[NAME]`, also as a part of a URL. A value of several lines, like
    a key, goes line by line, as logs do. `places`: folder -> what a person calls it."""
    known = {
        form: f"[{name}]"
        for name, value in secrets.items()
        for line in sorted(value.splitlines(), key=len, reverse=True)
        if len(line.strip()) >= _MIN_CHARS
        for form in (line, quote(line, safe="", errors="surrogateescape"))
    }
    told = {**{f"{folder}/": f"{place}/" for folder, place in (places or {}).items()}, **known}
    pattern = _any_of(told)
    raw_pattern = re.compile(_any_of(known).pattern.encode(errors="surrogateescape"))
    raw = {text.encode(errors="surrogateescape"): mark.encode() for text, mark in known.items()}

    def clean(value: Any) -> Any:
        if isinstance(value, str):
            return pattern.sub(lambda found: told[found[0]], value)
        if isinstance(value, list):
            return [clean(item) for item in value]
        return {clean(key): clean(item) for key, item in value.items()} if isinstance(value, dict) else value

    return Redactor(
        line=(lambda line: raw_pattern.sub(lambda found: raw[found[0]], line)) if raw else bytes,
        record=clean if told else lambda record: record,
    )


def _any_of(texts: Iterable[str]) -> re.Pattern[str]:
    """Longer ones first: one may begin with another."""
    return re.compile("|".join(re.escape(text) for text in sorted(texts, key=len, reverse=True)))
