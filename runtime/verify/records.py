"""What a run of `dtrain verify` has written down, a file a rank and step, and the same put together over its ranks.
Torch-free: the launching process reads it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dtrain.runtime.verify.sample import chosen

Floats = NDArray[np.float64]
Group = tuple[int, int]  # a data rank and the number of one of its micro-batches

ORDERS = "verify.json"  # in the run directory
RECORDS, PLAIN, GROUPED = "ranks", "plain", "grouped-{}"  # folders of records there
FACTS = "facts.json"  # in such a folder
GRADIENT, MODEL, OPTIMIZER, BUFFER = "gradient", "model", "optim", "buffer"


@dataclass(frozen=True, slots=True, kw_only=True)
class Orders:
    """What a job of `dtrain verify` is to do. `strategies`: the folders of finished ones' records, for the one process
    that they are compared with; None: to run a strategy."""

    steps: int
    strategies: tuple[str, ...] | None

    def write(self, run_dir: Path) -> None:
        (run_dir / ORDERS).write_text(json.dumps(asdict(self)))

    @staticmethod
    def read(run_dir: Path) -> Orders:
        found = json.loads((run_dir / ORDERS).read_text())
        strategies = found["strategies"]
        return Orders(steps=found["steps"], strategies=None if strategies is None else tuple(strategies))


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """One micro-batch. `total` and `counted`: what the loss gave; None where this rank does not compute it."""

    group: Group
    indices: tuple[int, ...]  # those that count
    digests: tuple[str, ...]  # of each sample as the model got it, with its shape; empty: it can't be told apart
    count: float  # what count(batch) said
    total: float | None
    counted: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """One rank's share of a tensor: its values at those of the chosen elements that it holds."""

    shape: tuple[int, ...]
    dtype: str
    numbers: NDArray[np.int64]
    values: Floats
    square: float  # of all that this rank holds of it
    bits: int  # the most mantissa bits that any of its numbers uses


@dataclass(frozen=True, slots=True, kw_only=True)
class RankStep:
    """Of one rank and one step; step 0 is before the first."""

    step: int
    rank: int
    parts: tuple[Part, ...] = ()
    loss: float | None = None
    norm: float | None = None
    lr: float | None = None
    scale: float = 1.0  # fp16's
    pieces: Mapping[str, Piece] = field(default_factory=dict)  # by "<kind>/<name>"


def write(folder: Path, found: RankStep) -> None:
    """Two files: JSON, and the numbers."""
    path = folder / f"step-{found.step:05d}-rank-{found.rank:05d}"
    arrays: dict[str, Any] = {}
    pieces = {}
    for number, (name, piece) in enumerate(found.pieces.items()):
        pieces[name] = [piece.shape, piece.dtype, piece.square, piece.bits]
        arrays[f"n{number}"], arrays[f"v{number}"] = piece.numbers, piece.values
    np.savez(path.with_suffix(".npz"), **arrays)
    plain = {**asdict(replace(found, pieces={})), "pieces": pieces}
    path.with_suffix(".json").write_text(json.dumps(plain))


def read(folder: Path) -> list[list[RankStep]]:
    """[step][rank], from step 0 on; only the steps that every rank has come to the end of."""
    found: dict[int, list[RankStep]] = {}
    for path in sorted(folder.glob("step-*.json")):
        record = _read_one(path)
        found.setdefault(record.step, []).append(record)
    num_ranks = max((len(ranks) for ranks in found.values()), default=0)
    return [ranks for _, ranks in sorted(found.items()) if len(ranks) == num_ranks]


def _read_one(path: Path) -> RankStep:
    plain = json.loads(path.read_text())
    listed = plain.pop("pieces")
    with np.load(path.with_suffix(".npz"), allow_pickle=False) as arrays:
        pieces = {
            name: Piece(
                shape=tuple(shape),
                dtype=dtype,
                numbers=arrays[f"n{number}"],
                values=arrays[f"v{number}"],
                square=square,
                bits=bits,
            )
            for number, (name, (shape, dtype, square, bits)) in enumerate(listed.items())
        }
    parts = tuple(
        Part(**{**part, **{key: tuple(part[key]) for key in ("group", "indices", "digests")}})
        for part in plain.pop("parts")
    )
    return RankStep(parts=parts, pieces=pieces, **plain)


@dataclass(frozen=True, slots=True, kw_only=True)
class Tensor:
    """Put together from the ranks' pieces. Elements that no rank holds are nan."""

    name: str
    dtype: str
    values: Floats
    bits: int
    unlike: tuple[int, float] | None  # a rank whose copy is not like the first one's, and by how much at most
    owners: Mapping[int, Piece]

    @property
    def size(self) -> float:
        return float(np.linalg.norm(self.values))


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """A step of a run, over all its ranks."""

    number: int
    parts: tuple[Part, ...]  # each micro-batch once
    losses: tuple[float, ...]  # as each rank has them
    norms: tuple[float, ...]
    lr: float | None
    scale: float
    tensors: Mapping[str, Tensor]  # by "<kind>/<name>"

    def of(self, kind: str) -> dict[str, Tensor]:
        """Those of a kind by their names, in the order of the model."""
        return {
            name.removeprefix(f"{kind}/"): tensor
            for name, tensor in self.tensors.items()
            if name.startswith(f"{kind}/")
        }

    @property
    def count(self) -> float:
        return sum(part.counted or 0.0 for part in self.parts)


def read_run(folder: Path) -> list[Step]:
    """From step 0 on."""
    return [put_together(ranks) for ranks in read(folder)]


def put_together(ranks: Sequence[RankStep]) -> Step:
    names = dict.fromkeys(name for rank in ranks for name in rank.pieces)
    first = ranks[0]
    return Step(
        number=first.step,
        parts=_merge_parts(part for rank in ranks for part in rank.parts),
        losses=tuple(rank.loss for rank in ranks if rank.loss is not None),
        norms=tuple(rank.norm for rank in ranks if rank.norm is not None),
        lr=first.lr,
        scale=first.scale,
        tensors={name: _join(name, {r.rank: r.pieces[name] for r in ranks if name in r.pieces}) for name in names},
    )


def _merge_parts(parts: Iterable[Part]) -> tuple[Part, ...]:
    """Ranks of one tensor or pipeline group have the same micro-batches; some of them may not compute the loss."""
    found: dict[Group, Part] = {}
    for part in parts:
        known = found.get(part.group)
        if known is None or (known.total is None and part.total is not None):
            found[part.group] = part
    return tuple(found[group] for group in sorted(found))


def _join(name: str, owners: Mapping[int, Piece]) -> Tensor:
    first = next(iter(owners.values()))
    values = np.full(len(chosen(first.shape)), np.nan)
    unlike: tuple[int, float] | None = None
    for rank, piece in owners.items():
        there = values[piece.numbers]
        held = ~np.isnan(there)
        if held.any():
            gap = float(np.max(np.abs(there[held] - piece.values[held])))
            if unlike is None and gap > 0:
                unlike = (rank, gap)
        values[piece.numbers] = np.where(held, there, piece.values)
    return Tensor(
        name=name,
        dtype=first.dtype,
        values=values,
        bits=max(piece.bits for piece in owners.values()),
        unlike=unlike,
        owners=owners,
    )
