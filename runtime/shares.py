"""Which samples of a batch, and which streams, are whose: arithmetic on whole numbers. The checks before a launch use
it too, which do without numpy: to import it would be a quarter of what they import.
"""

from __future__ import annotations

import math


def rank_slice(batch_size: int, rank: int, world_size: int) -> range:
    """The part of a global batch that a rank computes: contiguous, sizes differ by at most one."""
    return range(rank * batch_size // world_size, (rank + 1) * batch_size // world_size)


def num_micro_batches(batch_size: int, world_size: int, micro_batch: int | None) -> int:
    """Forwards a step, the same on every rank because collectives are counted."""
    largest = -(-batch_size // world_size)
    return 1 if micro_batch is None else -(-largest // micro_batch)


def num_samples_at_once(batch_size: int, world_size: int, micro_batch: int | None) -> int:
    """Samples of the largest micro-batch."""
    largest = -(-batch_size // world_size)
    return largest if micro_batch is None else min(largest, micro_batch)


def num_classes(world_size: int, num_streams: int) -> int:
    """An iterable's position p is stream p % L's, and rank p % W's: so rank r meets the streams s that are equal to it
    modulo gcd(L, W), and no others. Where L is a multiple of W, each stream is one rank's own."""
    return math.gcd(world_size, num_streams)


def streams_of(rank: int, world_size: int, num_streams: int) -> range:
    """The streams that a rank reads."""
    classes = num_classes(world_size, num_streams)
    return range(rank % classes, num_streams, classes)


def keeps_state(stream: int, rank: int, world_size: int, num_streams: int) -> bool:
    """Whether `rank`, one of those that read the stream, is the one that says where it stands."""
    return rank == stream % num_classes(world_size, num_streams)


def samples_used(position: int, stream: int, num_streams: int) -> int:
    """How many samples of a stream lie before a position of the run."""
    return (position - stream + num_streams - 1) // num_streams


def dealt_positions(first: int, stop: int, rank: int, world_size: int) -> range:
    """The positions from `first` on and before `stop` that are a rank's: numbers differ by at most one."""
    return range(first + (rank - first) % world_size, stop, world_size)
