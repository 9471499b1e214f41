"""Iterable data sets: which samples a step sees, where the streams stand, and what is refused. One process plays all
ranks; real ranks train on them in test_worker_streams.py."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dtrain.cluster.errors import CheckpointError, UsageError
from dtrain.runtime import streamstate
from dtrain.runtime.batches import Batches
from dtrain.runtime.config import DataConfig, RunConfig
from dtrain.runtime.data import DataError, count_samples
from dtrain.runtime.shares import dealt_positions, keeps_state, num_micro_batches, samples_used, streams_of
from dtrain.runtime.sources import evaluation_source, training_source
from dtrain.runtime.targetconfig import Target
from dtrain.strategies.degrees import DataRank, Degrees

CPU = torch.device("cpu")
LENGTHS = [5, 3, 8, 2, 6, 4, 7]
KINDS = ["Files", "Sharded", "Rows"]
Sample = tuple[int, ...]
Seen = list[list[Sample]]  # of each step: the samples of the ranks together, sorted


def never() -> bool:
    return False


def config(kind: str, *, eval_kind: str = "", kwargs: dict[str, Any] | None = None, **data: Any) -> RunConfig:
    def target(name: str) -> Target:
        return Target(target=f"streams.{name}", kwargs={"lengths": LENGTHS} if kwargs is None else kwargs)

    settings: dict[str, Any] = {"batch_size": 6, "streams": 4} | data
    section = DataConfig(train=target(kind), eval=target(eval_kind) if eval_kind else None, **settings)
    train = SimpleNamespace(seed=3, steps=1000, micro_batch=2, exact=None)
    return cast(RunConfig, SimpleNamespace(data=section, train=train))


def data_rank(rank: int, world_size: int) -> DataRank:
    return Degrees(replicate=world_size).data_rank(rank)


class Job:
    """All ranks of a job in this process, one after the other."""

    def __init__(
        self, run: RunConfig, world_size: int, *, step: int = 0, place: dict[str, Any] | None = None, workers: int = 0
    ) -> None:
        self.said: list[bytes] = []
        self.batches: list[Batches] = []
        self.step = step
        self.lines: list[str] = []
        for rank in range(world_size):
            source, self.lines = training_source(
                run,
                data_rank(rank, world_size),
                step,
                place or {},
                gather=self.gather,
                stop_requested=never,
            )
            self.batches.append(
                Batches(
                    source,
                    start_step=step,
                    steps=None,
                    collate=list,
                    count=len,
                    workers=workers,
                    device=CPU,
                )
            )

    def gather(self, said: bytes) -> list[bytes]:
        """On rank 0, which is asked last, what all said; nothing elsewhere."""
        self.said.append(said)
        return self.said if len(self.said) == len(self.batches) else []

    def __enter__(self) -> Job:
        return self

    def __exit__(self, *_: object) -> None:
        for batches in self.batches:
            batches.close()

    def run(self, steps: int) -> Seen:
        return [self.one_step() for _ in range(steps)]

    def one_step(self) -> list[Sample]:
        self.step += 1
        seen: list[Any] = []
        forwards = set()
        for batches in self.batches:
            parts = batches.next(self.step, never)
            assert parts is not None
            forwards.add(len(parts))
            for part in parts:
                assert part.batch, "a rank without samples borrows one"
                assert part.weight in (0, len(part.batch))
                assert part.weight == len(part.indices)
                seen += [(i, *s.tolist()) for i, s in zip(part.indices, part.batch[: part.weight], strict=True)]
        assert len(forwards) == 1
        return sorted(seen)

    def place(self, step: int | None = None) -> dict[str, Any]:
        """As it comes out of a checkpoint: rank 0's word, when all others have spoken."""
        self.said = []
        places = [batches.place(self.step if step is None else step) for batches in reversed(self.batches)]
        return places[-1]


@pytest.fixture(scope="module")
def whole() -> Callable[[str], Seen]:
    """What one rank sees that reads 30 steps without an interruption."""
    found: dict[str, Seen] = {}

    def run(kind: str) -> Seen:
        if kind not in found:
            with Job(config(kind), 1) as job:
                found[kind] = job.run(30)
        return found[kind]

    return run


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("world_size", [2, 3, 4, 5, 8])
def test_the_samples_of_a_step_are_the_same_at_any_world_size(
    whole: Callable[[str], Seen], kind: str, world_size: int
) -> None:
    """180 samples are five epochs of 35 and more, the drawn numbers included; at 8 ranks two have no samples."""
    with Job(config(kind), world_size) as job:
        assert job.run(30) == whole(kind)


