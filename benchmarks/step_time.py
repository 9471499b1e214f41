"""Step time: dtrain's training loop against one by hand with the same library, blocks of steps in turn in one run.

    python benchmarks/step_time.py [STRATEGY ...] [--blocks N] [--steps N]

For each strategy: both sides train the demo's GPT (4 layers of 128) in the same processes on a global batch of 32, with
AdamW, clipping, a schedule, the loss kept every step; byhand.py has the loops by hand. dtrain's side also agrees on
stops, seeds its random numbers, checks that all is finite and writes metrics.jsonl. Its loop runs once; after each
block of its steps comes one by hand. Blocks are short and many, so that both of a pair meet the same load of other
programs. Printed: the median of the pairs' ratios with its 95 % interval, in wall time and in CPU time of all
processes; the second one is steadier where other programs are running.
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
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
import torch._dynamo
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests" / "assets"))
import byhand
import gpt
from byhand import BATCH_SIZE, CLIP, CONTEXT, MICRO_BATCH, RATE, STAGE_ENDS, TENSOR_PLAN, WARMUP
from rank_environ import place_of

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
from dtrain.strategies.caps import CAPS
from dtrain.strategies.config import StrategyConfig
from dtrain.strategies.protocol import MicroBatch

Times = tuple[float, float]  # seconds a step: wall, CPU of all processes
CONFIG = RunConfig(
    name="step-time",
    model=ModelConfig(target=Target(target="gpt.GPT", kwargs={"context": CONTEXT})),
    data=DataConfig(train=Target(target="gpt.SourceText", kwargs={"context": CONTEXT}), batch_size=BATCH_SIZE),
    optimizer=OptimizerConfig(target=Target(target="torch.optim.AdamW", kwargs={"lr": RATE})),
    train=TrainConfig(steps=1_000_000, clip_grad_norm=CLIP),
    loss=Target(target="gpt.loss", kwargs={}),
    schedule=ScheduleConfig(name="cosine", warmup=WARMUP),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """What is compared."""

    strategy: StrategyConfig
    by_hand: type[byhand.Loop]
    world_size: int = 2
    micro_batch: int | None = None


PAIRS = {
    "ddp": Pair(strategy=StrategyConfig(name="ddp"), by_hand=byhand.Ddp),
    "fsdp": Pair(strategy=StrategyConfig(name="fsdp"), by_hand=byhand.Fsdp),
    "hsdp": Pair(strategy=StrategyConfig(name="fsdp", replicate=2), by_hand=byhand.Hsdp, world_size=4),
    "zero1": Pair(strategy=StrategyConfig(name="zero1"), by_hand=byhand.Zero1),
    "zero2": Pair(strategy=StrategyConfig(name="zero2"), by_hand=byhand.Zero2),
    "zero3": Pair(strategy=StrategyConfig(name="zero3"), by_hand=byhand.Zero3),
    "horovod": Pair(strategy=StrategyConfig(name="horovod"), by_hand=byhand.Horovod),
    "tensor": Pair(
        strategy=StrategyConfig(name="ddp", tensor=2, tensor_plan=TENSOR_PLAN), by_hand=byhand.TensorParallel
    ),
    "pipeline": Pair(
        strategy=StrategyConfig(name="ddp", pipeline=2, pipeline_split=(f"blocks.{STAGE_ENDS}",)),
        by_hand=byhand.Pipeline,
        micro_batch=MICRO_BATCH,
    ),
}


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


def dtrain_side(ranks: Ranks, run_dir: Path, pair: Pair, steps: int, before: Callable[[int], None]) -> Training:
    """dtrain's own loop over `steps`, which calls `before` with the number of each."""
    settings = dataclasses.replace(CONFIG.train, steps=steps, micro_batch=pair.micro_batch)
    config = dataclasses.replace(CONFIG, train=settings)
    wrapped, _ = build(config, pair.strategy, ranks, nodes=1)
    dataset = gpt.SourceText(context=CONTEXT)
    plan = BatchPlan(
        len(dataset),
        batch_size=BATCH_SIZE,
        seed=0,
        shuffle=True,
        rank=wrapped.data.rank,
        world_size=wrapped.data.world_size,
        micro_batch=pair.micro_batch,
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
        config=settings,
        wrapped=wrapped,
        schedule=make_schedule(config.schedule, wrapped.optimizer, steps, 0),
        batches=batches,
        task=make_task(config, wrapped.module, ranks.device),
        autocast=autocast("fp32", ranks.device, cache=not CAPS[pair.strategy.name].gathered),
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


def run_rank(rank: int, listener: socket.socket, run_dir: Path, name: str, blocks: int, steps: int) -> None:
    pair = PAIRS[name]
    torch.set_num_threads(1)
    env = place_of(rank, pair.world_size, listener, run_dir=str(run_dir), name="step-time", job_id="bench")
    with process_group(env) as ranks:
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
                by_hand.more(steps)
                lap()

        job = dtrain_side(ranks, run_dir, pair, (blocks + 1) * steps + 1, before)
        by_hand = pair.by_hand(rank, pair.world_size, run_dir)
        dist.barrier()
        began = time.perf_counter(), time.process_time()
        train(job)
        if rank == 0:
            report(name, times[2:])  # the first pair warms up
            check(run_dir)


def check(run_dir: Path) -> None:
    """Both sides have learned: what is timed is what is meant."""
    for file in ("metrics.jsonl", "hand.jsonl"):
        losses = [json.loads(line)["loss"] for line in (run_dir / file).read_text().splitlines()]
        assert losses[0] > losses[-1] > 1, (file, losses[0], losses[-1])


def report(name: str, times: Sequence[Times]) -> None:
    """`times`: of blocks in turn, dtrain's first."""
    for kind, what in enumerate(("wall", "CPU")):
        found = [pair[kind] * 1e3 for pair in times]
        ours, theirs = found[0::2], found[1::2]
        ratios = sorted(a / b for a, b in zip(ours, theirs, strict=True))
        low, high = median_interval(len(ratios))
        print(
            f"{name:8s} {what:4s}  dtrain {statistics.median(ours):7.2f} ms a step, "
            f"by hand {statistics.median(theirs):7.2f}; ratio median {statistics.median(ratios):.3f}, "
            f"95 % interval {ratios[low]:.3f} .. {ratios[high]:.3f} ({len(ratios)} pairs)"
        )


def median_interval(count: int) -> tuple[int, int]:
    """Which of `count` sorted values hold the median between them at 95 % (the binomial's normal approximation)."""
    half = 1.96 * math.sqrt(count) / 2
    return max(0, math.floor((count - 1) / 2 - half)), min(count - 1, math.ceil((count - 1) / 2 + half))


def compare(name: str, blocks: int, steps: int) -> int:
    """The exit code of the processes."""
    with tempfile.TemporaryDirectory() as folder, socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        pids = []
        for rank in range(PAIRS[name].world_size):
            if (pid := os.fork()) == 0:
                try:
                    run_rank(rank, listener, Path(folder), name, blocks, steps)
                except BaseException:
                    traceback.print_exc()
                    os._exit(1)
                sys.stdout.flush()
                os._exit(0)
            pids.append(pid)
        return max(abs(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])) for pid in pids)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "strategies", nargs="*", metavar="STRATEGY", help=f"of {', '.join(PAIRS)}; all where none is named"
    )
    parser.add_argument("--blocks", type=int, default=200)
    parser.add_argument("--steps", type=int, default=2, help="steps a block")
    options = parser.parse_args()
    if unknown := sorted({*options.strategies} - {*PAIRS}):  # `choices` refuses an empty list, too
        parser.error(f"{', '.join(unknown)}: there are {', '.join(PAIRS)}")
    sys.exit(max(compare(name, options.blocks, options.steps) for name in options.strategies or PAIRS))


if __name__ == "__main__":
    main()
