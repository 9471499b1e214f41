"""From a map-style data set to this rank's micro-batches of each step.

The order comes from order.py; random numbers inside the data set are keyed by (seed, position of the sample), so that
an augmentation does not depend on world size, loader processes or interruptions. Iterable data sets are refused here.
"""

from __future__ import annotations

import contextlib
import queue
import random
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence, Sized
from functools import lru_cache
from types import TracebackType
from typing import Any, Protocol, cast

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, default_collate, get_worker_info

from dtrain.cluster.errors import UsageError
from dtrain.runtime.order import Ints, mix, num_micro_batches, rank_slice, sample_indices
from dtrain.runtime.report import find_place
from dtrain.strategies.protocol import MicroBatch

Count = Callable[[Any], float]
_POLL_S = 0.1
_GRACE_S = 1.0  # for a loader process to end by itself and take its temporary files along
_BLOCK_STEPS = 64


def seed_everything(*words: int) -> None:
    """Python's, numpy's (where it is loaded) and torch's generators, from one key."""
    key = mix(*words)
    random.seed(key)
    if "numpy" in sys.modules:
        np.random.seed(key & 0xFFFFFFFF)
    # Not torch.manual_seed: it looks at every kind of device each time, 0.2 ms, and this runs once a sample.
    torch.default_generator.manual_seed(key & (2**63 - 1))
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.manual_seed_all(key & (2**63 - 1))


def check_dataset(dataset: object, key: str) -> int:
    """Its length. Raises UsageError for what is no map-style data set."""
    if isinstance(dataset, IterableDataset):
        raise UsageError(f"{key}: {type(dataset).__name__} is an IterableDataset; a map-style Dataset is needed")
    if not hasattr(dataset, "__getitem__") or not hasattr(dataset, "__len__"):
        raise UsageError(f"{key}: {type(dataset).__name__} has no __len__ and __getitem__; return a map-style Dataset")
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


def _explain(what: str, error: Exception) -> DataError:
    """Raises here, where the traceback is real; a loader process returns it for the worker to raise."""
    text = "".join(traceback.format_exception_only(error)).strip()
    problem = DataError(f"{what}: {text}", find_place(error.__traceback__))
    if get_worker_info() is None:
        raise problem from error
    problem.trace = "".join(traceback.format_exception(error)).rstrip()
    return DataError(problem.message, problem.where, problem.trace)


class _Positioned(Dataset[Any]):
    """The data set addressed by (position in the stream, index), with its random numbers keyed by the position."""

    def __init__(self, dataset: Any, seed: int, key: str) -> None:
        self._dataset = dataset
        self._seed = seed
        self._key = key

    def __getitem__(self, where: tuple[int, int]) -> Any:
        position, index = where
        seed_everything(self._seed, 0x5A3F, position)
        try:
            return self._dataset[index]
        except Exception as error:
            return _explain(f"sample {index} of {self._key}", error)


class _Collate:
    def __init__(self, collate: Callable[[list[Any]], Any] | None) -> None:
        self._collate = collate or default_collate

    def __call__(self, samples: list[Any]) -> Any:
        for sample in samples:
            if isinstance(sample, DataError):
                return sample
        try:
            return self._collate(samples)
        except Exception as error:
            return _explain(f"collate of {len(samples)} samples", error)


