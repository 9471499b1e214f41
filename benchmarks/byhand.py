"""What step_time.py compares with: the loops that a careful person writes with each library directly, without dtrain.

All train the demo's GPT on batches of BATCH_SIZE with AdamW, clipping and a schedule, and write the loss of the global
batch every step. What a strategy has to do besides (who reads which samples, who knows the loss) is in its class.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gpt
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.pipelining import PipelineStage, Schedule1F1B
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler

CONTEXT, BATCH_SIZE, RATE, CLIP, WARMUP = 64, 32, 1e-3, 1.0, 10
STAGE_ENDS, MICRO_BATCH = 2, 8  # pipeline: blocks of the first stage; samples that go through it at once
TENSOR_PLAN = {
    "blocks.*.qkv": "column 3",
    "blocks.*.out": "row",
    "blocks.*.mlp.0": "column",
    "blocks.*.mlp.2": "row",
}
Batch = list[Tensor]  # inputs and targets, (samples, CONTEXT) each


class Loop:
    """Data parallelism; `prepare` and `step` are the library's. `data_ranks`: ranks that read samples of their own."""

    optimizer: Any

    def __init__(self, rank: int, world_size: int, run_dir: Path) -> None:
        self.rank, self.world_size = rank, world_size
        self.data_ranks = world_size
        torch.manual_seed(0)
        self.prepare(gpt.GPT(context=CONTEXT))
        self.rates = torch.optim.lr_scheduler.LambdaLR(self.optimizer, _cosine)
        self.batches = self._endless(gpt.SourceText(context=CONTEXT))
        self.log = open(run_dir / "hand.jsonl", "w")  # noqa: SIM115  open as long as the process

    def prepare(self, model: nn.Module) -> None:
        raise NotImplementedError

    def step(self, batch: Batch) -> Tensor:
        """The mean loss of this rank's samples."""
        raise NotImplementedError

    def more(self, steps: int) -> None:
        for _ in range(steps):
            loss = self.mean(self.step(next(self.batches)))
            self.rates.step()
            if self.rank == 0:
                self.log.write(json.dumps({"loss": loss.item()}) + "\n")
                self.log.flush()

    def mean(self, loss: Tensor) -> Tensor:
        """Over the global batch, as dtrain records it."""
        dist.all_reduce(loss)
        return loss / self.world_size

    def _endless(self, dataset: Any) -> Iterator[Batch]:
        sampler: DistributedSampler[object] = DistributedSampler(
            dataset, self.data_ranks, self.rank * self.data_ranks // self.world_size
        )
        loader = DataLoader(dataset, batch_size=BATCH_SIZE // self.data_ranks, sampler=sampler)
        while True:
            yield from loader


def _cosine(step: int) -> float:
    return min((step + 1) / WARMUP, 0.5 * (1 + math.cos(math.pi * min(1.0, step / 10_000))))


class Plain(Loop):
    """Around a module that looks like the user's own, and the user's own optimizer."""

    model: nn.Module

    def step(self, batch: Batch) -> Tensor:
        self.optimizer.zero_grad()
        loss = gpt.loss(self.model(batch[0]), (batch[0], batch[1]))
        loss.backward()  # type: ignore[no-untyped-call]
        self.update()
        return loss.detach()

    def update(self) -> None:
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), CLIP)
        self.optimizer.step()


class Ddp(Plain):
    def prepare(self, model: nn.Module) -> None:
        self.model = DistributedDataParallel(model, gradient_as_bucket_view=True)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=RATE)


class Fsdp(Plain):
    replicate = 1

    def prepare(self, model: nn.Module) -> None:
        sizes = (self.replicate, self.world_size // self.replicate)
        mesh = init_device_mesh("cpu", sizes, mesh_dim_names=("replicate", "shard"))
        mesh = mesh if self.replicate > 1 else mesh["shard"]
        assert isinstance(model, gpt.GPT)
        for block in model.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
        self.model = model
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=RATE)


class Hsdp(Fsdp):
    replicate = 2


class Horovod(Plain):
    """As its manual has it: synchronize() before clipping."""

    def prepare(self, model: nn.Module) -> None:
        import horovod.torch as hvd  # initialized by dtrain's side already

        hvd.broadcast_parameters(model.state_dict(), root_rank=0)
        adamw = torch.optim.AdamW(model.parameters(), lr=RATE)
        self.model = model
        self.optimizer = hvd.DistributedOptimizer(adamw, named_parameters=model.named_parameters())

    def update(self) -> None:
        self.optimizer.synchronize()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), CLIP)
        with self.optimizer.skip_synchronize():
            self.optimizer.step()


