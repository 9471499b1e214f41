"""Step time: dtrain's training loop against a hand-written DDP loop, 2 processes, blocks of steps in turn in one run.

    python benchmarks/step_time.py [--blocks N] [--steps N]

Both sides train the demo's GPT (4 layers of 128) in the same two processes on the same batches: sum over a global batch
of 32, AdamW, clipping, the loss read every step. dtrain's side also agrees on stops, seeds its random numbers, keeps
the schedule, checks that all is finite and writes metrics.jsonl. Its loop runs once; after each block of its steps
comes one by hand. Blocks are short and many, so that both of a pair meet the same load of other programs. Printed: the
median of the pairs' ratios with its 95 % interval, in wall time and in CPU time of both processes; the second one is
steadier where other programs are running.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import socket
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
import torch._dynamo
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler

from dtrain.cluster.workerenv import WorkerEnv
from dtrain.runtime.batches import Batches
from dtrain.runtime.build import build
from dtrain.runtime.config import DataConfig, OptimizerConfig, RunConfig, ScheduleConfig, Target, TrainConfig
from dtrain.runtime.data import BatchPlan, MapSource, count_samples
from dtrain.runtime.metrics import MetricsLog
from dtrain.runtime.modelconfig import ModelConfig
from dtrain.runtime.progress import ProgressWriter
from dtrain.runtime.ranks import Ranks, process_group
from dtrain.runtime.report import Reporter
from dtrain.runtime.schedules import make_schedule
from dtrain.runtime.task import autocast, make_task
from dtrain.runtime.trainer import Training, train
from dtrain.strategies.config import StrategyConfig
from dtrain.strategies.protocol import MicroBatch

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
WORLD_SIZE, BATCH_SIZE, RATE, CLIP = 2, 32, 1e-3, 1.0
Times = tuple[float, float]  # seconds a step: wall, CPU of both processes
CONFIG = RunConfig(
    name="step-time",
    model=ModelConfig(target=Target(target="gpt.GPT", kwargs={"context": 64})),
    data=DataConfig(train=Target(target="gpt.SourceText", kwargs={"context": 64}), batch_size=BATCH_SIZE),
    optimizer=OptimizerConfig(target=Target(target="torch.optim.AdamW", kwargs={"lr": RATE})),
    train=TrainConfig(steps=1_000_000, clip_grad_norm=CLIP),
    loss=Target(target="gpt.loss", kwargs={}),
    schedule=ScheduleConfig(name="cosine", warmup=10),
)


class NoSaves:
    def due(self, step: int) -> bool:
        return False

    def save(self, step: int, state: dict[str, Any]) -> None:
        pass

    def rate(self, step: int, metrics: Mapping[str, float]) -> None:
        pass

    def wait(self) -> None:
        pass


class BatchesInTurn(Batches):
    """dtrain's batches, with a call before each step."""

    before: Callable[[int], None]

    def next(self, step: int, interrupted: Callable[[], bool]) -> list[MicroBatch] | None:
        self.before(step)
        return super().next(step, interrupted)


def dtrain_side(ranks: Ranks, run_dir: Path, steps: int, before: Callable[[int], None]) -> Training:
    """dtrain's own loop over `steps`, which calls `before` with the number of each."""
    import gpt

    wrapped, _ = build(CONFIG, StrategyConfig(name="ddp"), ranks, nodes=WORLD_SIZE)
    dataset = gpt.SourceText(context=64)
    plan = BatchPlan(
        len(dataset),
        batch_size=BATCH_SIZE,
        seed=0,
        shuffle=True,
        rank=ranks.global_rank,
        world_size=WORLD_SIZE,
        micro_batch=None,
    )
    batches = BatchesInTurn(
        MapSource(dataset, plan, seed=0, key="data.train"),
        start_step=0,
        steps=steps,
        collate=None,
        count=count_samples,
        workers=0,
        device=ranks.device,
    )
    batches.before = before
    return Training(
        config=dataclasses.replace(CONFIG.train, steps=steps),
        wrapped=wrapped,
        schedule=make_schedule(CONFIG.schedule, wrapped.optimizer, CONFIG.train.steps, 0),
        batches=batches,
        task=make_task(CONFIG, wrapped.module, ranks.device),
        autocast=autocast("fp32", ranks.device, cache=True),
        ranks=ranks,
        saves=NoSaves(),
        evaluations=None,
        metrics=MetricsLog(run_dir / "metrics.jsonl", 0) if ranks.global_rank == 0 else None,
        progress=ProgressWriter(-1),
        report=Reporter(-1),
        stop_requested=lambda: False,
        attempt=1,
        start_step=0,
        batch_size=BATCH_SIZE,
    )


