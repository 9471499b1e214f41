"""Batches from a data set, with and without loader processes; evaluation over them."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import tempfile
import time
from collections import namedtuple
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from dtrain.cluster.errors import UsageError
from dtrain.cluster.workerenv import WorkerEnv
from dtrain.runtime.batches import Batches
from dtrain.runtime.config import Target
from dtrain.runtime.data import BatchPlan, DataError, MapSource, PassPlan, count_samples, to_device
from dtrain.runtime.evaluate import Evaluation
from dtrain.runtime.ranks import Ranks, process_group
from dtrain.runtime.report import is_victim
from dtrain.runtime.task import Task, forward, make_loss
from dtrain.strategies.degrees import Degrees
from dtrain.strategies.passes import OneByOne

CPU = torch.device("cpu")


class Squares(Dataset[Any]):
    def __init__(self, size: int = 50, bad: int = -1, slow_s: float = 0.0) -> None:
        self.size, self.bad, self.slow_s = size, bad, slow_s

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Tensor:
        if index == self.bad:
            raise BrokenPipeError("Broken pipe")
        time.sleep(self.slow_s)
        return torch.tensor([index, index**2, int(torch.randint(2**31, ()))])


def make(dataset: Any, *, workers: int, steps: int = 6, **more: Any) -> Batches:
    plan = BatchPlan(len(dataset), batch_size=8, seed=1, shuffle=True, rank=0, world_size=1, micro_batch=3)
    settings: dict[str, Any] = {"collate": None, "count": count_samples} | more
    source = MapSource(dataset, plan, seed=1, key="data.train")
    return Batches(source, start_step=0, steps=steps, workers=workers, device=CPU, **settings)


_before: set[int] = set()


@pytest.fixture(autouse=True)
def others() -> None:
    """Servers and parents of ranks, which a test process keeps for other files, are no loaders."""
    _before.clear()
    _before.update(child.pid for child in psutil.Process().children(recursive=True))


def loaders() -> list[psutil.Process]:
    """Living ones: an earlier test's child may be a zombie still, which has no command line."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if process.pid not in _before and "resource_tracker" not in " ".join(process.cmdline()):
                found.append(process)
    return found


def read(batches: Batches, steps: range) -> None:
    for step in steps:
        assert batches.next(step, never) is not None


def never() -> bool:
    return False


def test_loader_processes_change_nothing_and_end() -> None:
    found = []
    for workers in (0, 2):
        with make(Squares(), workers=workers) as batches:
            steps = [batches.next(step, never) for step in range(1, 7)]
        found.append([[(m.batch.tolist(), m.count, m.indices) for m in micro or ()] for micro in steps])
    assert found[0] == found[1]
    assert not loaders()


@pytest.mark.parametrize("workers", [0, 1])
def test_a_data_sets_error_names_the_sample_and_is_no_victim(workers: int) -> None:
    with make(Squares(bad=7), workers=workers, steps=12) as batches, pytest.raises(DataError) as caught:
        read(batches, range(1, 13))
    assert "sample 7 of data.train: BrokenPipeError" in str(caught.value)
    assert caught.value.where.startswith(f"{__file__}:")
    assert not is_victim(caught.value)
    assert ("__getitem__" in caught.value.trace) == bool(workers)


class Forgetful(Squares):
    def __getitem__(self, index: int) -> Any:
        return None if index == 7 else super().__getitem__(index)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_sample_that_is_none_is_named(workers: int) -> None:
    with make(Forgetful(), workers=workers, steps=12) as batches, pytest.raises(DataError) as caught:
        read(batches, range(1, 13))
    assert "the data set returned None for sample 7; collate of " in str(caught.value)


def test_a_stop_is_seen_while_a_slow_sample_is_awaited() -> None:
    began = time.monotonic()
    with make(Squares(slow_s=30), workers=1) as batches:
        assert batches.next(1, lambda: time.monotonic() - began > 0.3) is None
    assert time.monotonic() - began < 15  # torch's own way would wait for the sample
    assert not loaders()


def test_loader_processes_outlive_a_signal_to_the_whole_job() -> None:
    """A scheduler may send SIGTERM to every process; the worker wants its data until it has saved."""
    with make(Squares(slow_s=0.02), workers=2) as batches:
        read(batches, range(1, 2))
        for process in loaders():
            os.kill(process.pid, signal.SIGTERM)
        read(batches, range(2, 7))


def test_a_killed_loader_process_is_an_error() -> None:
    with make(Squares(slow_s=0.05), workers=1) as batches:
        read(batches, range(1, 2))
        loaders()[0].kill()
        with pytest.raises(RuntimeError, match="DataLoader worker"):
            read(batches, range(2, 7))
    assert not loaders()
    for left in Path(tempfile.gettempdir()).glob("pymp-*"):  # multiprocessing's, which a killed process leaves
        shutil.rmtree(left)


