"""A map-style data set addressed by position, and which positions a rank reads in each micro-batch of each step.

The order comes from order.py; random numbers inside the data set are keyed by (seed, position of the sample), so that
an augmentation does not depend on world size, loader processes or interruptions. Iterable data sets: streams.py;
loader processes: batches.py.
"""

from __future__ import annotations

import random
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence, Sized
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol, cast

import numpy as np
import torch

from dtrain.cluster.errors import UsageError
from dtrain.runtime.order import Ints, mix, sample_indices
from dtrain.runtime.report import find_place
from dtrain.runtime.shares import num_micro_batches, rank_slice
from dtrain.strategies.seeding import seed_torch

Count = Callable[[Any], float]
_BLOCK_STEPS = 64


def seed_everything(*words: int) -> None:
    """Python's, numpy's (where it is loaded) and torch's generators, from one key."""
    key = mix(*words)
    random.seed(key)
    if "numpy" in sys.modules:
        np.random.seed(key & 0xFFFFFFFF)
    seed_torch(key & (2**63 - 1))


def check_dataset(dataset: object, key: str) -> int:
    """Its length. Raises UsageError for what is no map-style data set."""
    if not hasattr(dataset, "__getitem__") or not hasattr(dataset, "__len__"):
        raise UsageError(
            f"{key}: {type(dataset).__name__} has neither __len__ and __getitem__ nor __iter__. Return a map-style "
            "Dataset, an IterableDataset or another iterable"
        )
    length = len(cast(Sized, dataset))
    if length == 0:
        raise UsageError(f"{key}: the data set is empty")
    return length


class DataError(Exception):
    """What the user's data set or collate raised, with the samples it was about. `where`: file:line of the user's code;
    `trace`: the traceback's text where it was raised in a loader process, which can't send the traceback itself.

    No subclass of the errors that a lost peer causes: a data set that loses a connection is no victim.
    """

    def __init__(self, message: str, where: str, trace: str = "") -> None:
        super().__init__(message, where, trace)  # the arguments are what pickling keeps
        self.message = message
        self.where = where
        self.trace = trace

    def __str__(self) -> str:
        return self.message + (f"\n\nIn the loader process:\n{self.trace}" if self.trace else "")


class Interrupted(Exception):
    """A stop was requested while a source read on and on without a sample to show for it."""


def explain(what: str, error: Exception) -> DataError:
    """What the user's code raised, in words. The traceback stays with it as its cause."""
    text = "".join(traceback.format_exception_only(error)).strip()
    problem = DataError(f"{what}: {text}", find_place(error.__traceback__))
    problem.__cause__ = error
    return problem


@dataclass(frozen=True, slots=True, kw_only=True)
class Portion:
    """What a source gives for one part of a step: the samples of a micro-batch, before collate."""

    samples: list[Any]
    weight: int  # how many of them count; 0: one was borrowed, so that this rank can join
    indices: tuple[int, ...]  # of those that count: what messages call them
    mark: str = ""  # what the source wants to be told of a step when its place is asked for


class Source(Protocol):
    """Where a rank's micro-batches come from. It is copied into loader processes, so it must not count on what another
    copy of it has seen."""

    num_steps: int | None  # of one pass; None: nobody knows, or there is no end
    max_loaders: int | None  # loader processes that are of use; None: any number

    def parts(self, step: int) -> Sequence[Any]:
        """What to ask for, one request a micro-batch, as many on every rank. Asked in the order of the steps."""

    def __getitems__(self, part: Any) -> Portion:
        """The samples of one part. Raises DataError with what the user's code raised, UsageError for what is wrong with
        the data set. (The name is what torch's loader looks for.)"""

    def place(self, step: int, mark: str) -> dict[str, Any]:
        """What a checkpoint after `step` holds: plain JSON, complete on rank 0. `mark`: of the step's last part.
        Collective."""


Pairs = list[tuple[int, int]]
Part = tuple[Pairs, int]  # positions with their indices, how many of them count; one is borrowed where that is 0


class Plan(Protocol):
    def micro_batches(self, step: int) -> list[Part]:
        """A micro-batch without samples borrows one."""

    def position(self, step: int) -> int:
        """Positions used up when `step` is done: what the checkpoint of that step holds."""


class MapSource:
    """A map-style data set addressed by (position, index), with its random numbers keyed by the position."""

    def __init__(self, dataset: Any, plan: Plan, *, seed: int, num_steps: int | None = None, key: str) -> None:
        """`key`: what the data set is called in messages."""
        self.num_steps = num_steps
        self.max_loaders: int | None = None
        self._dataset = dataset
        self._plan = plan
        self._seed = seed
        self._key = key

    def parts(self, step: int) -> list[Part]:
        return self._plan.micro_batches(step)

    def __getitems__(self, part: Part) -> Portion:
        pairs, weight = part
        samples = [self._read(position, index) for position, index in pairs]
        return Portion(samples=samples, weight=weight, indices=tuple(index for _, index in pairs[:weight]))

    def place(self, step: int, mark: str) -> dict[str, Any]:
        return {"position": self._plan.position(step)}

    def _read(self, position: int, index: int) -> Any:
        seed_everything(self._seed, 0x5A3F, position)
        try:
            return self._dataset[index]
        except Exception as error:
            raise explain(f"sample {index} of {self._key}", error) from error


