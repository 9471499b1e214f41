"""A strategy's steps against one process's: where do they part first? In the order of cause and effect, so that what is
found first explains what comes after it. How a difference came about is causes.py's and
gradientcauses.py's. Pure, torch-free."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from dtrain.runtime.verify import causes, gradientcauses
from dtrain.runtime.verify.numbers import NOISE, NOISE_FACTOR, TOLERANCES, Tolerance, distance, gap, gradients
from dtrain.runtime.verify.records import BUFFER, GRADIENT, MODEL, OPTIMIZER, Floats, Step
from dtrain.runtime.verify.verdict import Finding, Largest, Verdict

_ULP = 2.0**-23
_SMALLEST = 2.0**-24  # of a gradient's norm over all tensors: below that one tensor's is rounding


@dataclass(frozen=True, slots=True, kw_only=True)
class Runs:
    """The same steps three times, from step 0 on: by one process, by one process in the micro-batches that the ranks
    had (and from weights half a unit in the last place away), by the ranks."""

    plain: Sequence[Step]
    grouped: Sequence[Step]
    ranks: Sequence[Step]
    precision: str
    clip: float | None
    batch_statistics: bool = False
    trainable: frozenset[str] = frozenset()

    @property
    def tolerance(self) -> Tolerance:
        return TOLERANCES[self.precision]


@dataclass(slots=True)
class _Seen:
    """What has been compared so far."""

    largest: dict[str, Largest] = field(default_factory=dict)
    indifferent: dict[str, None] = field(default_factory=dict)

    def note(self, quantity: str, relative: float, step: int, tensor: str = "") -> None:
        known = self.largest.get(quantity)
        if known is None or relative > known.relative:
            self.largest[quantity] = Largest(relative=relative, tensor=tensor, step=step)


def compare(runs: Runs, notes: Sequence[str] = ()) -> Verdict:
    seen = _Seen()
    finding = next(_differences(runs, seen), None)
    return Verdict(
        steps=len(runs.ranks) - 1,
        finding=finding,
        largest=seen.largest,
        indifferent=tuple(seen.indifferent),
        notes=tuple(notes),
    )


def _differences(runs: Runs, seen: _Seen) -> Iterator[Finding]:
    yield from _dtypes(runs, 0)
    yield from _start(runs)
    for number in range(1, len(runs.ranks)):
        yield from _data(runs, number)
        yield from _grouping(runs, number)
        yield from _loss(runs, seen, number)
        yield from _gradients(runs, seen, number)
        yield from _norm(runs, seen, number)
        yield from _buffers(runs, number)
        yield from _dtypes(runs, number)
        yield from _optimizer(runs, seen, number)
        yield from _weights(runs, seen, number)


# ---- before the first step ----


def _dtypes(runs: Runs, number: int) -> Iterator[Finding]:
    """Weights and optimizer state in less than fp32, by what they are or by what they hold."""
    ranks, plain = runs.ranks[number], runs.plain[number]
    buffers = ranks.of(BUFFER)
    for kind in (MODEL, OPTIMIZER):
        wanted = plain.of(kind)
        for name, tensor in ranks.of(kind).items():
            other = wanted.get(name)
            if other is None or name in buffers or (kind == MODEL and name not in runs.trainable):
                continue
            if causes.is_rounded(tensor, other):
                yield causes.rounded(number, kind, name, tensor, other)


def _start(runs: Runs) -> Iterator[Finding]:
    for kind in (MODEL, BUFFER):
        wanted = runs.plain[0].of(kind)
        for name, tensor in runs.ranks[0].of(kind).items():
            unlike = name not in wanted or distance(tensor.values, wanted[name].values) > 0
            if tensor.unlike is not None or unlike:
                yield causes.other_start(name, tensor, wanted.get(name))


# ---- step by step ----


def _data(runs: Runs, number: int) -> Iterator[Finding]:
    ranks, plain = runs.ranks[number], runs.plain[number]
    found = Counter(index for part in ranks.parts for index in part.indices)
    wanted = Counter(index for part in plain.parts for index in part.indices)
    if found != wanted:
        yield causes.other_samples(number, ranks, found, wanted)
    elif (unlike := causes.other_contents(ranks, plain)) is not None:
        yield causes.contents(number, *unlike)


def _grouping(runs: Runs, number: int) -> Iterator[Finding]:
    """Does one process give another loss, or another gradient, for the same samples in other micro-batches?"""
    plain, grouped = runs.plain[number], runs.grouped[number]
    losses = [step.losses[0] for step in (plain, grouped)]
    noise = _noise(runs, number)
    shaky = sum(size * size for name, (size, change) in noise.items() if change > NOISE * size)
    total = sum(size * size for size, _ in noise.values())
    if gap(losses[1], losses[0]) > 4 * runs.tolerance.loss or shaky > 0.5 * total > 0:
        yield causes.grouping(number, plain, grouped, runs.ranks[number], statistics=runs.batch_statistics)


def _noise(runs: Runs, number: int) -> dict[str, tuple[float, float]]:
    """By parameter: the gradient's size in one process, and by how much rounding alone changes it."""
    plain, grouped = gradients(runs.plain[number]), gradients(runs.grouped[number])
    return {
        name: (float(np.linalg.norm(values)), distance(grouped[name], values))
        for name, values in plain.items()
        if name in grouped
    }


