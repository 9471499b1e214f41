"""Some steps of one training in any layout, from where the last one stopped: URL plain|ddp|fsdp|differing STEPS.
Rank 0 prints a number a step that any difference in weights or optimizer state would change."""

import os
import sys
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from dtrain.cluster.errors import CheckpointError
from dtrain.runtime import checkpoint


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def train(url: str, layout: str, steps: int, rank: int) -> None:
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(7, 13), nn.Tanh(), nn.Linear(13, 3, bias=False))  # 13 is divided by no rank count
    model: Any = plain
    if layout == "fsdp":
        for layer in (plain[0], plain[2]):
            fully_shard(layer)
        fully_shard(plain)
    elif layout == "ddp":
        model = DistributedDataParallel(plain)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 5)
    state: dict[str, Any] = {"model": model, "optimizer": optimizer, "schedule": schedule, "seen": []}
    done = checkpoint.load(url, state) or 0
    assert state["seen"] == list(range(1, done + 1))
    for step in range(done + 1, done + steps + 1):
        inputs = torch.randn(6, 7, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        torch.autograd.backward(model(inputs).square().mean())  # the same on every rank, so any mean of it is too
        optimizer.step()
        schedule.step()
        state["seen"].append(step)
        checkpoint.save(url, step, state, keep=2, wait=step % 2 == 0)
        first, last = plain.get_parameter("0.weight"), plain.get_parameter("2.weight")
        mark = whole(first).double().sum() + whole(optimizer.state[last]["exp_avg_sq"]).sum()
        if rank == 0:
            print(f"{mark.item():.9g}", flush=True)
    checkpoint.wait()


def main() -> None:
    url, layout, steps = sys.argv[1:]
    if "RANK" in os.environ:
        dist.init_process_group("gloo")
    rank = dist.get_rank() if dist.is_initialized() else 0
    if layout == "differing":
        state = {"rng": torch.full((100,), rank), "same": torch.ones(3), "local": rank / 7}
        try:
            checkpoint.save(url, 1, state)
        except CheckpointError as error:
            print(error, flush=True)
    else:
        train(url, layout, int(steps), rank)
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