def _chunks(pairs: Pairs, size: int, parts: int) -> list[Part]:
    """`pairs` cut evenly; there is one more pair than `size` where size is 0, to borrow."""
    chunks = [pairs[part * size // parts : (part + 1) * size // parts] for part in range(parts)]
    return [(chunk or pairs[:1], len(chunk)) for chunk in chunks]


class PassPlan:
    """One pass over a data set in its own order: step k is batch k, the last one may be smaller."""

    def __init__(
        self, num_samples: int, *, batch_size: int, rank: int, world_size: int, micro_batch: int | None
    ) -> None:
        self._num_samples = num_samples
        self._batch_size = batch_size
        self._rank = rank
        self._world_size = world_size
        self._micro_batch = micro_batch
        self.num_steps = -(-num_samples // batch_size)

    def position(self, step: int) -> int:
        return min(step * self._batch_size, self._num_samples)

    def micro_batches(self, step: int) -> list[Part]:
        first = (step - 1) * self._batch_size
        size = min(self._batch_size, self._num_samples - first)
        mine = rank_slice(size, self._rank, self._world_size)
        pairs = [(first + at, first + at) for at in (mine or range(mine.start, mine.start + 1))]
        return _chunks(pairs, len(mine), num_micro_batches(size, self._world_size, self._micro_batch))


class BatchPlan:
    """Which samples this rank sees in each micro-batch of each step; pure arithmetic."""

    def __init__(
        self,
        num_samples: int,
        *,
        batch_size: int,
        seed: int,
        shuffle: bool,
        rank: int,
        world_size: int,
        micro_batch: int | None,
        start_step: int = 0,
        start_position: int = 0,
    ) -> None:
        self._num_samples = num_samples
        self._seed = seed
        self._shuffle = shuffle
        self._batch_size = batch_size
        self._mine = rank_slice(batch_size, rank, world_size)
        self._start_step = start_step
        self._start_position = start_position
        self.num_micro_batches = num_micro_batches(batch_size, world_size, micro_batch)
        self._block = lru_cache(maxsize=4)(self._compute_block)  # loader processes run ahead of the steps

    def position(self, step: int) -> int:
        return self._start_position + (step - self._start_step) * self._batch_size

    def micro_batches(self, step: int) -> list[Part]:
        block, row = divmod(step, _BLOCK_STEPS)
        positions, indices = self._block(block)
        pairs = list(zip(positions[row].tolist(), indices[row].tolist(), strict=True))
        return _chunks(pairs, len(self._mine), self.num_micro_batches)

    def _compute_block(self, block: int) -> tuple[Ints, Ints]:
        """Positions and indices of this rank for some steps at once, (step, sample): a call costs more than a row."""
        steps = np.arange(block * _BLOCK_STEPS, (block + 1) * _BLOCK_STEPS)
        first = self._start_position + (steps - 1 - self._start_step) * self._batch_size
        mine = np.arange(self._mine.start, max(self._mine.stop, self._mine.start + 1))
        positions = np.maximum(first[:, None] + mine, 0)  # steps before the first one are not asked for
        indices = sample_indices(positions.ravel(), self._num_samples, self._seed, shuffle=self._shuffle)
        return positions, indices.reshape(positions.shape)


def to_device(batch: Any, device: torch.device) -> Any:
    """Tensors anywhere in dicts, lists and tuples, moved without waiting; other objects by their own `to`."""
    if device.type == "cpu":
        return batch
    if isinstance(batch, torch.Tensor):
        return batch.to(device, non_blocking=True)
    if not isinstance(batch, type) and callable(move := getattr(batch, "to", None)):
        return move(device)  # packed sequences, graphs, tokenizers' batches: they know how
    if isinstance(batch, Mapping):
        return {key: to_device(value, device) for key, value in batch.items()}
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(to_device(value, device) for value in batch))
    if isinstance(batch, list | tuple):
        return type(batch)(to_device(value, device) for value in batch)
    return batch


def first_tensor(batch: Any) -> torch.Tensor | None:
    if isinstance(batch, torch.Tensor):
        return batch
    values: Sequence[Any] = list(batch.values()) if isinstance(batch, Mapping) else batch
    if isinstance(values, list | tuple):
        for value in values:
            if (found := first_tensor(value)) is not None:
                return found
    return None


def count_samples(batch: Any) -> float:
    """The default of `count`: the first dim of the first tensor."""
    tensor = first_tensor(batch)
    if tensor is None or tensor.ndim == 0:
        raise UsageError(
            f"count: can't see how many samples a batch of type {type(batch).__name__} holds. "
            "Set `count: {_target_: ...}`, a callable(batch) -> number"
        )
    return float(tensor.shape[0])


def count_tokens(batch: Any) -> int | None:
    """Tokens of a batch where they are plain to see: the first tensor is (batch, sequence) of whole numbers."""
    tensor = first_tensor(batch)
    if tensor is None or tensor.ndim != 2 or tensor.is_floating_point() or tensor.dtype == torch.bool:
        return None
    return tensor.numel()
