"""Numbers and names as evidence for a person. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from dtrain.runtime.verify.records import Part

SHOWN = 6


def how_many(parted: Mapping[str, float], total: int, first: str) -> str:
    rest = f"; {len(parted)} of {total} tensors differ" if len(parted) > 1 else f"; the only one of {total}"
    return f"{first} differs by {parted[first]:.3g}, relative{rest}"


def sizes(parts: Sequence[Part]) -> str:
    return some([len(part.indices) for part in parts])


def some(values: Sequence[object]) -> str:
    shown = ", ".join(f"{v:g}" if isinstance(v, float) else str(v) for v in values[: 2 * SHOWN])
    return (shown or "none") + (", ..." if len(values) > 2 * SHOWN else "")


def close(a: float | None, b: float | None, tolerance: float) -> bool:
    return a is not None and b is not None and abs(a - b) <= tolerance * max(1.0, abs(b))
