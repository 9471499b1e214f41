"""One process's samples in the groups in which several ranks had them: the same sums, added up as they add them up."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dtrain.runtime.data import Portion, Source

Groups = Mapping[int, Sequence[tuple[int, ...]]]  # step -> the indices of each micro-batch


class Regrouped:
    """Keeps data.Source. Where a group asks for samples that this step does not have, the step's own samples are cut
    evenly instead: the order of the data is the difference then."""

    num_steps: int | None = None
    max_loaders: int | None = 1  # a step is read whole

    def __init__(self, source: Source, groups: Groups) -> None:
        self._source = source
        self._groups = groups
        self._read: dict[int, list[Portion]] = {}

    def parts(self, step: int) -> list[tuple[int, int]]:
        return [(step, number) for number in range(len(self._groups[step]))]

    def __getitems__(self, part: tuple[int, int]) -> Portion:
        step, number = part
        if step not in self._read:
            self._read = {step: self._regroup(step)}
        return self._read[step][number]

    def place(self, step: int, mark: str) -> dict[str, Any]:
        return {}

    def _regroup(self, step: int) -> list[Portion]:
        portions = [self._source.__getitems__(part) for part in self._source.parts(step)]
        there = [pair for p in portions for pair in zip(p.indices, p.samples[: p.weight], strict=True)]
        groups = self._groups[step]
        if sorted(index for index, _ in there) != sorted(index for group in groups for index in group):
            total = len(groups)
            cut = [there[n * len(there) // total : (n + 1) * len(there) // total] for n in range(total)]
            return [_portion(pairs) for pairs in cut]
        left: dict[int, list[Any]] = {}
        for index, sample in there:
            left.setdefault(index, []).append(sample)
        return [_portion([(index, left[index].pop(0)) for index in group]) for group in groups]


def _portion(pairs: Sequence[tuple[int, Any]]) -> Portion:
    return Portion(
        samples=[sample for _, sample in pairs], weight=len(pairs), indices=tuple(index for index, _ in pairs)
    )
