"""Iterable data sets of every kind that dtrain reads, and some that go wrong. A sample is the tensor [file, row, drawn
number]; `seen` keeps a record of what was read for training as `parity.Tokens` does."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info


def sample(file: int, row: int) -> Tensor:
    """With a random number: an augmentation."""
    return torch.tensor([file, row, int(torch.randint(1 << 20, ()))])


class Files(IterableDataset[Any]):
    """Files of unequal lengths, in an order of their own each epoch, dealt to loader processes as torch's documentation
    shows. Its state is where it stands."""

    def __init__(self, lengths: list[int], fail_at: int = -1) -> None:
        self.lengths = lengths
        self.fail_at = fail_at
        self.epoch = 0
        self.read = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def state_dict(self) -> dict[str, Any]:
        return {"read": self.read, "random": torch.get_rng_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        assert state["random"].dtype == torch.uint8
        self.read = state["read"]

    def files(self) -> list[int]:
        info = get_worker_info()
        files = list(range(len(self.lengths)))
        return files if info is None else files[info.id :: info.num_workers]

    def __iter__(self) -> Iterator[Tensor]:
        rows = [(file, row) for file in self.files() for row in range(self.lengths[file])]
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(self.epoch)).tolist()
        for number in order[self.read :]:
            self.read += 1
            if number == self.fail_at:
                raise ConnectionResetError("planted")
            yield sample(*rows[number])
        self.read = 0


class Sharded:
    """As Hugging Face's streaming data sets: shard() gives another object; the state counts, from where set_epoch put
    it. No Dataset of torch's."""

    def __init__(self, lengths: list[int]) -> None:
        self.lengths = dict(enumerate(lengths))
        self.epoch = 0
        self.starting: dict[str, int] | None = None
        self.at: dict[str, int] | None = None

    def shard(self, num_shards: int, index: int) -> Sharded:
        if num_shards > len(self.lengths):
            raise IndexError(f"{num_shards} shards of {len(self.lengths)} files")
        part = Sharded([])
        part.lengths = dict(list(self.lengths.items())[index::num_shards])
        return part

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def state_dict(self) -> dict[str, int] | None:
        return self.at

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.starting = dict(state)

    def __iter__(self) -> Iterator[Tensor]:
        assert get_worker_info() is None or get_worker_info().num_workers == 1  # type: ignore[union-attr]
        starting = self.starting if self.starting and self.starting["epoch"] == self.epoch else {"rows": 0}
        rows = [(file, row) for file, length in self.lengths.items() for row in range(length)]
        for number in range(starting["rows"], len(rows)):
            self.at = {"epoch": self.epoch, "rows": number + 1}
            yield sample(*rows[(number + self.epoch) % len(rows)])


class Rows:
    """An iterator with a state of its own; the target takes the stream's number."""

    def __init__(self, lengths: list[int], stream: int, num_streams: int) -> None:
        self.rows = [(f, row) for f in range(stream, len(lengths), num_streams) for row in range(lengths[f])]

    def __iter__(self) -> RowIterator:
        return RowIterator(self.rows)


class RowIterator:
    def __init__(self, rows: list[tuple[int, int]]) -> None:
        self.rows = rows
        self.at = (0, "row")

    def __iter__(self) -> RowIterator:
        return self

    def __next__(self) -> Tensor:
        if self.at[0] == len(self.rows):
            raise StopIteration
        self.at = (self.at[0] + 1, "row")
        return sample(*self.rows[self.at[0] - 1])

    def state_dict(self) -> dict[str, Any]:
        return {"at": self.at}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.at = state["at"]
        assert isinstance(self.at, tuple)


def generated(lengths: list[int], stream: int = 0, num_streams: int = 1) -> Iterator[Tensor]:
    """A generator: no state, and used up by one pass."""
    for file in range(stream, len(lengths), num_streams):
        for row in range(lengths[file]):
            yield sample(file, row)


class Unsharded(IterableDataset[Any]):
    """Gives the same samples to whoever asks."""

    def __iter__(self) -> Iterator[Tensor]:
        for row in range(10):
            yield sample(0, row)


class Unspeakable(Unsharded):
    def state_dict(self) -> dict[str, Any]:
        return {"shuffle": {"buffer": [object()]}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        raise AssertionError


class Once(Unsharded):
    """Is empty the second time."""

    left = True

    def __iter__(self) -> Iterator[Tensor]:
        if self.left:
            self.left = False
            yield from super().__iter__()


class Sequences(Files):
    """Sequences with a pattern, for the parity model; what has been read is written down."""

    def __init__(self, lengths: list[int], seen: str | None = None, delay_s: float = 0.0) -> None:
        super().__init__(lengths)
        self.seen, self.delay_s = seen, delay_s

    def __iter__(self) -> Iterator[Any]:
        import time

        for file, row, drawn in super().__iter__():
            time.sleep(self.delay_s)
            if self.seen:
                with open(f"{self.seen}.{os.getpid()}", "a") as record:
                    record.write(f"{file}/{row}\n")
            tokens = (file * 37 + row * 5 + torch.arange(17) * (1 + row % 3)) % 1024
            inputs = torch.where(torch.arange(16) == drawn % 16, drawn % 1024, tokens[:-1])
            yield inputs, tokens[1:]


class SequencesWithoutState(Sequences):
    state_dict = load_state_dict = None  # type: ignore[assignment]
