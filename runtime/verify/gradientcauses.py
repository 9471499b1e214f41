"""From a difference in gradients, their norm or what was made of them to the mistake behind it: multiples, mixtures of
micro-batches and norms of parts, each tried on the numbers.

Every function returns the Finding for a difference that compare.py has established. Pure, torch-free."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from dtrain.runtime.verify.causes import DIVIDED, is_rounded
from dtrain.runtime.verify.numbers import (
    Mixture,
    by_rank,
    correction,
    gap,
    gradients,
    mixture,
    multiple,
    same,
    shares_of,
)
from dtrain.runtime.verify.records import GRADIENT, MODEL, OPTIMIZER, Floats, Step, Tensor
from dtrain.runtime.verify.verdict import Cause, Finding
from dtrain.runtime.verify.words import SHOWN, how_many, some

_SAME_NORM = 1e-4
_FIT = 1e-2  # an explanation that leaves less than this of a difference explains it


# ---- gradients ----


def gradient(ranks: Step, plain: Step, grouped: Step, parted: Mapping[str, float], limit: float) -> Finding:
    """`parted`: relative differences by parameter, in the order of the model."""
    found, wanted = gradients(ranks), gradients(plain)
    first = next(iter(parted))
    lines = [how_many(parted, len(wanted), first)]
    tensor = ranks.of(GRADIENT).get(first)
    if tensor is None or not np.nansum(np.abs(tensor.values)):
        return _gradient_finding(Cause.SUM, ranks.number, first, [*lines, "it has none on the ranks"], _SUMMED)
    if is_rounded(tensor, plain.of(GRADIENT)[first]):
        lines.append(f"its numbers have at most {tensor.bits} of 23 bits behind the first: it was rounded on the way")
        return _gradient_finding(Cause.DTYPE, ranks.number, first, lines, _ROUNDED)
    names = {i: part.group for i, part in enumerate(ranks.parts)}
    shares = {names[number]: named for (_, number), named in shares_of(grouped).items() if number in names}
    if tensor.unlike is not None and tensor.unlike[1] > limit * float(np.nanmax(np.abs(tensor.values))):
        return _unlike_copies(ranks, first, tensor, shares, lines)
    factors = {name: multiple(found[name], wanted[name]) for name in parted if name in found}
    if all(one.rest < _FIT for one in factors.values()):
        values = [one.factor for one in factors.values()]
        alike = same(values, 1e-3)
        lines.append(f"{'each is' if alike and len(values) > 1 else 'it is'} {values[0]:.6g} times one process's")
        lines += _what_is(values[0], ranks)
        return _gradient_finding(Cause.SCALE, ranks.number, first, lines, _SCALED)
    mixed = mixture({name: found[name] for name in parted if name in found}, shares, grouped.count)
    if mixed is not None and mixed.rest < _FIT:
        return _mixed(ranks, first, mixed, lines)
    part = mixture({first: found[first]}, shares, grouped.count) if first in found else None
    if part is not None and part.rest < _FIT:
        return _mixed(ranks, first, part, lines)
    lines.append(f"it is no multiple of one process's, and no mixture of the micro-batches': {parted[first]:.3g} apart")
    return _gradient_finding(Cause.GRADIENT, ranks.number, first, lines, _BACKWARD)


_SUMMED = (
    "Gradients must be summed over all ranks that saw other samples: look at hooks, frozen or unused parameters, and "
    "at what leaves this one out."
)
_SCALED = (
    "The loss is divided by the count of the global batch before its backward, so gradients are summed: no averaging, "
    "and no dividing by the number of ranks or micro-batches."
)
_ROUNDED = "Gradients travel and add up in fp32. Look for a hook or a communication in half precision."
_BACKWARD = (
    "Look at what changes gradients on the way: hooks, custom backward functions, a tied weight whose gradients are "
    "not added up."
)


def _gradient_finding(cause: Cause, step: int, tensor: str, lines: Sequence[str], advice: str) -> Finding:
    return Finding(cause=cause, step=step, quantity="gradient", tensor=tensor, evidence=tuple(lines), advice=advice)


def _unlike_copies(
    ranks: Step, name: str, tensor: Tensor, shares: Mapping[tuple[int, int], Mapping[str, Floats]], lines: list[str]
) -> Finding:
    assert tensor.unlike is not None
    lines.append(f"rank {tensor.unlike[0]}'s copy differs from the first one's by up to {tensor.unlike[1]:.3g}")
    for rank, piece in list(tensor.owners.items())[:2]:
        values = np.full(len(tensor.values), np.nan)
        values[piece.numbers] = piece.values * correction(ranks)
        mixed = mixture({name: values}, shares, ranks.count)
        if mixed is not None and mixed.rest < _FIT:
            lines.append(f"rank {rank} has {_weights(mixed)}")
    return _gradient_finding(Cause.SUM, ranks.number, name, lines, _SUMMED)


def _mixed(ranks: Step, first: str, mixed: Mixture, lines: list[str]) -> Finding:
    lines.append(f"the micro-batches' gradients are in the sum {_weights(mixed)}, and should be once each")
    weights = [mixed.weights[part.group] for part in ranks.parts if part.group in mixed.weights]
    counts = [part.counted or 0.0 for part in ranks.parts if part.group in mixed.weights]
    per_rank, rank_counts = by_rank(ranks.parts, weights), {r: sum(c) for r, c in by_rank(ranks.parts, counts).items()}
    if any(abs(weight) < _FIT for weight in weights):
        lines.append("some are left out")
        return _gradient_finding(Cause.SUM, ranks.number, first, lines, _SUMMED)
    if all(same(of_rank, 1e-3) for of_rank in per_rank.values()) and same(
        [of_rank[0] * rank_counts[rank] for rank, of_rank in per_rank.items()], 1e-3
    ):
        lines.append("as if each rank had divided by its own count, and the ranks' means weighed alike")
    elif same([weight * count for weight, count in zip(weights, counts, strict=True)], 1e-3):
        lines.append("as if each micro-batch had divided by its own count, and their means weighed alike")
    else:
        return _gradient_finding(Cause.SCALE, ranks.number, first, lines, _SCALED)
    return _gradient_finding(Cause.LOSS, ranks.number, first, lines, DIVIDED)


def _weights(mixed: Mixture) -> str:
    ranks: dict[int, list[float]] = {}
    for (rank, _), weight in mixed.weights.items():
        ranks.setdefault(rank, []).append(weight)
    words = [f"rank {rank}: {', '.join(f'{w:.4g}' for w in values[:SHOWN])}" for rank, values in ranks.items()]
    return "; ".join(words[:SHOWN]) + ("; ..." if len(words) > SHOWN else "")


def _what_is(factor: float, ranks: Step) -> Iterator[str]:
    """A number that such a factor may come from."""
    num_ranks = len({part.group[0] for part in ranks.parts})
    num_parts = len(ranks.parts) // max(1, num_ranks)
    known = {
        "the number of ranks": num_ranks,
        "the micro-batches of a rank": num_parts,
        "the micro-batches of all ranks": len(ranks.parts),
        "the count of the global batch": ranks.count,
    }
    for words, number in known.items():
        if number not in (0, 1):
            if abs(factor / number - 1) < 1e-3:
                yield f"that is {words}"
                return
            if abs(factor * number - 1) < 1e-3:
                yield f"that is one over {words}"
                return


# ---- norm ----


def norm(step: int, ranks: Step, wanted: float, clip: float | None) -> Finding:
    lines = [f"norms of the ranks: {some([round(n, 9) for n in ranks.norms])}; of one process: {wanted:.9g}"]
    lines.append("the gradients themselves are equal")
    shards = shard_norms(ranks)
    parts = {rank: value for rank, value in shards.items() if gap(value, wanted) > _SAME_NORM}
    own = [rank for rank, value in parts.items() if any(gap(norm, value) < _SAME_NORM for norm in ranks.norms)]
    ratio = ranks.norms[0] / wanted if wanted else math.nan
    if own:
        lines.append(f"rank {own[0]}'s is the norm over its own shard, {shards[own[0]]:.9g}")
    else:
        lines.append(f"x {ratio:.6g}; squared x {ratio * ratio:.6g}")
        if ratio > 1 and abs(ratio * ratio - len(ranks.norms)) < 1e-2:
            lines.append("every rank's copy was counted")
    return Finding(
        cause=Cause.NORM,
        step=step,
        quantity="gradient norm",
        tensor="",
        evidence=tuple(lines),
        advice=_NORMED + ("" if clip is None else " Clipping by it scales ranks, or everything, by a wrong factor."),
    )


_NORMED = (
    "The norm is that over all parameters and all ranks' shards, each element once: squares are summed over ranks."
)


def shard_norms(ranks: Step) -> dict[int, float]:
    """Of what each rank holds, where ranks hold parts."""
    factor = correction(ranks)
    squares: dict[int, float] = {}
    for tensor in ranks.of(GRADIENT).values():
        for rank, piece in tensor.owners.items():
            squares[rank] = squares.get(rank, 0.0) + piece.square
    return {rank: math.sqrt(square) * factor for rank, square in squares.items()}


# ---- update ----


def update(step: int, ranks: Step, plain: Step, parted: Mapping[str, float], clip: float | None) -> Finding:
    """Gradients and their norm are equal, what the optimizer made of them is not."""
    first = next(iter(parted))
    found, wanted = ranks.of(OPTIMIZER)[first], plain.of(OPTIMIZER)[first]
    lines = [how_many(parted, len(plain.of(OPTIMIZER)), first)]
    scales = _scale_by_rank(found, wanted)
    if not scales:
        return _update_finding(Cause.UPDATE, step, "optimizer state", first, lines, _SETTINGS)
    lines.append("over one process's: " + ", ".join(f"rank {rank}: x {scale:.6g}" for rank, scale in scales.items()))
    true = plain.norms[0] if plain.norms else math.nan
    power = 2.0 if first.endswith("_sq") else 1.0
    if clip is not None and true > 0:
        usual = min(1.0, clip / (true + 1e-6))
        implied = {rank: clip / (usual * scale ** (1 / power)) for rank, scale in scales.items() if scale > 0}
        shards = shard_norms(ranks)
        hit = [rank for rank, value in implied.items() if rank in shards and gap(value, shards[rank]) < 1e-2]
        norms = some([round(value, 6) for value in implied.values()])
        lines.append(f"clipping at {clip:g} by norms of {norms} does that; the norm is {true:.6g}")
        if hit and gap(implied[hit[0]], true) > 1e-3:
            lines.append(f"rank {hit[0]}'s is the norm over its own shard")
        return _update_finding(Cause.NORM, step, "optimizer state", first, lines, _NORMED)
    return _update_finding(Cause.SCALE, step, "optimizer state", first, lines, _SCALED)


_SETTINGS = "Look at the optimizer's groups on the ranks: rates, weight decay, and which parameters are in which group."


def _update_finding(cause: Cause, step: int, quantity: str, name: str, lines: Sequence[str], advice: str) -> Finding:
    return Finding(cause=cause, step=step, quantity=quantity, tensor=name, evidence=tuple(lines), advice=advice)


def _scale_by_rank(found: Tensor, wanted: Tensor) -> dict[int, float]:
    """Where each rank's part is a multiple of one process's; empty where one is not."""
    scales = {}
    for rank, piece in found.owners.items():
        if len(piece.numbers) == 0:
            continue
        one = multiple(piece.values, wanted.values[piece.numbers])
        if not one.rest < _FIT:
            return {}
        scales[rank] = one.factor
    return scales


def weights(step: int, ranks: Sequence[Step], plain: Sequence[Step], parted: Mapping[str, float]) -> Finding:
    """Whatever came before is equal."""
    first = next(iter(parted))
    found, wanted = ranks[step].of(MODEL)[first], plain[step].of(MODEL)[first]
    lines = [how_many(parted, len(plain[step].of(MODEL)), first)]
    if found.unlike is not None:
        lines.append(f"rank {found.unlike[0]}'s copy differs from the first one's by up to {found.unlike[1]:.3g}")
        return _update_finding(Cause.UPDATE, step, "weights", first, lines, _DRIFT)
    mine, theirs = (run[step].of(MODEL)[first].values - run[step - 1].of(MODEL)[first].values for run in (ranks, plain))
    one = multiple(mine, theirs)
    if one.rest < 5 * _FIT:
        lines.append(f"its update is {one.factor:.6g} times one process's")
    else:
        largest = float(np.nanmax(np.abs(found.values - wanted.values)))
        lines.append(
            f"differs by up to {largest:.3g}, where the update is up to {float(np.nanmax(np.abs(theirs))):.3g}"
        )
    lines.append("loss, gradients, their norm and the optimizer's state are equal")
    return _update_finding(Cause.UPDATE, step, "weights", first, lines, _SETTINGS)


_DRIFT = (
    "Copies of a weight must get the same update: the same gradient, clipped by the same norm, with the same optimizer "
    "state."
)
