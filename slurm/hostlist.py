"""Slurm's short form of node names, both ways: `node[1-3,07-09],gpu-a`. Pure; `scontrol show hostnames` does the same
where there is a Slurm.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from itertools import groupby, product

_MAX_NAMES = 1 << 20  # a range that somebody mistyped must not fill the memory
_RANGE = re.compile(r"(\d+)(?:-(\d+))?")
_NUMBER = re.compile(r"(.*?)(\d*)", re.DOTALL)


def expand(text: str) -> list[str]:
    """The names in their order; "" and "(null)" are none. Several brackets in a name multiply, the last one fastest.
    Raises ValueError with what is wrong."""
    names = [name for entry in _entries(text) for name in _expand_entry(entry, text)]
    return [] if names in (["(null)"], ["None"]) else names


def _entries(text: str) -> Iterator[str]:
    """Split at the commas outside of brackets."""
    depth, start = 0, 0
    for index, character in enumerate(text):
        depth += {"[": 1, "]": -1}.get(character, 0)
        if depth not in (0, 1):
            raise ValueError(f"{text}: brackets do not match")
        if character == "," and depth == 0:
            yield from filter(None, [text[start:index].strip()])
            start = index + 1
    if depth:
        raise ValueError(f"{text}: brackets do not match")
    yield from filter(None, [text[start:].strip()])


def _expand_entry(entry: str, text: str) -> Iterator[str]:
    """`rack[0-1]node[1-2]` -> rack0node1, rack0node2, ..."""
    parts: list[list[str]] = []
    total = 1
    for index, part in enumerate(re.split(r"\[(.*?)\]", entry)):
        parts.append([part] if index % 2 == 0 else _numbers(part, text, _MAX_NAMES // total))
        total *= len(parts[-1])
        if total > _MAX_NAMES:
            raise ValueError(f"{text}: more than {_MAX_NAMES} names")
    return map("".join, product(*parts))


def _numbers(ranges: str, text: str, limit: int) -> list[str]:
    """`1-3,07` -> 1, 2, 3, 07: padded as the first of the range is."""
    found: list[str] = []
    for item in ranges.split(","):
        match = _RANGE.fullmatch(item.strip())
        if match is None:
            raise ValueError(f"{text}: [{ranges}] is no list of numbers and ranges")
        first, last = match[1], match[2] or match[1]
        count = int(last) - int(first) + 1
        if count < 1 or count + len(found) > limit:
            raise ValueError(f"{text}: {item} {'runs backwards' if count < 1 else f'is more than {_MAX_NAMES} names'}")
        found += [str(number).zfill(len(first)) for number in range(int(first), int(last) + 1)]
    return found


def compress(names: Iterable[str]) -> str:
    """The short form of all names, each once: those that differ in the number at their end share a bracket. The order
    is that of the first name of each bracket."""
    parts = [(name, *_split(name)) for name in dict.fromkeys(names)]
    padded = {(prefix, len(digits)) for _, prefix, digits in parts if digits[:1] == "0" and len(digits) > 1}
    groups: dict[tuple[str, int], list[int]] = {}
    for name, prefix, digits in parts:
        if digits:
            width = len(digits) if (prefix, len(digits)) in padded else 0
            groups.setdefault((prefix, width), []).append(int(digits))
        else:
            groups[name, -1] = []
    return ",".join(_group(prefix, width, sorted(numbers)) for (prefix, width), numbers in groups.items())


def _split(name: str) -> tuple[str, str]:
    match = _NUMBER.fullmatch(name)
    assert match is not None
    return match[1], match[2]


def _group(prefix: str, width: int, numbers: list[int]) -> str:
    if width < 0:
        return prefix
    runs = [[number for _, number in run] for _, run in groupby(enumerate(numbers), lambda pair: pair[1] - pair[0])]
    shown = [str(run[0]).zfill(width) + (f"-{str(run[-1]).zfill(width)}" if len(run) > 1 else "") for run in runs]
    return f"{prefix}{shown[0]}" if len(numbers) == 1 else f"{prefix}[{','.join(shown)}]"