@pytest.mark.parametrize("kind", [*KINDS, "generated"])
def test_an_epoch_is_every_sample_of_a_stream_once(kind: str) -> None:
    """Streams are of unequal lengths, so each begins its next epoch by itself."""
    with Job(config(kind, resume="state" if kind in KINDS else "skip"), 2) as job:
        seen = [sample for step in job.run(40) for sample in step]
    assert [sample[0] for sample in seen] == list(range(240))
    for stream in range(4):
        rows = [(file, row) for f in range(stream, 7, 4) for file, row in [(f, r) for r in range(LENGTHS[f])]]
        mine = [sample[1:3] for sample in seen if sample[0] % 4 == stream]
        for epoch in range(len(mine) // len(rows)):
            assert sorted(mine[epoch * len(rows) : (epoch + 1) * len(rows)]) == rows


@pytest.mark.parametrize(
    ("kind", "resume"), [*((kind, "state") for kind in KINDS), ("Files", "skip"), ("Rows", "skip")]
)
@pytest.mark.parametrize("interrupted_at", [1, 7, 13, 24])
@pytest.mark.parametrize("sizes", [(2, 4, 3), (3, 5, 1)])
def test_interrupted_and_resized_runs_see_the_same_samples(
    whole: Callable[[str], Seen], kind: str, resume: str, interrupted_at: int, sizes: tuple[int, int, int]
) -> None:
    """What has been read ahead is not in the checkpoint: it is of the step before. At 3 and 5 ranks, who keeps a
    stream's state does not use all of its samples."""
    run = config(kind, resume=resume)
    with Job(run, sizes[0]) as first:
        assert first.run(interrupted_at) == whole(kind)[:interrupted_at]
        first.one_step()
        place = first.place(interrupted_at)
    with Job(run, sizes[1], step=interrupted_at, place=place) as second:
        assert second.run(3) == whole(kind)[interrupted_at : interrupted_at + 3]
        place = second.place()
    with Job(run, sizes[2], step=interrupted_at + 3, place=place) as third:
        assert third.run(3) == whole(kind)[interrupted_at + 3 : interrupted_at + 6]


@pytest.mark.parametrize("streams", [1, 2, 3, 6])
def test_the_number_of_streams_is_part_of_the_order_and_the_world_size_is_not(streams: int) -> None:
    runs = []
    for world_size in (1, 2, 3):
        with Job(config("Files", streams=streams), world_size) as job:
            runs.append(job.run(12))
            place = job.place()
            assert len(place["streams"]) == streams
    assert runs[0] == runs[1] == runs[2]


def test_a_loader_process_changes_nothing_and_its_place_is_what_was_used(whole: Callable[[str], Seen]) -> None:
    run = config("Files")
    with Job(run, 2, workers=1) as job:
        assert job.run(8) == whole("Files")[:8]
        place = job.place()
    with Job(run, 3, step=8, place=place, workers=2) as job:
        assert job.run(6) == whole("Files")[8:14]


def test_restart_begins_the_epoch_again() -> None:
    run = config("Files", resume="restart", streams=1)
    with Job(run, 1) as job:
        first = job.run(8)  # 48 samples of epochs of 35
        place = job.place()
        assert place["streams"] == [{"epoch": 1, "offset": 13}]
    with Job(run, 1, step=8, place=place) as job:
        again = job.run(2)
    epoch = [sample for step in first for sample in step][35:]
    assert [s[1:3] for s in again[0]] == [s[1:3] for s in epoch[:6]]
    assert any("begins its epoch again; now 13 samples come again" in line for line in job.lines)


@given(
    first=st.integers(0, 200),
    size=st.integers(1, 40),
    world_size=st.integers(1, 9),
    num_streams=st.integers(1, 12),
    micro_batch=st.one_of(st.none(), st.integers(1, 9)),
)
@settings(max_examples=200)
def test_dealing(first: int, size: int, world_size: int, num_streams: int, micro_batch: int | None) -> None:
    dealt = [dealt_positions(first, first + size, rank, world_size) for rank in range(world_size)]
    assert sorted(p for positions in dealt for p in positions) == list(range(first, first + size))
    assert max(map(len, dealt)) - min(map(len, dealt)) <= 1
    most = num_micro_batches(size, world_size, micro_batch) * (micro_batch or size)
    assert max(map(len, dealt)) <= most
    for rank, positions in enumerate(dealt):
        mine = streams_of(rank, world_size, num_streams)
        assert {p % num_streams for p in positions} <= set(mine)
        assert len(mine) == num_streams // math.gcd(num_streams, world_size)
    for stream in range(num_streams):
        keepers = [r for r in range(world_size) if keeps_state(stream, r, world_size, num_streams)]
        (keeper,) = keepers
        assert stream in streams_of(keeper, world_size, num_streams)
        assert samples_used(first, stream, num_streams) == sum(p % num_streams == stream for p in range(first))


def passes(run: RunConfig, world_size: int, workers: int = 0) -> list[list[Any]]:
    """Each rank's samples of one pass, after an earlier one that was left in the middle."""
    seen = []
    for rank in range(world_size):
        make = evaluation_source(run, data_rank(rank, world_size), never)
        assert make is not None
        for steps in (2, None):
            source = make()
            with Batches(
                source, start_step=0, steps=None, collate=list, count=len, workers=workers, device=CPU
            ) as batches:
                mine: list[Any] = []
                for step in range(1, (steps or 60) + 1):
                    parts = batches.next(step, never)
                    assert parts is not None
                    for part in parts:
                        assert part.batch
                        mine += [tuple(s.tolist()) for s in part.batch[: part.weight]]
        seen.append(mine)
    return seen


@pytest.mark.parametrize("kind", ["Sharded", "Rows", "generated"])
@pytest.mark.parametrize(("world_size", "streams"), [(1, 1), (2, 1), (3, 1), (2, 4), (3, 4), (8, 4), (4, 7)])
def test_a_pass_is_every_sample_once_at_any_world_size(kind: str, world_size: int, streams: int) -> None:
    """The drawn numbers are the same ones, too: an evaluation does not depend on the layout."""
    seen = passes(config("Files", eval_kind=kind, streams=streams), world_size)
    (alone,) = passes(config("Files", eval_kind=kind, streams=streams), 1)
    assert sorted(sample for mine in seen for sample in mine) == sorted(alone)
    assert sorted(sample[:2] for sample in alone) == [(f, r) for f, n in enumerate(LENGTHS) for r in range(n)]
    if streams == 1:
        assert max(map(len, seen)) - min(map(len, seen)) <= 1


def test_a_rank_whose_streams_are_empty_borrows_a_sample_of_another() -> None:
    run = config("generated", eval_kind="generated", kwargs={"lengths": [5, 0]}, streams=2)
    seen = passes(run, 2, workers=1)
    assert [len(mine) for mine in seen] == [5, 0]


@pytest.mark.parametrize(
    ("kind", "data", "words"),
    [
        ("generated", {}, ["generator", "state_dict", "data.resume: skip", "data.resume: restart"]),
        ("Unsharded", {"resume": "skip"}, ["4 streams", "get_worker_info", "data.streams: 1"]),
        ("Unspeakable", {"streams": 1}, ["state_dict() of stream 0 of data.train['shuffle']['buffer'][0] is a object"]),
        ("Once", {"streams": 1, "resume": "skip"}, ["stream 0 of data.train gave nothing in epoch 1", "begin anew"]),
        ("Sharded", {"streams": 9}, ["shard(num_shards=9, index=0)", "9 shards of 7 files", "fewer"]),
        ("Rows", {"streams": 8}, ["stream 7 of data.train is empty", "fewer data.streams"]),
    ],
)
@pytest.mark.parametrize("workers", [0, 1])
def test_what_cant_be_exact_is_refused_with_the_ways_out(
    kind: str, data: dict[str, Any], words: list[str], workers: int
) -> None:
    kwargs = {"lengths": LENGTHS} if kind in ("generated", "Sharded", "Rows") else {}
    with pytest.raises(UsageError) as caught:  # noqa: SIM117  the job is made inside
        with Job(config(kind, kwargs=kwargs, **data), 1, workers=workers) as job:
            job.run(3)
    assert all(word in str(caught.value) for word in words), caught.value


def test_a_checkpoint_of_another_order_is_refused() -> None:
    with Job(config("Files", resume="skip"), 1) as job:
        job.run(3)
        place = job.place()
    cases: list[tuple[RunConfig, dict[str, Any], str]] = [
        (config("Files", streams=2), place, "holds 4 streams, and 2 are asked for"),
        (config("Files"), place, "holds no state of stream 0 of data.train"),
        (config("Files"), {"position": 18}, "was saved with a map-style data set"),
    ]
    for run, saved, words in cases:
        with pytest.raises(UsageError, match=words), Job(run, 1, step=3, place=saved) as job:
            job.run(1)


def test_skipping_a_stream_that_has_become_shorter_is_refused() -> None:
    run = config("Files", resume="skip", streams=1)
    with Job(run, 1) as job:
        job.run(3)
        place = job.place()
    shorter = config("Files", resume="skip", streams=1, kwargs={"lengths": [4]})
    with pytest.raises(UsageError, match="ended after 4 samples of epoch 0, of which the checkpoint has used 18"):
        Job(shorter, 1, step=3, place=place).run(1)


@pytest.mark.parametrize("workers", [0, 1])
def test_an_error_names_stream_and_position(workers: int) -> None:
    run = config("Files", kwargs={"lengths": LENGTHS, "fail_at": 20}, streams=1)
    number = torch.randperm(35, generator=torch.Generator().manual_seed(0)).tolist().index(20)
    with Job(run, 1, workers=workers) as job, pytest.raises(DataError) as caught:
        job.run(10)
    place = f"stream 0 of data.train, sample {number} of its epoch 0 (position {number} of the run)"
    assert f"{place}: ConnectionResetError: planted" in str(caught.value)
    assert caught.value.where.endswith("streams.py:" + str(line_of("planted")))
    assert ("__iter__" in caught.value.trace) == bool(workers)


def line_of(text: str) -> int:
    lines = (Path(__file__).parent / "assets" / "streams.py").read_text().splitlines()
    return next(number for number, line in enumerate(lines, start=1) if f'"{text}"' in line)


def test_a_stop_is_seen_while_samples_are_skipped() -> None:
    run = config("Files", resume="skip", streams=1)
    with Job(run, 1) as job:
        job.run(5)
        place = job.place()
    asked = iter([False] * 4)
    rank = data_rank(0, 1)
    source, _ = training_source(run, rank, 5, place, gather=job.gather, stop_requested=lambda: next(asked, True))
    with Batches(source, start_step=5, steps=9, collate=None, count=count_samples, workers=0, device=CPU) as batches:
        assert batches.next(6, never) is None


def test_what_a_person_is_told() -> None:
    for world_size, streams, words in [
        (1, 1, ["data      iterable, 1 stream"]),
        (2, 4, ["data      iterable, 4 streams, 2 a rank"]),
        (4, 6, ["data      iterable, 6 streams", "2 ranks read the same samples", "data.streams: 8 would"]),
    ]:
        with Job(config("Files", streams=streams), world_size) as job:
            text = "\n".join(job.lines)
        assert all(word in text for word in words), text


@pytest.mark.parametrize(
    "state",
    [
        {"a": [1, 2.5, None, True, "text", float("-inf"), 2**100]},
        {1: "one", ("x", 2): b"\x00\xff", "$tuple": {"$x": ()}},
        random.getstate(),
        {"empty": {}, "list": [], "nested": ({"deep": (1, [2])},)},
    ],
)
def test_states_come_back_as_they_were(state: Any) -> None:
    assert streamstate.decode(streamstate.encode(state, "state")) == state


def test_tensors_and_arrays_come_back_as_they_were() -> None:
    tensors = [torch.get_rng_state(), torch.ones((), dtype=torch.bfloat16), torch.empty(0, 3), torch.eye(3)[:, 1]]
    for tensor in tensors:
        again = streamstate.decode(streamstate.encode(tensor, "state"))
        assert again.dtype == tensor.dtype
        assert torch.equal(again, tensor)
    arrays: list[Any] = [np.arange(6.0).reshape(2, 3), np.int64(7), np.random.default_rng(1).bit_generator.state]
    for array in arrays:
        again = streamstate.decode(streamstate.encode(array, "state"))
        assert type(again) is type(array)
        assert str(again) == str(array)
    with pytest.raises(CheckpointError, match=r"\$numpy"):
        streamstate.decode({"$numpy": ["O", [1], "AAAA"]})


def test_a_state_that_cant_be_put_back_says_whose_it_is() -> None:
    with Job(config("Files"), 1) as job:
        job.run(3)
        place = job.place()
    place["streams"][2]["state"] = {"read": 4}
    with pytest.raises(
        DataError, match=r"load_state_dict\(\) of stream 2 of data.train, after 4 samples of epoch 0: Key"
    ):
        Job(config("Files"), 1, step=3, place=place).run(1)
