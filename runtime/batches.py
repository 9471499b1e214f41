"""This rank's micro-batches, step after step: a source's samples put together, in loader processes where asked for.

What is read, and in which order, is the source's affair (data.py: map-style, streams.py: iterable). A step's mark comes
with its samples, so the place that a checkpoint keeps is what training has used, never what was read ahead.
"""

from __future__ import annotations

import contextlib
import itertools
import queue
import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Any, NamedTuple, cast

import torch
from torch.utils.data import DataLoader, default_collate, get_worker_info

from dtrain.cluster.errors import UsageError
from dtrain.runtime.data import Count, DataError, Interrupted, Portion, Source, explain, to_device
from dtrain.strategies.protocol import MicroBatch

_POLL_S = 0.1
_GRACE_S = 1.0  # for a loader process to end by itself and take its temporary files along


class _Loaded(NamedTuple):
    """A micro-batch on its way: plain parts, which torch's loader can send and pin."""

    batch: Any
    weight: int
    indices: tuple[int, ...]
    mark: str


class _Reader:
    """The source as torch's loader sees it. In a loader process what goes wrong is handed on as a value: torch would
    raise another error of the same class, with its own words."""

    def __init__(self, source: Source) -> None:
        self._source = source

    def __getitems__(self, part: Any) -> Portion | Exception:
        try:
            return self._source.__getitems__(part)
        except (DataError, UsageError) as error:
            return _hand_on(error)


class _Collate:
    def __init__(self, collate: Callable[[list[Any]], Any] | None) -> None:
        self._collate = collate or default_collate

    def __call__(self, portion: Portion | Exception) -> _Loaded | Exception:
        if isinstance(portion, Exception):
            return portion
        try:
            batch = self._collate(portion.samples)
        except Exception as error:
            return _hand_on(explain(_what_failed(portion), error))
        return _Loaded(batch, portion.weight, portion.indices, portion.mark)


def _what_failed(portion: Portion) -> str:
    """A forgotten `return` shows only here, as a None that torch can't collate."""
    collate = f"collate of {len(portion.samples)} samples"
    nothing = [index for index, sample in zip(portion.indices, portion.samples, strict=False) if sample is None]
    if not nothing:
        return collate
    more = f" and {len(nothing) - 1} more" if len(nothing) > 1 else ""
    return f"the data set returned None for sample {nothing[0]}{more}; {collate}"


def _hand_on(error: DataError | UsageError) -> Exception:
    """Raises here, where the traceback is real; a loader process returns it for the worker to raise."""
    if get_worker_info() is None:
        raise error
    if isinstance(error, UsageError):
        return UsageError(str(error))
    cause = error.__cause__ or error
    return DataError(error.message, error.where, "".join(traceback.format_exception(cause)).rstrip())


def _prepare_loader(_: int) -> None:
    """Who stops a job may signal all its processes. A stop is the worker's affair, which ends its loaders itself."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


class Batches:
    """This rank's micro-batches, step after step. `next(step)` polls `interrupted` while it waits for loader
    processes and then returns None: the rank takes part in the stop although it has no data. A context manager: leaving
    it ends the loader processes."""

    def __init__(
        self,
        source: Source,
        *,
        start_step: int,
        steps: int | None,
        collate: Callable[[list[Any]], Any] | None,
        count: Count,
        workers: int,
        device: torch.device,
    ) -> None:
        """`steps`: the last one; None: as many as are asked for."""
        self._source = source
        self._steps = itertools.count(start_step + 1) if steps is None else range(start_step + 1, steps + 1)
        self._count = count
        self._device = device
        self._marks: dict[int, str] = {}
        workers = workers if source.max_loaders is None else min(workers, source.max_loaders)
        self._queue: queue.Queue[Any] | None = None
        self._closed = False
        reader, together, pin = _Reader(source), _Collate(collate), device.type == "cuda"
        if not workers and not pin:
            # Samples are read right here, the data set's random numbers are this process's: a loader would add nothing.
            self._loaded: Iterator[Any] = (together(reader.__getitems__(part)) for part in self._sampler())
            return
        loader: DataLoader[Any] = DataLoader(
            cast(Any, reader),
            batch_sampler=cast(Any, self._sampler()),
            num_workers=workers,
            collate_fn=cast(Any, together),
            pin_memory=pin,
            generator=torch.Generator().manual_seed(0),
            persistent_workers=False,
            worker_init_fn=_prepare_loader,
        )
        self._loaded = iter(loader)
        if workers:  # a thread waits for them, so that this one can see a stop request
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

    def _sampler(self) -> Iterator[Any]:
        for step in self._steps:
            yield from self._source.parts(step)

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
        for _ in self._source.parts(step):
            loaded: _Loaded | None = self._take(interrupted)
            if loaded is None:
                return None
            batch, weight, indices, mark = loaded
            count = float(self._count(batch)) if weight else 0.0
            batch = to_device(batch, self._device)
            result.append(MicroBatch(batch=batch, count=count, weight=weight, indices=tuple(indices)))
            self._marks[step] = mark
        self._marks.pop(step - 2, None)  # a stop is agreed on after the next step has been read
        return result

    def place(self, step: int) -> dict[str, Any]:
        """What a checkpoint after `step` holds, which is the last step that was read or the one before. Collective."""
        return self._source.place(step, self._marks.get(step, ""))

    def _take(self, interrupted: Callable[[], bool]) -> Any:
        if self._queue is None:
            try:
                return None if interrupted() else next(self._loaded)
            except Interrupted:
                return None
        while True:
            try:
                batch = self._queue.get(timeout=_POLL_S)
            except queue.Empty:
                if interrupted():
                    return None
                continue
            if isinstance(batch, Interrupted):  # the stop came before its process was forked
                return None
            if isinstance(batch, BaseException):
                raise batch
            return batch
