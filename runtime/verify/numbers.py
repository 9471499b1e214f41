"""The arithmetic of a comparison: what of a difference is rounding, and which multiple or mixture one tensor is of
others. Pure, torch-free."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from dtrain.runtime.verify.records import Floats, Group, Part, Step

# A tensor whose gradient half a unit in the last place of the weights changes by this much is rounding noise around 0:
# the loss does not react to it, as to the bias of attention's keys, and Adam makes full-size updates of the noise.
NOISE = 1e-2
NOISE_FACTOR = 10.0  # so many times what rounding does to one process may be rounding, too


@dataclass(frozen=True, slots=True, kw_only=True)
class Tolerance:
    """Relative. fp32: sums in another order; bf16 and fp16: the forward's products are rounded, by 2**-8 and 2**-11."""

    loss: float
    gradient: float
    update: float


TOLERANCES = {
    "fp32": Tolerance(loss=5e-6, gradient=1e-4, update=1e-3),
    "bf16": Tolerance(loss=1e-3, gradient=5e-2, update=1e-1),
    "fp16": Tolerance(loss=1.5e-4, gradient=1e-2, update=3e-2),
}


def gap(found: float, wanted: float) -> float:
    """Relative difference of two numbers."""
    return abs(found - wanted) / max(abs(wanted), 1e-30)


def distance(a: Floats, b: Floats) -> float:
    """2-norm of the difference where both have elements."""
    return float(np.linalg.norm(np.nan_to_num(a - b)))


def correction(step: Step) -> float:
    """By what this run's gradients, as they are recorded, are multiplied to be those of the mean loss: its own guess of
    the count over the true one, over fp16's scale."""
    guess = sum(part.count for part in step.parts) or 1.0
    return guess / (step.count or 1.0) / step.scale


def gradients(step: Step) -> dict[str, Floats]:
    """Of the mean loss, by parameter."""
    factor = correction(step)
    return {name: tensor.values * factor for name, tensor in step.of("gradient").items()}


@dataclass(frozen=True, slots=True, kw_only=True)
class Multiple:
    """`found` is `factor` times `wanted`, but for `rest`, relative to `found`."""

    factor: float
    rest: float


def multiple(found: Floats, wanted: Floats) -> Multiple:
    both = ~np.isnan(found) & ~np.isnan(wanted)
    a, b = found[both], wanted[both]
    square = float(b @ b)
    if square == 0.0:
        return Multiple(factor=np.nan, rest=1.0)
    factor = float(a @ b) / square
    return Multiple(factor=factor, rest=float(np.linalg.norm(a - factor * b)) / max(float(np.linalg.norm(a)), 1e-300))


@dataclass(frozen=True, slots=True, kw_only=True)
class Mixture:
    """How often each micro-batch's gradient is in the sum: once, where all is well. `rest`: what no mixture explains,
    relative."""

    weights: dict[Group, float]
    rest: float


def mixture(found: Mapping[str, Floats], shares: Mapping[Group, Mapping[str, Floats]], count: float) -> Mixture | None:
    """Least squares over all tensors, each with the same say. `found`: of the mean loss; `shares`: of each
    micro-batch's sum of losses, at some of the elements (nan elsewhere). None where there is too little to go by."""
    groups = list(shares)
    rows, wanted = [], []
    for name, values in found.items():
        columns = [shares[group].get(name) for group in groups]
        if not all(column is not None for column in columns):
            continue
        table = np.stack([column for column in columns if column is not None], axis=1)
        use = ~np.isnan(values) & ~np.isnan(table).any(axis=1)
        size = float(np.linalg.norm(table[use].sum(axis=1)))
        if use.any() and size > 0:
            rows.append(table[use] / size)
            wanted.append(values[use] * count / size)
    if not rows:
        return None
    a, b = np.concatenate(rows), np.concatenate(wanted)
    if len(b) < len(groups) or not np.linalg.norm(b):
        return None
    weights, *_ = np.linalg.lstsq(a, b, rcond=None)
    rest = float(np.linalg.norm(a @ weights - b) / np.linalg.norm(b))
    return Mixture(weights=dict(zip(groups, weights.tolist(), strict=True)), rest=rest)


def shares_of(step: Step) -> dict[Group, dict[str, Floats]]:
    """Of the one process that took the ranks' micro-batches: the gradient of each one's sum of losses."""
    factor = correction(step) * (step.count or 1.0)
    found: dict[Group, dict[str, Floats]] = {}
    for number in range(len(step.parts)):
        tensors = step.of(f"0.{number}")
        found[0, number] = {name: tensor.values * factor for name, tensor in tensors.items()}
    return found


def same(values: Sequence[float], tolerance: float) -> bool:
    """Whether all are one value."""
    middle = float(np.mean(values))
    return all(abs(value - middle) <= tolerance * max(abs(middle), 1e-30) for value in values)


def by_rank(parts: Sequence[Part], values: Sequence[float]) -> dict[int, list[float]]:
    """Values of micro-batches, by their data rank."""
    found: dict[int, list[float]] = {}
    for part, value in zip(parts, values, strict=True):
        found.setdefault(part.group[0], []).append(value)
    return found
