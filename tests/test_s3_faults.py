"""200 seeded schedules of what networks, busy servers and dying processes do between a saving run and its S3 store.

In each, two or three attempts of two ranks save steps through a proxy that refuses, resets, stalls, delays and loses
replies; some are killed between two requests, some live on while the next attempt runs. Whatever happened, at the end
every live step is what was saved as that step by that attempt, and what was acknowledged to a run is there.

Most run against an endpoint in memory (it is quick), the rest against moto. DTRAIN_FAULT_SEED=N runs schedule N alone.
"""

from __future__ import annotations

import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, suppress
from dataclasses import dataclass
from random import Random
from typing import Any

import pytest
import torch
from faultproxy import FAULTS, NO_FAULTS, FaultProxy, Schedule
from mortal import Killed, Life, Mortal, MortalBoard
from s3servers import S3Server, environment, memory, moto

from dtrain.cluster.errors import DtrainError, FencedError, StorageError
from dtrain.cluster.storage import Storage
from dtrain.runtime.checkpoint.attempts import claim_attempt, live_checkpoints, newest_live
from dtrain.runtime.checkpoint.checkpointer import Checkpointer
from dtrain.runtime.checkpoint.garbage import find_garbage
from dtrain.runtime.checkpoint.loader import load_tensors
from dtrain.runtime.checkpoint.read import read_manifest
from dtrain.runtime.checkpoint.verify import verify_checkpoint
from dtrain.runtime.stores.limits import Limits
from dtrain.runtime.stores.objects import ObjectStorage
from dtrain.strategies.boxes import Box, TensorSpec, replicated, sharded, whole

BUCKET, KEEP, LANES = "faults", 2, 8
# Small parts, so that small files are multipart uploads; short waits, because there are many.
PATIENCE = Limits(
    connect_s=2.0, silent_s=0.3, request_s=0.4, retry_s=2.0, max_retries=5, first_wait_s=0.01, longest_wait_s=0.05,
    part_bytes=64 << 10,
)  # fmt: skip
Shapes = dict[str, tuple[int, int]]
SMALL: Shapes = {"model.whole": (40, 33), "model.cut": (10, 7)}
LARGE: Shapes = {"model.whole": (220, 100), "model.cut": (300, 101)}  # 100 kB a rank: two parts each


def value_of(step: int, attempt: int) -> float:
    return float(1000 * step + attempt)


class Run:
    """One attempt of two ranks. It may be killed while it saves: a live one says in `acknowledged` what is safe."""

    def __init__(self, store: Storage, folder: str, shapes: Shapes, life: Life) -> None:
        self._store = Mortal(store, folder, life)
        self._life = life
        self._shapes = shapes
        self.acknowledged: list[int] = []

    def begin(self) -> bool:
        """False where it died or gave up before it had an attempt of its own."""
        try:
            self.attempt = claim_attempt(self._store, host="h", job_id="j")
        except (DtrainError, Killed):
            return False
        self._next_step = self.attempt.from_step + 1
        board = MortalBoard(self._life)
        self._ranks = [
            Checkpointer(
                self._store, attempt=self.attempt.number, rank=rank, world_size=2, strategy={"name": "ddp"},
                board=board, on_commit=lambda done: self.acknowledged.append(done.step), keep=KEEP, timeout_s=20.0,
            )
            for rank in range(2)
        ]  # fmt: skip
        return True

    def save(self, count: int) -> None:
        """The next steps, as a trainer would: a save that fails is left behind, a fenced process ends."""
        for step in range(self._next_step, self._next_step + count):
            self._next_step = step + 1
            value = value_of(step, self.attempt.number)
            tensors = {name: torch.full(shape, value) for name, shape in self._shapes.items()}
            try:
                self._on_both(lambda rank, own: rank.save(step, specs(self._shapes), own, {"step": step}), tensors)  # noqa: B023
                self._on_both(lambda rank, own: rank.wait(), tensors)
            except FencedError:
                return
            if self._life.is_over:
                return

    def _on_both(self, act: Callable[[Checkpointer, Any], None], tensors: dict[str, torch.Tensor]) -> None:
        for number, rank in enumerate(self._ranks):
            try:
                act(rank, held_by(number, tensors))
            except FencedError:
                raise
            except DtrainError:
                continue