def _prepare_loader(_: int) -> None:
    """Who stops a job may signal all its processes. A stop is the worker's affair, which ends its loaders itself."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


Pairs = list[tuple[int, int]]


class Plan(Protocol):
    def micro_batches(self, step: int) -> list[tuple[Pairs, int]]:
        """[(positions with their indices, how many of them count)]. A micro-batch without samples borrows one."""


def _chunks(pairs: Pairs, size: int, parts: int) -> list[tuple[Pairs, int]]:
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

    def micro_batches(self, step: int) -> list[tuple[Pairs, int]]:
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
        """Positions of the stream used up when `step` is done: what the checkpoint of that step holds."""
        return self._start_position + (step - self._start_step) * self._batch_size

    def micro_batches(self, step: int) -> list[tuple[Pairs, int]]:
        """[(positions with their indices, how many of them count)]. A micro-batch without samples borrows one."""
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


class Batches:
    """This rank's micro-batches, step after step. `next(step)` polls `interrupted` while it waits for loader
    processes and then returns None: the rank takes part in the stop although it has no data. A context manager: leaving
    it ends the loader processes."""

    def __init__(
        self,
        dataset: Any,
        plan: Plan,
        *,
        seed: int,
        start_step: int,
        steps: int,
        collate: Callable[[list[Any]], Any] | None,
        count: Count,
        workers: int,
        device: torch.device,
        key: str = "data.train",
    ) -> None:
        """`key`: what the data set is called in messages."""
        self._plan = plan
        self._steps = range(start_step + 1, steps + 1)
        self._count = count
        self._device = device
        loader: DataLoader[Any] = DataLoader(
            _Positioned(dataset, seed, key),
            batch_sampler=cast(Any, self._sampler()),
            num_workers=workers,
            collate_fn=_Collate(collate),
            pin_memory=device.type == "cuda",
            generator=torch.Generator().manual_seed(0),
            persistent_workers=False,
            worker_init_fn=_prepare_loader,
        )
        self._loaded: Iterator[Any] = iter(loader)
        self._queue: queue.Queue[Any] | None = None
        self._closed = False
        if workers:
            # A thread waits for the loader processes, so that this one can see a stop request. Without loader
            # processes samples are read right here: the data set's random numbers are this process's.
            self._queue = queue.Queue(maxsize=1)
            self._thread = threading.Thread(target=self._pump, args=(self._queue,), name="dtrain-loader", daemon=True)
            self._thread.start()

    def __enter__(self) -> Batches:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Ends the loader processes, which may be in the middle of a sample. Twice does no harm."""
        if self._queue is None or self._closed:
            return
        self._closed = True
        with contextlib.suppress(queue.Empty):
            self._queue.get_nowait()  # the thread may wait for room
        # Torch offers no way to end an iterator that another thread is in, and its own way waits for samples in work.
        loaded = cast(Any, self._loaded)
        loaded._workers_done_event.set()
        self._thread.join(timeout=_POLL_S)
        if loaded._worker_pids_set:  # from here on their deaths are no failure
            loaded._worker_pids_set = False
            with contextlib.suppress(ValueError):
                torch._C._remove_worker_pids(id(loaded))
        for requests in loaded._index_queues:
            with contextlib.suppress(ValueError, OSError):  # closed: it has ended by itself
                requests.put(None)  # torch's word for the end; who is not in a sample hears it at once
        deadline = time.monotonic() + _GRACE_S
        for loader in loaded._workers:
            loader.join(max(0.0, deadline - time.monotonic()))
            loader.kill()
            loader.join()

    def _sampler(self) -> Iterator[Pairs]:
        for step in self._steps:
            for pairs, _ in self._plan.micro_batches(step):
                yield pairs

    def _pump(self, ready: queue.Queue[Any]) -> None:
        try:
            for batch in self._loaded:
                ready.put(batch)
                if self._closed:
                    return
        except BaseException as error:
            if not self._closed:
                ready.put(error)

    def next(self, step: int, interrupted: Callable[[], bool]) -> list[MicroBatch] | None:
        """Raises what the data set raised."""
        result = []
        for pairs, weight in self._plan.micro_batches(step):
            batch = self._take(interrupted)
            if batch is None:
                return None
            count = float(self._count(batch)) if weight else 0.0
            indices = tuple(index for _, index in pairs[:weight])
            result.append(MicroBatch(batch=to_device(batch, self._device), count=count, weight=weight, indices=indices))
        return result

    def _take(self, interrupted: Callable[[], bool]) -> Any:
        if self._queue is None:
            return None if interrupted() else next(self._loaded)
        while True:
            try:
                batch = self._queue.get(timeout=_POLL_S)
            except queue.Empty:
                if interrupted():
                    return None
                continue
            if isinstance(batch, BaseException):
                raise batch
            return batch


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
