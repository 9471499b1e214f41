"""Step time with train.exact against the same strategy without it, 2 processes, steps in turn in one run.

    python benchmarks/exact_step.py [--strategy ddp | fsdp] [--pairs N] [--processes N]

Three sides train one transformer (4 layers of 128, 0.9 M parameters) on 64 samples a step: exact with L = 8
shards; without exact in as many micro-batches (micro_batch such that a rank has 8 / processes of them); and without
accumulation, which is what a run without exact would do. A step is forward, backward, the gradients' exchange, clipping
and AdamW: run_step. Printed: medians, and the median of the ratios of neighbours with its 95 % interval.
"""

from __future__ import annotations

import argparse
import os
import socket
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
import torch._dynamo
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests" / "assets"))
from rank_environ import place_of

from dtrain.runtime.ranks import Ranks, process_group
from dtrain.runtime.task import autocast, forward
from dtrain.strategies.config import StrategyConfig
from dtrain.strategies.exact import materialize_exact
from dtrain.strategies.protocol import MicroBatch, StepOptions, Topology, Wrapped
from dtrain.strategies.registry import get_strategy
from dtrain.strategies.step import run_step

SHARDS, SAMPLES, SEQ, VOCAB, WIDTH = 8, 64, 64, 512, 128


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, WIDTH)
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(WIDTH, 4, 4 * WIDTH, dropout=0.0, batch_first=True, norm_first=True)
            for _ in range(4)
        )
        self.head = nn.Linear(WIDTH, VOCAB)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        out: Tensor = self.head(x)
        return out


def make(ranks: Ranks, name: str, num_shards: int | None) -> Wrapped:
    torch.manual_seed(0)
    topology = Topology(global_rank=ranks.global_rank, world_size=ranks.world_size, nodes=1, device_type="cpu")
    plain: Callable[..., Wrapped] = get_strategy(name).materialize
    materialize = partial(materialize_exact, num_shards=num_shards) if num_shards else plain
    config = StrategyConfig(name="fsdp" if name == "fsdp" else "ddp")
    return materialize(Net(), lambda m: torch.optim.AdamW(m.parameters(), lr=1e-3), config, topology, ranks.device)


def batches(ranks: Ranks, parts: int) -> list[MicroBatch]:
    """This rank's samples in `parts` micro-batches."""
    mine = torch.randint(VOCAB, (SAMPLES // ranks.world_size, SEQ + 1))
    return [
        MicroBatch(
            batch=(part[:, :-1], part[:, 1:]), count=float(len(part)), weight=len(part), indices=tuple(range(len(part)))
        )
        for part in torch.chunk(mine, parts)
    ]


def options(ranks: Ranks) -> StepOptions:
    def loss(output: Tensor, batch: tuple[Tensor, Tensor], count: float) -> tuple[Tensor, float]:
        return F.cross_entropy(output.flatten(0, 1), batch[1].flatten()) * count, count

    return StepOptions(
        total_count=float(SAMPLES),
        clip_grad_norm=1.0,
        autocast=autocast("fp32", ranks.device, cache=False),
        forward=forward,
        loss=loss,
        all_reduce=ranks.all_reduce,
    )


def run_rank(rank: int, world_size: int, listener: socket.socket, strategy: str, pairs: int) -> None:
    torch.set_num_threads(1)
    env = place_of(rank, world_size, listener, name="exact-step", job_id="bench")
    with process_group(env) as ranks:
        parts = SHARDS // world_size
        sides = {
            "exact": (make(ranks, strategy, SHARDS), parts),
            "as many micro-batches": (make(ranks, strategy, None), parts),
            "no accumulation": (make(ranks, strategy, None), 1),
        }
        times: dict[str, list[float]] = {name: [] for name in sides}
        for turn in range(pairs + 2):  # the first two warm up
            for name, (wrapped, number) in sides.items():
                micro = batches(ranks, number)
                dist.barrier()
                began = time.perf_counter()
                run_step(wrapped, micro, options(ranks))
                dist.barrier()
                if turn >= 2:
                    times[name].append(time.perf_counter() - began)
        if rank == 0:
            size = sum(p.numel() for p in sides["exact"][0].module.parameters())
            print(f"{strategy}, {world_size} ranks, {size:,} parameters, L = {SHARDS}, {SAMPLES} samples a step")
            report(times)


def report(times: dict[str, list[float]]) -> None:
    exact = times["exact"]
    for name, found in times.items():
        ratios = sorted(a / b for a, b in zip(exact, found, strict=True))
        half = int(0.98 * len(ratios) ** 0.5)
        low, high = ratios[max(0, len(ratios) // 2 - half)], ratios[min(len(ratios) - 1, len(ratios) // 2 + half)]
        print(
            f"{name:22s} {statistics.median(found) * 1e3:7.1f} ms a step; exact takes "
            f"{statistics.median(ratios):.3f}x of it ({low:.3f} .. {high:.3f})"
        )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--strategy", choices=["ddp", "fsdp"], default="ddp")
    parser.add_argument("--pairs", type=int, default=60)
    parser.add_argument("--processes", type=int, default=2)
    chosen = parser.parse_args(arguments)
    pids = []
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        for rank in range(chosen.processes):
            if (pid := os.fork()) == 0:
                code = 1
                try:
                    run_rank(rank, chosen.processes, listener, chosen.strategy, chosen.pairs)
                    code = 0
                finally:
                    sys.stdout.flush()
                    sys.stderr.flush()
                    os._exit(code)
            pids.append(pid)
    sys.exit(max(abs(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])) for pid in pids))


if __name__ == "__main__":
    main()
