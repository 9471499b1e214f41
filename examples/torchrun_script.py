"""A training loop of one's own, as it would be written for torchrun, made resumable with a few lines of dtrain.

dtrain launch examples/torchrun_script.yaml
torchrun --nproc-per-node 2 examples/torchrun_script.py       # the same losses, without dtrain around it
"""

import argparse

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from dtrain.runtime import checkpoint, session


def spirals(num: int, seed: int) -> tuple[Tensor, Tensor]:
    """Points (num, 2) on two spirals wound around each other, and which one each is on (num,)."""
    random = torch.Generator().manual_seed(seed)
    label = torch.randint(2, (num,), generator=random)
    angle = 6 * torch.rand(num, generator=random).sqrt()
    phase = angle + torch.pi * label
    points = torch.stack([angle * phase.cos(), angle * phase.sin()], dim=1) / 3
    return points + 0.02 * torch.randn(num, 2, generator=random), label


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--batch-size", type=int, default=256, help="over all ranks")
    parser.add_argument("--save-every", type=int, default=100)
    parser.add_argument("--checkpoints", default="checkpoints", help="where they go outside dtrain")
    options = parser.parse_args()

    dist.init_process_group("gloo")
    rank, world_size = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(2, 64), nn.GELU(), nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 2))
    model = DistributedDataParallel(layers)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, options.steps)

    url = session.checkpoint_url(options.checkpoints)
    state = {"model": model, "optimizer": optimizer, "schedule": schedule}
    done = checkpoint.load(url, state) or 0

    for step in range(done + 1, options.steps + 1):
        # Which samples a step sees follows from the step alone, so that a run goes on where it was.
        points, label = spirals(options.batch_size, seed=step)
        loss = nn.functional.cross_entropy(model(points[rank::world_size]), label[rank::world_size])
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
        mean = loss.detach().clone()
        dist.all_reduce(mean)
        session.report(step, loss=mean / world_size, lr=schedule.get_last_lr()[0])

        stop = session.stop_requested()
        if stop or step % options.save_every == 0 or step == options.steps:
            checkpoint.save(url, step, state, keep=3)
        if stop:
            session.exit_stopped()

    points, label = spirals(4096, seed=0)
    if rank == 0:
        accuracy = (layers(points).argmax(1) == label).float().mean().item()
        print(f"accuracy on points that it has not seen: {accuracy:.3f}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