def _loss(runs: Runs, seen: _Seen, number: int) -> Iterator[Finding]:
    ranks, plain, grouped = runs.ranks[number], runs.plain[number], runs.grouped[number]
    wanted = plain.losses[0]
    rounding = NOISE_FACTOR * gap(grouped.losses[0], wanted)
    limit = max(runs.tolerance.loss, min(rounding, 4 * runs.tolerance.loss))
    worst = max(ranks.losses, key=lambda loss: gap(loss, wanted))
    if gap(worst, wanted) > limit:
        yield causes.loss(number, ranks, plain, grouped, worst, limit)
    seen.note("loss", gap(worst, wanted), number)


def _gradients(runs: Runs, seen: _Seen, number: int) -> Iterator[Finding]:
    ranks, plain = runs.ranks[number], runs.plain[number]
    found, wanted, noise = gradients(ranks), gradients(plain), _noise(runs, number)
    total = float(np.sqrt(sum(size * size for size, _ in noise.values())))
    parted = {}
    for name, values in wanted.items():
        size, change = noise.get(name, (float(np.linalg.norm(values)), 0.0))
        if change > NOISE * size or size < _SMALLEST * total:
            seen.indifferent[name] = None
            continue
        off = distance(found.get(name, np.zeros_like(values)), values)
        limit = max(runs.tolerance.gradient * size, NOISE_FACTOR * change, _SMALLEST * total)
        tensor = ranks.of(GRADIENT).get(name)
        if off > limit or (tensor is not None and tensor.unlike is not None and tensor.unlike[1] > limit):
            parted[name] = off / size
        else:
            seen.note("gradient", off / size, number, name)
    if parted:
        yield gradientcauses.gradient(ranks, plain, runs.grouped[number], parted, runs.tolerance.gradient)


def _norm(runs: Runs, seen: _Seen, number: int) -> Iterator[Finding]:
    ranks, plain = runs.ranks[number], runs.plain[number]
    if not plain.norms or not ranks.norms:
        return
    wanted = plain.norms[0]
    worst = max(ranks.norms, key=lambda norm: gap(norm, wanted))
    if gap(worst, wanted) > runs.tolerance.gradient:
        yield gradientcauses.norm(number, ranks, wanted, runs.clip)
    seen.note("gradient norm", gap(worst, wanted), number)


def _buffers(runs: Runs, number: int) -> Iterator[Finding]:
    wanted, noise = runs.plain[number].of(BUFFER), runs.grouped[number].of(BUFFER)
    for name, tensor in runs.ranks[number].of(BUFFER).items():
        if name not in wanted:
            continue
        size = wanted[name].size
        change = distance(noise[name].values, wanted[name].values) if name in noise else 0.0
        limit = max(runs.tolerance.gradient * size, min(NOISE_FACTOR * change, 10 * runs.tolerance.gradient * size))
        off = distance(tensor.values, wanted[name].values)
        if off > limit or (tensor.unlike is not None and tensor.unlike[1] > limit):
            yield causes.buffer(number, name, tensor, wanted[name])


def _optimizer(runs: Runs, seen: _Seen, number: int) -> Iterator[Finding]:
    ranks, plain, grouped = (steps[number].of(OPTIMIZER) for steps in (runs.ranks, runs.plain, runs.grouped))
    parted = {}
    for name, tensor in plain.items():
        owner = name.rpartition(".")[0]
        if owner in seen.indifferent or name not in ranks:
            continue
        size = tensor.size
        change = distance(grouped[name].values, tensor.values) if name in grouped else 0.0
        limit = max(runs.tolerance.update * size, NOISE_FACTOR * change)
        off, unlike = distance(ranks[name].values, tensor.values), ranks[name].unlike
        if off > limit or (unlike is not None and unlike[1] > limit):
            parted[name] = off / max(size, 1e-300)
        elif size:
            seen.note("optimizer state", off / size, number, name)
    if parted:
        yield gradientcauses.update(number, runs.ranks[number], runs.plain[number], parted, runs.clip)


def _weights(runs: Runs, seen: _Seen, number: int) -> Iterator[Finding]:
    """A weight's difference counts by how much the loss reacts to it: |gradient| x difference, against |gradient| x
    update. What an optimizer like Adam makes of gradients that are rounding noise weighs nothing so."""
    ranks, plain, grouped = (steps[number].of(MODEL) for steps in (runs.ranks, runs.plain, runs.grouped))
    before, slopes = runs.plain[number - 1].of(MODEL), gradients(runs.plain[number])
    buffers = runs.plain[number].of(BUFFER)
    parted = {}
    for name, tensor in plain.items():
        if name in seen.indifferent or name in buffers or name not in ranks:
            continue
        slope = np.abs(slopes[name]) if name in slopes else np.ones_like(tensor.values)
        values = tensor.values
        update = float(np.nansum(slope * np.abs(values - before[name].values)))
        last = float(np.nansum(slope * np.abs(values))) * 2 * _ULP * number
        change = float(np.nansum(slope * np.abs(grouped[name].values - values))) if name in grouped else 0.0
        off = float(np.nansum(slope * np.abs(ranks[name].values - values)))
        limit = max(runs.tolerance.update * update + last, NOISE_FACTOR * change)
        unlike = ranks[name].unlike
        if off > limit or (unlike is not None and _apart(unlike[1], values)):
            parted[name] = off / max(update, 1e-300)
        elif update:
            seen.note("update of the weights", off / update, number, name)
    if parted:
        yield gradientcauses.weights(number, runs.ranks, runs.plain, parted)


def _apart(by: float, values: Floats) -> bool:
    """Whether two copies of a weight differ by more than their last places."""
    return by > 4 * _ULP * float(np.nanmax(np.abs(values)))
