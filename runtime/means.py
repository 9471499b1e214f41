"""Exact means over a whole data set that is spread over ranks: sums and counts by name, met at the end.

What a user's `metrics` callable may return is checked here, with words.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from dtrain.cluster.errors import UsageError

RESERVED = frozenset({"loss", "step", "attempt", "time", "nonfinite"})  # of the records that metrics go into
_CHECKSUM_BITS = 20  # a sum of squares over 8,192 ranks is exact in float64

AllReduce = Callable[[list[float]], list[float]]


class Means:
    """This rank's part. Every micro-batch brings the same names."""

    def __init__(self) -> None:
        self._sums: dict[str, list[float]] | None = None  # name -> [sum, count]

    def add(self, found: Mapping[str, tuple[float, float]], *, counts: bool) -> None:
        """`found`: name -> (sum, count). `counts` False: of a micro-batch that only joins in, which tells the names.
        Raises UsageError for other names than before."""
        if self._sums is None:
            self._sums = {name: [0.0, 0.0] for name in sorted(found)}
        if self._sums.keys() != found.keys():
            names, before = ", ".join(sorted(found)), ", ".join(self._sums)
            raise UsageError(f"metrics: found {names}, but on the batches before {before}. {_ALIKE}")
        for name, (total, count) in found.items():
            if counts and count:
                self._sums[name][0] += total
                self._sums[name][1] += count

    def reduce(self, all_reduce: AllReduce) -> dict[str, tuple[float, float]]:
        """name -> (sum, count) over all ranks, "loss" first, the same bits on every rank. Collective; every rank has
        seen a micro-batch. Raises UsageError on every rank where the names differ between ranks."""
        mine = self._sums or {}
        _check_alike(list(mine), all_reduce)
        sums = all_reduce([value for pair in mine.values() for value in pair])
        found = dict(zip(mine, zip(sums[::2], sums[1::2], strict=True), strict=True))
        return {name: found[name] for name in sorted(found, key=lambda name: (name != "loss", name))}


def _check_alike(names: list[str], all_reduce: AllReduce) -> None:
    checksum = zlib.crc32("\0".join(names).encode()) % (1 << _CHECKSUM_BITS)
    found = all_reduce([1.0, float(checksum), float(checksum**2)])
    ranks, total, squares = (int(value) for value in found)
    if ranks * squares != total * total:  # equal if and only if all the numbers are
        raise UsageError(f"metrics: the ranks found different names, this one {', '.join(names)}. {_ALIKE}")


_ALIKE = "Return the same names for every batch; (value, 0) where a batch has nothing to say about one"


def sums_of(found: Any, count: float) -> dict[str, tuple[float, float]]:
    """What `metrics` returned, as (sum, count) by name; a plain number is a mean over the batch's `count`.

    Raises UsageError for anything but a mapping of names to numbers, tensors of one element, or (sum, count)."""
    if not isinstance(found, Mapping):
        raise UsageError(f"metrics: returned {_described(found)}. Return a dict: name -> number, or (sum, count)")
    return {_checked_name(name): _sum_and_count(name, value, count) for name, value in found.items()}


def _checked_name(name: Any) -> str:
    if not isinstance(name, str) or not name.strip():
        raise UsageError(f"metrics: returned the name {name!r}. Names are text")
    if name in RESERVED:
        words = "the mean loss is reported by itself" if name == "loss" else "the records use it"
        raise UsageError(f"metrics: returned the name {name}, which is taken: {words}. Choose another")
    return name


def _sum_and_count(name: str, value: Any, count: float) -> tuple[float, float]:
    if isinstance(value, tuple) and len(value) == 2:
        return _number(name, value[0]), _number(name, value[1])
    # A mean over nothing says nothing, be it NaN.
    return (_number(name, value) * count if count else 0.0), count


def _number(name: str, value: Any) -> float:
    """Of numbers, also numpy's, and of tensors and arrays with one element."""
    try:
        if isinstance(value, Tensor):
            return float(value.detach())
        if not isinstance(value, str | bytes):
            return float(value)
    except (TypeError, ValueError, RuntimeError):
        pass
    raise UsageError(
        f"metrics: {name} is {_described(value)}. Return a number, a tensor of one element, or (sum, count)"
    )


def _described(value: Any) -> str:
    shape = getattr(value, "shape", None)
    return f"a {type(value).__name__}" + (f" of shape {tuple(shape)}" if shape is not None else "")