def specs(shapes: Shapes) -> list[TensorSpec]:
    layouts = {"model.whole": replicated(2, 2), "model.cut": sharded(2, 0, (0, 1))}
    return [TensorSpec(name=name, dtype="F32", shape=shape, layout=layouts[name]) for name, shape in shapes.items()]


def held_by(rank: int, tensors: dict[str, torch.Tensor]) -> dict[str, list[tuple[Box, torch.Tensor]]]:
    """The whole of the replicated tensor, half of the other."""
    full, cut = tensors["model.whole"], tensors["model.cut"]
    half = Box((rank * cut.shape[0] // 2, 0), (cut.shape[0] // 2, cut.shape[1]))
    return {
        "model.whole": [(whole(tuple(full.shape)), full)],
        "model.cut": [(half, cut[half.relative_to(whole(tuple(cut.shape)))])],
    }


@dataclass(frozen=True, slots=True, kw_only=True)
class Lane:
    """Schedules one after the other, through a proxy of its own; attempts take the two stores in turn."""

    proxy: FaultProxy
    stores: Sequence[Storage]
    judge: Storage  # patient: a busy machine is no fault
    server: Any  # a botocore client, past the proxy

    def run(self, seeds: Sequence[int]) -> Counter[str]:
        """How often each fault happened."""
        faults: Counter[str] = Counter()
        for seed in seeds:
            try:
                self._run(seed)
            except Exception as error:
                error.add_note(f"DTRAIN_FAULT_SEED={seed}; the faults:\n  " + "\n  ".join(self.proxy.log))
                raise
            faults.update(line.partition(":")[0] for line in self.proxy.log)
        return faults

    def _run(self, seed: int) -> None:
        rng = Random(seed)
        folder, shapes = f"{seed}/", rng.choice([SMALL, LARGE])
        self.proxy.begin(Schedule(seed=seed, rate=rng.choice([0.03, 0.1, 0.2]), broken=rng.choice([0.0, 0.0, 0.04])))
        reached, alive = 0, list[threading.Thread]()
        for _ in range(rng.randint(2, 3)):
            started = self._begin(rng, folder, shapes)
            for run in started:  # what was acknowledged before this attempt began is where it goes on from
                assert run.attempt.from_step >= reached, f"step {reached} is lost: {run.attempt} begins before it"
            for run in started[:-1]:
                run.save(1)
                assert not run.acknowledged, f"{run.attempt} committed step {run.acknowledged} after it was replaced"
            for run in started[-1:]:
                run.save(rng.randint(1, 2))
                reached = max([reached, *run.acknowledged])
                if rng.random() < 0.3:  # it will be replaced, and not know it
                    alive.append(threading.Thread(target=run.save, args=(1,)))
                    alive[-1].start()
        for thread in alive:
            thread.join()
        self.proxy.settle()
        self.proxy.schedule = NO_FAULTS
        store = Mortal(self.judge, folder, Life(None))
        check(store, shapes, reached)
        self._check_tidy(store, folder)

    def _begin(self, rng: Random, folder: str, shapes: Shapes) -> list[Run]:
        """One run, or two at the same moment; those that got an attempt, the newest last."""
        runs = [
            Run(self.stores[number], folder, shapes, Life(rng.randint(5, 60) if rng.random() < 0.4 else None))
            for number in range(2 if rng.random() < 0.4 else 1)
        ]
        with ThreadPoolExecutor(len(runs)) as pool:
            began = list(pool.map(Run.begin, runs))
        started = sorted((run for run, did in zip(runs, began, strict=True) if did), key=lambda run: run.attempt.number)
        numbers = [run.attempt.number for run in started]
        assert len(set(numbers)) == len(numbers), f"two attempts have the number {numbers[0]}"
        return started

    def _check_tidy(self, store: Storage, folder: str) -> None:
        """`ckpt gc` finds all that was left behind: files without a manifest, unfinished uploads."""
        later = time.time() + 3600.0
        store.delete(*[file.key for file in find_garbage(store, before=later, last_attempt=99).files])
        store.discard_uploads("", later)
        assert "Uploads" not in self.server.list_multipart_uploads(Bucket=BUCKET, Prefix=folder)
        found = self.server.list_objects_v2(Bucket=BUCKET, Prefix=folder).get("Contents", [])
        expected = {f"{folder}{info.dir}" for info in live_checkpoints(store)} | {f"{folder}attempts"}
        assert {entry["Key"].rpartition("/")[0] for entry in found} <= expected


def check(store: Storage, shapes: Shapes, reached: int) -> None:
    """Every step that could be loaded is whole and unmixed, and the newest is no older than what was acknowledged."""
    live = [info for info in live_checkpoints(store) if info.live]
    newest = newest_live(live)
    assert (0 if newest is None else newest.step) >= reached
    for info in live:
        assert verify_checkpoint(store, info) == []
        manifest = read_manifest(store, info.step, info.attempt)
        assert manifest.state == {"step": info.step}
        loaded = {name: torch.zeros(shape) for name, shape in shapes.items()}
        load_tensors(store, manifest, [(name, whole(shapes[name]), tensor) for name, tensor in loaded.items()])
        for name, tensor in loaded.items():
            assert torch.equal(tensor, torch.full(shapes[name], value_of(info.step, info.attempt))), (name, info)


def in_lanes(server: S3Server, seeds: Sequence[int]) -> Counter[str]:
    """Several schedules at a time: most of their time they wait."""
    server.make_bucket(BUCKET)
    if "DTRAIN_FAULT_SEED" in os.environ:
        seeds = [seed for seed in seeds if seed == int(os.environ["DTRAIN_FAULT_SEED"])]
    with ExitStack() as stack:
        lanes = [_lane(stack, server) for _ in range(LANES)]
        with ThreadPoolExecutor(LANES) as pool:
            done = [pool.submit(lane.run, seeds[number::LANES]) for number, lane in enumerate(lanes)]
            faults = sum((future.result() for future in done), Counter[str]())
    print(f"seeds {seeds}: {dict(faults)}")
    return faults


def _lane(stack: ExitStack, server: S3Server) -> Lane:
    proxy = stack.enter_context(FaultProxy(server.endpoint))
    with environment({**server.variables(), "AWS_ENDPOINT_URL": proxy.endpoint}):
        stores = [ObjectStorage(f"s3://{BUCKET}", limits=PATIENCE) for _ in range(2)]
        judge = ObjectStorage(f"s3://{BUCKET}", limits=Limits(part_bytes=PATIENCE.part_bytes))
        for number, store in enumerate([*stores, judge]):
            wake(store, f"lanes/{proxy.endpoint[-5:]}-{number}")
    return Lane(proxy=proxy, stores=stores, judge=judge, server=server.client())


def wake(store: Storage, key: str) -> None:
    """It looks up where its server is, and what that can do."""
    for _ in range(9):
        with suppress(StorageError):  # it has little patience, and the machine may be busy
            store.put_if_absent(key, b"")
            return
    store.put_if_absent(key, b"")


@pytest.fixture
def small_parts() -> Iterator[None]:
    """For moto: as small as PATIENCE's, and held in memory."""
    with environment({"S3_UPLOAD_PART_MIN_SIZE": "256", "MOTO_S3_DEFAULT_KEY_BUFFER_SIZE": str(64 << 20)}):
        yield


SERVERS: dict[str, tuple[Callable[[], AbstractContextManager[S3Server]], range]] = {
    "memory": (memory, range(188)),
    "moto": (moto, range(188, 200)),
}


@pytest.mark.e2e
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", SERVERS)
@pytest.mark.usefixtures("small_parts")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_no_schedule_loses_or_mixes_a_step(name: str) -> None:
    start, seeds = SERVERS[name]
    with start() as server:
        faults = in_lanes(server, seeds)
    if "DTRAIN_FAULT_SEED" not in os.environ:
        assert set(faults) == set(FAULTS), faults  # they did happen
