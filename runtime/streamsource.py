"""Which samples of an iterable data set a rank reads, and where its streams stand: the sources of training and of one
pass. Reading a stream is streams.py's; what a checkpoint holds is complete on rank 0 only.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dtrain.cluster.errors import UsageError
from dtrain.runtime.data import Portion
from dtrain.runtime.shares import dealt_positions, keeps_state, num_classes, num_micro_batches, samples_used, streams_of
from dtrain.runtime.streams import Place, Stream


@dataclass(frozen=True, slots=True, kw_only=True)
class Dealing:
    """How a job's samples are dealt to its ranks, and which rank this is."""

    num_streams: int
    batch_size: int
    micro_batch: int | None
    rank: int
    world_size: int

    @property
    def first_stream(self) -> int:
        """Of those that this rank reads."""
        return streams_of(self.rank, self.world_size, self.num_streams)[0]

    @property
    def num_parts(self) -> int:
        return num_micro_batches(self.batch_size, self.world_size, self.micro_batch)


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamPart:
    """A micro-batch: these positions, of which `weight` count (0: one is borrowed). `stop`: where the step ends, in its
    last part."""

    positions: Sequence[int]
    weight: int
    stop: int | None


class StreamSource:
    """Keeps data.Source: position p of the run is sample p // L of stream p % L, and rank p % W's."""

    num_steps: int | None = None
    max_loaders: int | None = 1  # streams are read one sample after the other

    def __init__(
        self,
        dealing: Dealing,
        make_stream: Callable[[int], Stream],
        *,
        start_step: int,
        start_position: int,
        gather: Callable[[bytes], list[bytes]],
    ) -> None:
        """`gather`: what each rank says, on global rank 0; collective."""
        self._dealing = dealing
        self._make_stream = make_stream
        self._start_step = start_step
        self._start_position = start_position
        self._gather = gather
        self._streams: dict[int, Stream] = {}
        self._last: tuple[int, Any] | None = None  # position and sample, to borrow

    def parts(self, step: int) -> list[StreamPart]:
        dealing = self._dealing
        stop = self._position(step)
        first = stop - dealing.batch_size
        mine = dealt_positions(first, stop, dealing.rank, dealing.world_size)
        cuts = [len(mine) * part // dealing.num_parts for part in range(dealing.num_parts + 1)]
        chunks = [mine[begin:end] for begin, end in itertools.pairwise(cuts)]
        return [
            StreamPart(
                positions=chunk or [mine[0] if mine else first],
                weight=len(chunk),
                stop=stop if number == dealing.num_parts else None,
            )
            for number, chunk in enumerate(chunks, start=1)
        ]

    def __getitems__(self, part: StreamPart) -> Portion:
        if part.weight or self._last is None:
            samples = [self._take(position) for position in part.positions]
        else:
            samples = [self._last[1]]  # one that was read already: nothing is read for a rank without samples
        mark = "" if part.stop is None else self._mark(part.stop)
        return Portion(samples=samples, weight=part.weight, indices=tuple(part.positions[: part.weight]), mark=mark)

    def place(self, step: int, mark: str) -> dict[str, Any]:
        position = self._position(step)
        places: dict[str, Any] = {}
        everybody = self._gather(mark.encode())
        for said in everybody:
            places |= json.loads(said)
        if not everybody:
            return {"position": position}
        return {"position": position, "streams": [places[str(s)] for s in range(self._dealing.num_streams)]}

    def check_state(self) -> None:
        """Raises UsageError where a checkpoint could not say where the data stands. Looks at one stream of this rank:
        the others are of the same kind."""
        self._stream(self._dealing.first_stream).check_state()

    def _position(self, step: int) -> int:
        return self._start_position + (step - self._start_step) * self._dealing.batch_size

    def _stream(self, stream: int) -> Stream:
        if stream not in self._streams:
            self._streams[stream] = self._make_stream(stream)
        return self._streams[stream]

    def _take(self, position: int) -> Any:
        if self._last is None or self._last[0] != position:  # it may have been borrowed before its turn
            number, stream = divmod(position, self._dealing.num_streams)
            self._stream(stream).advance(number)
            self._last = (position, self._stream(stream).read())
        return self._last[1]

    def _mark(self, stop: int) -> str:
        """Where the streams that this rank answers for stand at the end of a step."""
        dealing, places = self._dealing, {}
        for stream in streams_of(dealing.rank, dealing.world_size, dealing.num_streams):
            if keeps_state(stream, dealing.rank, dealing.world_size, dealing.num_streams):
                self._stream(stream).advance(samples_used(stop, stream, dealing.num_streams))
                places[stream] = self._stream(stream).place().to_json()
        return json.dumps(places, allow_nan=False)


def saved_places(place: Mapping[str, Any], num_streams: int) -> list[Place]:
    """Of each stream, from a checkpoint's record; nothing at the beginning. Raises UsageError where the checkpoint is
    another kind of data set's, CheckpointError where it can't be read."""
    if not place:
        return [Place()] * num_streams
    found = place.get("streams")
    if not isinstance(found, list):
        raise UsageError("data.train: the checkpoint was saved with a map-style data set, and this one is iterable")
    if len(found) != num_streams:
        raise UsageError(
            f"data.streams: the checkpoint holds {len(found)} streams, and {num_streams} are asked for. The order of "
            f"the samples rests on it. Set {len(found)}"
        )
    return [Place.from_json(value) for value in found]


class StreamPass:
    """Keeps data.Source: one pass over all streams, each sample on one rank. The streams that several ranks read are
    read in turn, until all have ended, and those ranks take their samples in turn."""

    num_steps: int | None = None
    max_loaders: int | None = 1  # streams are read one sample after the other

    def __init__(self, dealing: Dealing, make_stream: Callable[[int], Stream], key: str) -> None:
        self._dealing = dealing
        self._make_stream = make_stream
        self._key = key
        classes = num_classes(dealing.world_size, dealing.num_streams)
        mine = streams_of(dealing.rank, dealing.world_size, dealing.num_streams)
        self._ranks_together = dealing.world_size // classes
        self._turn = dealing.rank // classes
        self._streams = [make_stream(stream) for stream in mine]  # those that have not ended, next one first
        self._others = [stream for stream in range(dealing.num_streams) if stream not in mine]
        self._number = 0  # of the samples that these ranks have read
        self._last: list[Any] = []  # a sample to borrow

    def parts(self, step: int) -> list[int]:
        """How many samples each micro-batch takes at most."""
        size, parts = -(-self._dealing.batch_size // self._dealing.world_size), self._dealing.num_parts
        return [size * (part + 1) // parts - size * part // parts for part in range(parts)]

    def __getitems__(self, size: int) -> Portion:
        samples: dict[int, Any] = {}  # by position
        while len(samples) < size and self._streams:
            stream = self._streams.pop(0)
            found, sample = stream.read_pass()
            if not found:
                continue
            self._streams.append(stream)
            self._last = [sample]
            if self._number % self._ranks_together == self._turn:
                samples[(stream.count - 1) * self._dealing.num_streams + stream.number] = sample
            self._number += 1
        return Portion(samples=list(samples.values()) or self._borrow(), weight=len(samples), indices=tuple(samples))

    def place(self, step: int, mark: str) -> dict[str, Any]:
        return {}

    def _borrow(self) -> list[Any]:
        """A rank without any sample takes the first one of another's stream."""
        while not self._last and self._others:
            found, sample = self._make_stream(self._others.pop(0)).read_pass()
            self._last = [sample] if found else []
        if not self._last:
            raise UsageError(f"{self._key}: the data set is empty")
        return self._last
