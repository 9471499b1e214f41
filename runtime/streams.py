"""One logical stream of an iterable data set: its samples one after the other, epoch after epoch, and where it stands.

How stream i of L is told to give its share: `.shard(num_shards=, index=)`, else the target's own keywords `stream` and
`num_streams`, else torch's get_worker_info(). Which rank reads which stream: streamsource.py.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch.utils.data._utils.worker as torch_worker

from dtrain.cluster.errors import CheckpointError, UsageError
from dtrain.runtime import streamstate
from dtrain.runtime.data import DataError, Interrupted, explain, seed_everything
from dtrain.runtime.order import mix

_END = object()
_LARGEST_STATE = 16 << 20  # bytes of JSON: states are part of the manifest, which every rank reads


class WorkerInfo:
    """What torch's get_worker_info() says while a stream is read: as if each stream had a loader process of its own.
    `asked`: whether the data set has looked at it, without which all streams would be the same samples."""

    def __init__(self, stream: int, num_streams: int, seed: int, dataset: Any) -> None:
        self.asked = False
        self.seed = mix(seed, 0x30F0, stream) & (2**63 - 1)
        self.dataset = dataset
        self.rng = None
        self.worker_method = "multiprocessing"
        self._stream = stream
        self._num_streams = num_streams

    @property
    def id(self) -> int:
        self.asked = True
        return self._stream

    @property
    def num_workers(self) -> int:
        self.asked = True
        return self._num_streams


@contextlib.contextmanager
def _seen(info: WorkerInfo | None) -> Iterator[None]:
    """get_worker_info() says `info`. Torch has no public way to say it (2.13)."""
    module = cast(Any, torch_worker)
    before = module._worker_info
    module._worker_info = info
    try:
        yield
    finally:
        module._worker_info = before


Opened = tuple[Any, WorkerInfo | None]  # a data set, and what it is told through torch's get_worker_info()


@dataclass(frozen=True, slots=True, kw_only=True)
class Opener:
    """Makes the data set that gives one stream. `build`: calls the target, with more keywords if any."""

    build: Callable[..., Any]
    num_streams: int
    takes_stream: bool
    seed: int
    key: str  # what the data set is called in messages

    def __call__(self, stream: int) -> Opened:
        """Raises UsageError where the data set can't be sharded."""
        more = {"stream": stream, "num_streams": self.num_streams} if self.takes_stream else {}
        return self.share(stream, self.build(**more))

    def share(self, stream: int, data: Any) -> Opened:
        """The same, of a data set that has just been built, for this stream where it takes one."""
        if self.takes_stream or self.num_streams == 1:
            return data, None
        if not callable(shard := getattr(data, "shard", None)):
            return data, WorkerInfo(stream, self.num_streams, self.seed, data)
        try:
            return shard(num_shards=self.num_streams, index=stream), None
        except Exception as error:
            what = f"{self.key}: shard(num_shards={self.num_streams}, index={stream}) of {type(data).__name__}"
            raise UsageError(f"{what} raised {type(error).__name__}: {error}. Set fewer data.streams?") from error


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where a stream stands: `offset` samples into its epoch. `state`: what the data set, or its iterator, says of that
    (`holder`); None where it is not asked or nothing of the epoch was read."""

    epoch: int = 0
    offset: int = 0
    holder: str = ""
    state: streamstate.Json = None

    @classmethod
    def from_json(cls, value: Any) -> Place:
        """Raises CheckpointError."""
        try:
            epoch, offset = int(value["epoch"]), int(value["offset"])
            return cls(epoch=epoch, offset=offset, holder=str(value.get("holder", "")), state=value.get("state"))
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"the place of a data stream can't be read: {error!r}") from error

    def to_json(self) -> dict[str, Any]:
        place = {"epoch": self.epoch, "offset": self.offset}
        return {**place, "holder": self.holder, "state": self.state} if self.holder else place


def has_state(value: object) -> bool:
    return callable(getattr(value, "state_dict", None)) and callable(getattr(value, "load_state_dict", None))


class Stream:
    """Reads one stream, the `number`-th from 0. `count` samples of it have been handed out since the run began."""

    def __init__(
        self,
        opener: Opener,
        stream: int,
        *,
        resume: str = "",
        count: int = 0,
        place: Place | None = None,
        opened: Opened | None = None,
        stop_requested: Callable[[], bool],
    ) -> None:
        """`resume`: data.resume, or "" for a single pass. `place`: after `count` samples. `opened`: what the
        opener gave, where it has been asked. Raises UsageError where the stream can't be put there."""
        place = place or Place()
        self.count = count
        self._opener = opener
        self.number = stream
        self._resume = resume
        self._stop_requested = stop_requested
        self._name = f"stream {stream} of {opener.key}"
        self._epoch = place.epoch
        self._offset = 0 if resume != "state" else place.offset
        self._saved = place if self._offset else None
        self._skip_to = count
        if resume == "skip":
            self.count -= place.offset  # read again and dropped on the way to the first sample that is asked for
        self._data: Any
        self._info: WorkerInfo | None
        self._data, self._info = opened or (None, None)
        self._begun = False  # the data set at hand has been iterated
        self._iterator: Iterator[Any] | None = None
        self._place: tuple[int, Place] | None = None  # what place() said last, at which count
        if self._saved is not None and not self._saved.holder:
            raise UsageError(
                f"data.resume: the checkpoint holds no state of {self._name}, which was not asked for it when it was "
                "saved. Set data.resume: skip, or restart"
            )

    def check_state(self) -> None:
        """Raises UsageError where neither the data set nor its iterator can say where it stands."""
        if self._resume != "state" or has_state(self._open()):
            return
        seed_everything(self._opener.seed, 0x17E4, self.number, self._epoch)
        with _seen(self._info):
            found = has_state(iter(self._data))
        if not found:
            raise UsageError(
                f"{self._opener.key}: {type(self._data).__name__} has no state_dict() and load_state_dict(), so a run "
                "that is interrupted could not go on where its data stood. Give the data set (or its iterator) both, "
                "or set data.resume: skip (what was used is read again and dropped: exact where the data set gives the "
                "same samples again) or data.resume: restart (the epoch begins again: not exact)"
            )

    def advance(self, count: int) -> None:
        """Reads and drops until `count` samples have been handed out. Raises Interrupted."""
        while self.count < count:
            if self._stop_requested():
                raise Interrupted
            self.read()

    def read(self) -> Any:
        """The next sample. Raises DataError, and UsageError for a stream without samples."""
        while (sample := self._next()) is _END:
            self._check_end()
            self._epoch, self._offset, self._iterator = self._epoch + 1, 0, None
        return sample

    def read_pass(self) -> tuple[bool, Any]:
        """(True, the next sample) or, at the end of the pass, (False, None)."""
        sample = self._next()
        return (False, None) if sample is _END else (True, sample)

    def place(self) -> Place:
        """Where the stream stands now. Raises UsageError for a state that a checkpoint can't hold."""
        if self._place is None or self._place[0] != self.count:
            self._place = (self.count, self._ask_place())
        return self._place[1]

    def _ask_place(self) -> Place:
        if self._saved is not None:
            return self._saved
        place = Place(epoch=self._epoch, offset=self._offset)
        if self._resume != "state" or not self._offset:
            return place
        by_iterator = has_state(self._iterator)
        what = f"state_dict() of {self._name}"
        try:
            state = cast(Any, self._iterator if by_iterator else self._data).state_dict()
        except Exception as error:
            raise explain(what, error) from error
        encoded = streamstate.encode(state, what)
        if (size := streamstate.size_bytes(encoded)) > _LARGEST_STATE:
            raise UsageError(
                f"{what} takes {size:,} bytes, and {_LARGEST_STATE:,} is the most that a checkpoint's manifest takes. "
                "Keep where the data stands, not the data (a smaller shuffle buffer), or set data.resume: skip"
            )
        return Place(
            epoch=self._epoch, offset=self._offset, holder="iterator" if by_iterator else "data set", state=encoded
        )

    def _next(self) -> Any:
        if self._iterator is None:
            self._begin()
        seed_everything(self._opener.seed, 0x5A3F, self.count * self._opener.num_streams + self.number)
        try:
            with _seen(self._info):
                sample = next(cast(Iterator[Any], self._iterator), _END)
        except Exception as error:
            position = self.count * self._opener.num_streams + self.number
            what = f"{self._name}, sample {self._offset} of its epoch {self._epoch} (position {position} of the run)"
            raise explain(what, error) from error
        if self._info is not None and not self._info.asked:
            raise UsageError(_unsharded(self._opener, type(self._data).__name__))
        if sample is not _END:
            self.count, self._offset = self.count + 1, self._offset + 1
        return sample

    def _begin(self) -> None:
        """The iterator of an epoch, put to where the checkpoint says."""
        saved, self._saved = self._saved, None
        if self._begun and isinstance(self._data, Iterator):  # it is used up: a generator, say
            self._data = None
        self._open()
        self._begun = True
        try:
            if callable(set_epoch := getattr(self._data, "set_epoch", None)):
                set_epoch(self._epoch)
            if saved is not None and saved.holder == "data set":
                self._put_back(self._data, saved)
            seed_everything(self._opener.seed, 0x17E4, self.number, self._epoch)
            with _seen(self._info):
                self._iterator = iter(self._data)
            if saved is not None and saved.holder == "iterator":
                self._put_back(self._iterator, saved)
        except (DataError, UsageError):
            raise
        except Exception as error:
            raise explain(f"{self._name}, at the beginning of its epoch {self._epoch}", error) from error

    def _put_back(self, holder: Any, saved: Place) -> None:
        if not has_state(holder):
            raise UsageError(
                f"{self._name}: the checkpoint holds the state of its {saved.holder}, a {type(holder).__name__} that "
                "has no load_state_dict() now. Set data.resume: skip, or restart"
            )
        try:
            holder.load_state_dict(streamstate.decode(saved.state))
        except Exception as error:
            what = f"load_state_dict() of {self._name}, after {saved.offset} samples of epoch {saved.epoch}"
            raise explain(what, error) from error

    def _open(self) -> Any:
        if self._data is None:
            self._data, self._info = self._opener(self.number)
        return self._data

    def _check_end(self) -> None:
        if self.count < self._skip_to:
            raise UsageError(
                f"{self._name} ended after {self._offset} samples of epoch {self._epoch}, of which the checkpoint has "
                f"used {self._offset + self._skip_to - self.count}: it does not give the same samples again, so "
                "data.resume: skip can't be exact. Give it a state_dict(), or set data.resume: restart"
            )
        if self._offset:
            return
        if self._epoch:
            raise UsageError(
                f"{self._name} gave nothing in epoch {self._epoch}: its __iter__ must begin anew each time"
            )
        several = self._opener.num_streams > 1
        raise UsageError(f"{self._name} is empty" + (". Set fewer data.streams" if several else ""))


def _unsharded(opener: Opener, name: str) -> str:
    return (
        f"{opener.key}: all of the {opener.num_streams} streams would be the same samples: {name} has no "
        "shard(num_shards=, index=), its target no keywords stream and num_streams, and it does not ask "
        "torch.utils.data.get_worker_info(). Give it one of them, or set data.streams: 1"
    )
