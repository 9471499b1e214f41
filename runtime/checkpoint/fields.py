"""JSON from a store, taken apart with suspicion: whatever the bytes are, only CheckpointError comes out."""

from __future__ import annotations

import json
from typing import Any

from dtrain.cluster.errors import CheckpointError

MAX_DIMS = 64
MAX_INT = 2**63 - 1


def parse_object(raw: bytes, what: str) -> dict[str, Any]:
    """`what` names the file in messages."""
    try:
        data = json.loads(raw, parse_constant=_refuse, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{what} is not valid JSON: {error}") from error
    if not isinstance(data, dict):
        raise CheckpointError(f"{what}: expected an object, found {type(data).__name__}")
    return data


def _refuse(constant: str) -> Any:
    raise ValueError(f"{constant} is not JSON")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    data = dict(pairs)
    if len(data) != len(pairs):
        raise ValueError("the same key twice")
    return data


def get(data: dict[str, Any], key: str, what: str) -> Any:
    if key not in data:
        raise CheckpointError(f"{what}: no field {key!r}")
    return data[key]


def integer(value: Any, what: str, least: int = 0) -> int:
    if type(value) is not int or not least <= value <= MAX_INT:
        raise CheckpointError(f"{what}: expected a whole number from {least} on, found {_show(value)}")
    return value


def number(value: Any, what: str) -> float:
    if type(value) not in (int, float):
        raise CheckpointError(f"{what}: expected a number, found {_show(value)}")
    try:
        return float(value)
    except OverflowError as error:
        raise CheckpointError(f"{what}: the number is too large") from error


def text(value: Any, what: str) -> str:
    if not isinstance(value, str) or "\0" in value:
        raise CheckpointError(f"{what}: expected a string, found {_show(value)}")
    return value


def mapping(value: Any, what: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise CheckpointError(f"{what}: expected an object, found {_show(value)}")
    return value


def items(value: Any, what: str, length: int | None = None) -> list[Any]:
    if not isinstance(value, list) or (length is not None and len(value) != length):
        wanted = "a list" if length is None else f"a list of {length}"
        raise CheckpointError(f"{what}: expected {wanted}, found {_show(value)}")
    return value


def integers(value: Any, what: str, *, least: int = 0, length: int | None = None) -> tuple[int, ...]:
    """A list with one whole number a dim."""
    listed = items(value, what, length)
    if len(listed) > MAX_DIMS:
        raise CheckpointError(f"{what}: {len(listed)} dims, more than {MAX_DIMS}")
    return tuple(integer(item, what, least) for item in listed)


def hex_digits(value: Any, what: str, *, length: int) -> str:
    digits = text(value, what)
    if len(digits) != length or not set(digits) <= set("0123456789abcdef"):
        raise CheckpointError(f"{what}: expected {length} hex digits, found {_show(value)}")
    return digits


def _show(value: Any) -> str:
    words = repr(value)
    return words if len(words) <= 60 else f"{words[:57]}..."