@pytest.mark.parametrize(("num_samples", "batch_size", "world_size"), [(37, 13, 3), (1, 4, 3), (12, 4, 4), (5, 7, 2)])
@pytest.mark.parametrize("micro_batch", [None, 2])
def test_one_pass_is_every_sample_once_and_as_many_forwards_everywhere(
    num_samples: int, batch_size: int, world_size: int, micro_batch: int | None
) -> None:
    seen: list[int] = []
    forwards = set()
    for rank in range(world_size):
        plan = PassPlan(num_samples, batch_size=batch_size, rank=rank, world_size=world_size, micro_batch=micro_batch)
        steps = [plan.micro_batches(step) for step in range(1, plan.num_steps + 1)]
        forwards.add(tuple(len(micro) for micro in steps))
        for pairs, weight in (part for micro in steps for part in micro):
            assert all(0 <= index < num_samples for _, index in pairs)
            assert pairs
            seen += [index for _, index in pairs[:weight]]
    assert sorted(seen) == list(range(num_samples))
    assert len(forwards) == 1


@pytest.fixture
def alone() -> Any:
    """Ranks of one process, without a process group."""
    ranks = Ranks.__new__(Ranks)
    ranks.global_rank, ranks.world_size, ranks.device = 0, 1, CPU
    return ranks


class Doubled(nn.Module):
    def forward(self, batch: Tensor) -> Tensor:
        assert not self.training
        assert not torch.is_grad_enabled()
        return batch[:, 0] * 2.0


@pytest.mark.parametrize("workers", [0, 2])
def test_evaluation_is_the_exact_mean_and_leaves_the_model_training(alone: Ranks, workers: int) -> None:
    plan = PassPlan(11, batch_size=4, rank=0, world_size=1, micro_batch=3)
    evaluation = Evaluation(
        make_source=lambda: MapSource(Squares(11), plan, seed=0, num_steps=plan.num_steps, key="data.eval"),
        ranks=alone,
        data=Degrees().data_rank(0),
        passes=OneByOne(),
        seed=0,
        workers=workers,
        collate=None,
        task=Task(forward=forward, loss=lambda output, batch, count: (output.sum(), count), count=count_samples),
        metrics=None,
        autocast=lambda: torch.autocast("cpu", enabled=False),
        stop_requested=never,
    )
    model = Doubled()
    assert evaluation(model) == {"loss": 10.0}
    assert model.training
    assert not loaders()


def test_batches_move_to_the_device_in_their_own_type() -> None:
    pair = namedtuple("pair", "a b")
    batch = {"x": [torch.ones(2), pair(torch.ones(1), "text")], "packed": nn.utils.rnn.pack_sequence([torch.ones(2)])}
    moved = to_device(batch, torch.device("meta"))
    assert moved["x"][0].is_meta
    assert moved["x"][1].a.is_meta
    assert moved["x"][1].b == "text"
    assert moved["packed"].data.is_meta


def bf16_mean(output: Tensor, batch: Any) -> Tensor:
    return output.to(torch.bfloat16).mean()


def vector(output: Tensor, batch: Any) -> Tensor:
    return output


def pair_of_one(output: Tensor, batch: Any) -> tuple[Tensor, Tensor]:
    return output.sum().reshape(1), torch.tensor(3)


class WithParameter(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))


def target(function: Any) -> Target:
    import sys

    sys.modules.setdefault("loss_functions_of_a_test", sys.modules[__name__])
    return Target(target=f"loss_functions_of_a_test.{function.__name__}", kwargs={})


def test_losses_are_brought_to_a_sum_and_a_count() -> None:
    output = torch.ones(3, requires_grad=True)
    total, count = make_loss(target(bf16_mean), CPU)(output, None, 3.0)
    assert (total.dtype, total.item(), count) == (torch.float32, 3.0, 3.0)
    total, count = make_loss(target(pair_of_one), CPU)(output, None, 1.0)
    assert (total.shape, count) == ((), 3.0)
    with pytest.raises(UsageError, match="shape"):
        make_loss(target(vector), CPU)(output, None, 3.0)
    with pytest.raises(UsageError, match="parameters"):
        make_loss(target(WithParameter), CPU)


def test_the_board_forgets_what_was_waited_for(tmp_path: Path) -> None:
    env = WorkerEnv(
        run_dir=str(tmp_path),
        name="case",
        job_id="job",
        attempt=1,
        global_rank=0,
        local_rank=0,
        node_rank=0,
        world_size=1,
        local_world_size=1,
        num_nodes=1,
        master_addr="127.0.0.1",
        master_port=0,
        device="cpu",
    )
    with process_group(env) as ranks:
        ranks.board.set("step/1", b"\x00\xff")
        assert ranks.board.wait("step/1", 5) == b"\x00\xff"
        with pytest.raises(torch.distributed.DistStoreError):
            ranks.board.wait("step/1", 0.1)