class Zero(Loop):
    """Sizes of buckets, and what stays whole on every rank under stage 3, as dtrain sets them."""

    stage: int

    def prepare(self, model: nn.Module) -> None:
        import deepspeed

        zero = {"stage": self.stage, "reduce_bucket_size": 50_000_000, "allgather_bucket_size": 50_000_000}
        if self.stage == 3:
            zero |= {"stage3_prefetch_bucket_size": 50_000_000, "stage3_param_persistence_threshold": 32_768}
            zero |= {"memory_efficient_linear": False}
        settings = {
            "train_micro_batch_size_per_gpu": BATCH_SIZE // self.world_size,
            "gradient_accumulation_steps": 1,
            "gradient_clipping": CLIP,
            "zero_optimization": zero,
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "steps_per_print": 1 << 60,
        }
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=RATE)
        self.engine, *_ = deepspeed.initialize(model=model, optimizer=self.optimizer, config=settings)

    def step(self, batch: Batch) -> Tensor:
        loss = gpt.loss(self.engine(batch[0]), (batch[0], batch[1]))
        self.engine.backward(loss)
        self.engine.step()
        return loss.detach()


class Zero1(Zero):
    stage = 1


class Zero2(Zero):
    stage = 2


class Zero3(Zero):
    stage = 3


class TensorParallel(Plain):
    """Megatron's cut: q, k, v and the first layer of the MLP by outputs, the others by inputs. What is not cut is the
    same on both ranks, and so are its gradients."""

    def prepare(self, model: nn.Module) -> None:
        assert isinstance(model, gpt.GPT)
        self.data_ranks = 1
        mesh = init_device_mesh("cpu", (self.world_size,), mesh_dim_names=("tensor",))
        plan = {
            "qkv": ColwiseParallel(),
            "out": RowwiseParallel(),
            "mlp.0": ColwiseParallel(),
            "mlp.2": RowwiseParallel(),
        }
        for block in model.blocks:
            assert isinstance(block, gpt.Block)
            self._interleave(block.qkv)
            parallelize_module(block, mesh, plan)
            block.heads //= self.world_size
        self.model = model
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=RATE)
        self.cut = [p for p in model.parameters() if isinstance(p, DTensor)]
        self.whole = [p for p in model.parameters() if not isinstance(p, DTensor)]

    def _interleave(self, qkv: nn.Linear) -> None:
        """Reorders the outputs, so that an even cut gives each rank its heads' q, k and v."""
        with torch.no_grad():
            for parameter in qkv.parameters():
                parts = parameter.reshape(3, self.world_size, -1).transpose(0, 1)
                parameter.copy_(parts.reshape(parameter.shape).clone())

    def update(self) -> None:
        cut = [p.grad.to_local() for p in self.cut]  # type: ignore[union-attr]
        whole = [p.grad for p in self.whole if p.grad is not None]
        square = torch.nn.utils.get_total_norm(cut) ** 2
        dist.all_reduce(square)
        norm = torch.sqrt(square + torch.nn.utils.get_total_norm(whole) ** 2)
        torch._foreach_mul_(cut + whole, torch.clamp(CLIP / (norm + 1e-6), max=1.0))
        self.optimizer.step()

    def mean(self, loss: Tensor) -> Tensor:
        return loss


class FirstStage(nn.Module):
    def __init__(self, model: gpt.GPT) -> None:
        super().__init__()
        self.tokens, self.positions, self.blocks = model.tokens, model.positions, model.blocks[:STAGE_ENDS]

    def forward(self, tokens: Tensor) -> Tensor:
        x: Tensor = self.tokens(tokens) + self.positions(torch.arange(tokens.shape[1]))
        for block in self.blocks:
            x = block(x)
        return x


class LastStage(nn.Module):
    def __init__(self, model: gpt.GPT) -> None:
        super().__init__()
        self.tokens, self.blocks, self.norm = model.tokens, model.blocks[STAGE_ENDS:], model.norm

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return nn.functional.linear(self.norm(x), self.tokens.weight)


class Pipeline(Loop):
    """Two stages, 1F1B. Both hold the embedding, which is also the output layer: its gradients are summed."""

    def prepare(self, model: nn.Module) -> None:
        assert isinstance(model, gpt.GPT)
        self.data_ranks = 1
        self.model = (FirstStage, LastStage)[self.rank](model)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=RATE)
        stage = PipelineStage(self.model, self.rank, self.world_size, torch.device("cpu"))
        self.schedule = Schedule1F1B(stage, BATCH_SIZE // MICRO_BATCH, lambda out, y: gpt.loss(out, (y, y)))

    def step(self, batch: Batch) -> Tensor:
        self.optimizer.zero_grad()
        losses: list[Tensor] = []
        if self.rank == 0:
            self.schedule.step(batch[0], return_outputs=False)
        else:
            self.schedule.step(target=batch[1], losses=losses, return_outputs=False)
        self.update()
        return torch.stack(losses).mean().detach() if losses else torch.zeros(())

    def update(self) -> None:
        tied = self.model.tokens.weight.grad
        dist.all_reduce(tied)
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        counted = gradients if self.rank == 0 else [g for g in gradients if g is not tied]
        square = torch.nn.utils.get_total_norm(counted) ** 2
        dist.all_reduce(square)
        torch._foreach_mul_(gradients, torch.clamp(CLIP / (torch.sqrt(square) + 1e-6), max=1.0))
        self.optimizer.step()

    def mean(self, loss: Tensor) -> Tensor:
        dist.all_reduce(loss)  # the last stage's
        return loss