def hand_written_side(ranks: Ranks, run_dir: Path) -> Callable[[int], None]:
    """What a careful person writes with DistributedDataParallel, the loss kept every step."""
    import gpt

    torch.manual_seed(0)
    model = DistributedDataParallel(gpt.GPT(context=64), gradient_as_bucket_view=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE)
    dataset = gpt.SourceText(context=64)
    sampler: DistributedSampler[object] = DistributedSampler(dataset)
    loader = DataLoader(dataset, batch_size=BATCH_SIZE // WORLD_SIZE, sampler=sampler)
    log = open(run_dir / "hand.jsonl", "w")  # noqa: SIM115  open as long as the process

    def endless() -> Iterator[list[torch.Tensor]]:
        while True:
            yield from loader

    batches = endless()

    def more(steps: int) -> None:
        for _ in range(steps):
            batch = next(batches)
            optimizer.zero_grad()
            loss = gpt.loss(model(batch[0]), (batch[0], batch[1]))
            loss.backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
            optimizer.step()
            mean = loss.detach()
            dist.all_reduce(mean)  # the loss of the global batch, as dtrain records it
            if ranks.global_rank == 0:
                log.write(json.dumps({"loss": mean.item() / WORLD_SIZE}) + "\n")
                log.flush()

    return more


def run_rank(rank: int, port: int, run_dir: Path, blocks: int, steps: int) -> None:
    torch.set_num_threads(1)
    env = WorkerEnv(
        run_dir=str(run_dir),
        name="step-time",
        job_id="bench",
        attempt=1,
        global_rank=rank,
        local_rank=rank,
        node_rank=0,
        world_size=WORLD_SIZE,
        local_world_size=WORLD_SIZE,
        num_nodes=1,
        master_addr="127.0.0.1",
        master_port=port,
        device="cpu",
    )
    with process_group(env) as ranks:
        by_hand = hand_written_side(ranks, run_dir)
        times: list[Times] = []  # of blocks in turn, dtrain's first
        began = 0.0, 0.0

        def lap() -> None:
            """The time since the last one, a barrier included, which all ranks leave together."""
            nonlocal began
            dist.barrier()
            wall, cpu = time.perf_counter() - began[0], time.process_time() - began[1]
            times.append((wall / steps, sum(ranks.all_reduce([cpu])) / steps))
            began = time.perf_counter(), time.process_time()

        def before(step: int) -> None:
            if step > 1 and (step - 1) % steps == 0:
                lap()
                by_hand(steps)
                lap()

        job = dtrain_side(ranks, run_dir, (blocks + 1) * steps + 1, before)
        dist.barrier()
        began = time.perf_counter(), time.process_time()
        train(job)
        if rank == 0:
            report(times[2:])  # the first pair warms up


def report(times: Sequence[Times]) -> None:
    """`times`: of blocks in turn, dtrain's first."""
    for kind, what in enumerate(("wall", "CPU")):
        found = [pair[kind] * 1e3 for pair in times]
        ours, theirs = found[0::2], found[1::2]
        ratios = sorted(a / b for a, b in zip(ours, theirs, strict=True))
        low, high = median_interval(len(ratios))
        print(
            f"{what:4s}  dtrain {statistics.median(ours):7.2f} ms a step, by hand {statistics.median(theirs):7.2f}; "
            f"ratio median {statistics.median(ratios):.3f}, 95 % interval {ratios[low]:.3f} .. {ratios[high]:.3f} "
            f"({len(ratios)} pairs)"
        )


def median_interval(count: int) -> tuple[int, int]:
    """Which of `count` sorted values hold the median between them at 95 % (the binomial's normal approximation)."""
    half = 1.96 * math.sqrt(count) / 2
    return max(0, math.floor((count - 1) / 2 - half)), min(count - 1, math.ceil((count - 1) / 2 + half))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--blocks", type=int, default=200)
    parser.add_argument("--steps", type=int, default=2, help="steps a block")
    options = parser.parse_args()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        pids = []
        for rank in range(WORLD_SIZE):
            if (pid := os.fork()) == 0:
                try:
                    run_rank(rank, port, Path(folder), options.blocks, options.steps)
                except BaseException:
                    import traceback

                    traceback.print_exc()
                    os._exit(1)
                sys.stdout.flush()
                os._exit(0)
            pids.append(pid)
        codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
    sys.exit(max(map(abs, codes)))


if __name__ == "__main__":
    main()
