"""Models that are hard on a strategy, and functions over ranks that train them for some steps."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, cast

import parity
import torch
from torch import Tensor, nn

from dtrain.cluster.errors import UsageError
from dtrain.cluster.filestore import FileStorage
from dtrain.runtime.buffers import SharedBuffers
from dtrain.runtime.checkpoint import share
from dtrain.runtime.checkpoint.checkpointer import Checkpointer
from dtrain.runtime.ranks import Ranks
from dtrain.runtime.saving import restore
from dtrain.runtime.shares import rank_slice
from dtrain.runtime.task import autocast, forward
from dtrain.strategies.config import StrategyConfig, StrategyName
from dtrain.strategies.exact import materialize_exact
from dtrain.strategies.exacttree import LogicalShards
from dtrain.strategies.protocol import MicroBatch, StepOptions, Topology, Wrapped
from dtrain.strategies.registry import get_strategy
from dtrain.strategies.step import run_step

WIDTH = 6


class Branches(nn.Module):
    """`left` sees samples of class 0 only, `right` those of class 1, `never` none."""

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Parameter(torch.ones(WIDTH))
        self.right = nn.Parameter(torch.ones(WIDTH))
        self.never = nn.Parameter(torch.ones(WIDTH))
        self.body = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, kind: Tensor) -> Tensor:
        x = self.body(x)
        for number, scale in enumerate((self.left, self.right)):
            if (kind == number).any():
                x = torch.where((kind == number)[:, None], x * scale, x)
        return x.sum(1)


class Listed(nn.Module):
    def __init__(self, blocks: list[nn.Module]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: Tensor, kind: Tensor) -> Tensor:
        for block in self.blocks:
            x = torch.tanh(block(x))
        return x.sum(1)


def narrow() -> nn.Module:
    """Fewer rows than ranks."""
    return Listed([nn.Linear(WIDTH, 1)])


def tied_across() -> nn.Module:
    """Two blocks with one weight, as different modules."""
    blocks = [nn.Linear(WIDTH, WIDTH) for _ in range(3)]
    blocks[2].weight = blocks[0].weight
    return Listed(list(blocks))


def reused() -> nn.Module:
    """One module run twice."""
    block = nn.Linear(WIDTH, WIDTH)
    return Listed([block, nn.Identity(), block])


def frozen() -> nn.Module:
    model = Listed([nn.Linear(WIDTH, WIDTH) for _ in range(3)])
    model.blocks[0].requires_grad_(False)
    dict(model.named_parameters())["blocks.1.bias"].requires_grad_(False)
    return model


def two_dtypes() -> nn.Module:
    class Cast(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.to(self.weight.dtype)).float()

    return Listed([Cast(WIDTH, WIDTH), Cast(WIDTH, WIDTH, dtype=torch.float64)])


class First(nn.Sequential):
    def forward(self, x: Tensor, kind: Tensor) -> Tensor:  # type: ignore[override]
        for layer in self:
            x = layer(x)
        return x.sum(1)


def sequential() -> nn.Module:
    return First(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Dropout(0.0)))


def normed() -> nn.Module:
    return First(nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH), nn.Linear(WIDTH, WIDTH))


class Aging(torch.optim.Optimizer):
    """Its state is plain numbers, and no step is right without them."""

    elementwise = True

    def __init__(self, params: Iterable[nn.Parameter], lr: float) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    age = self.state[parameter].get("age", 0) + 1
                    self.state[parameter]["age"] = age
                    parameter.add_(parameter.grad, alpha=-group["lr"] / age)


class Scalar(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(WIDTH, WIDTH)
        self.scale = nn.Parameter(torch.tensor(1.5))

    def forward(self, x: Tensor, kind: Tensor) -> Tensor:
        scaled: Tensor = self.body(x).sum(1) * self.scale
        return scaled


class ChannelsLast(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def forward(self, x: Tensor, kind: Tensor) -> Tensor:
        image: Tensor = self.conv(x[:, :3, None, None].expand(-1, -1, 4, 4))
        return image.flatten(1).sum(1)


class Codebook(nn.Module):
    """A running mean of what it has seen: a buffer that is no batch norm's, replaced and not written into."""

    mean: Tensor
    fixed: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(WIDTH, WIDTH)
        self.register_buffer("mean", torch.zeros(WIDTH))
        self.register_buffer("fixed", torch.ones(WIDTH))

    def forward(self, x: Tensor, kind: Tensor) -> Tensor:
        self.mean = 0.9 * self.mean + 0.1 * x.detach().mean(0)
        away: Tensor = self.body(x) - self.mean * self.fixed
        return away.sum(1)


def global_batch(step: int, size: int = 7) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(size, WIDTH, generator=generator)
    kind = (torch.arange(size) * 3 // size) % 2 if step % 2 else torch.zeros(size, dtype=torch.int64)
    return x, kind, torch.randn(size, generator=generator)


def square_loss(output: Tensor, batch: Any) -> Tensor:
    loss: Tensor = ((output - batch[-1]) ** 2).mean()
    return loss


def micro_batches(step: int, rank: int, world_size: int, parts: int) -> list[MicroBatch]:
    x, kind, y = global_batch(step)
    mine = rank_slice(len(x), rank, world_size)
    found = []
    for part in range(parts):
        chosen = mine[part * len(mine) // parts : (part + 1) * len(mine) // parts]
        index = list(chosen) or [mine.start]
        found.append(
            MicroBatch(
                batch=(x[index], kind[index], y[index]),
                count=float(len(chosen)),
                weight=len(chosen),
                indices=tuple(chosen),
            )
        )
    return found


def in_shards(step: int, rank: int, world_size: int, num: int) -> list[MicroBatch]:
    """For train.exact: one micro-batch a logical shard, and one more that does not count where others have more."""
    shards = LogicalShards(num=num, rank=rank, world_size=world_size)
    found = [micro for shard in shards.mine for micro in micro_batches(step, shard, num, 1)]
    joining = dataclasses.replace(found[0], count=0.0, weight=0, indices=())
    return found + [joining] * (shards.most - len(found))


def make(
    ranks: Ranks, model: str, strategy: str, wrap: list[str], optimizer: dict[str, Any], exact: int | None = None
) -> Wrapped:
    torch.manual_seed(0)
    kinds = dict(optimizer)
    name = kinds.pop("name", "SGD")
    target = Aging if name == "Aging" else getattr(torch.optim, name)
    make_model: Callable[[], nn.Module] = globals()[model]
    topology = Topology(
        global_rank=ranks.global_rank, world_size=ranks.world_size, nodes=1, device_type=ranks.device.type
    )
    config = StrategyConfig(name=cast(StrategyName, strategy), wrap=tuple(wrap))
    plain: Callable[..., Wrapped] = get_strategy(strategy).materialize
    materialize = functools.partial(materialize_exact, num_shards=exact) if exact else plain
    return materialize(
        make_model(),
        lambda m: target([p for p in m.parameters() if p.requires_grad], **{"lr": 0.05, **kinds}),
        config,
        topology,
        ranks.device,
    )


def options(ranks: Ranks, count: float) -> StepOptions:
    return StepOptions(
        total_count=count,
        clip_grad_norm=1.0,
        autocast=autocast("fp32", ranks.device, cache=False),
        forward=forward,
        loss=_mean_times_count,
        all_reduce=ranks.all_reduce,
    )


def _mean_times_count(output: Any, batch: Any, count: float) -> tuple[Tensor, float]:
    return square_loss(output, batch) * count, count


def learn(
    ranks: Ranks,
    model: str,
    strategy: str,
    steps: int = 4,
    parts: int = 1,
    wrap: list[str] | None = None,
    optimizer: dict[str, Any] | None = None,
    exact: int | None = None,
) -> dict[str, Any]:
    """Losses, norms, and at the end parameters and buffers in full. `exact`: logical shards; `parts` is not asked."""
    settings = optimizer or {"momentum": 0.9, "weight_decay": 0.1}
    wrapped = make(ranks, model, strategy, wrap or [], settings, exact)
    buffers = SharedBuffers(wrapped.module, ranks, wrapped.degrees)
    results = []
    for step in range(1, steps + 1):
        cut, number = (in_shards, exact) if exact else (micro_batches, parts)
        micro = cut(step, ranks.global_rank, ranks.world_size, number)
        results.append(run_step(wrapped, micro, options(ranks, 7.0)))
        buffers.share()
    state = {name: full(p).tolist() for name, p in wrapped.module.named_parameters()}
    return {
        "losses": [result.loss for result in results],
        "norms": [result.grad_norm for result in results],
        "parameters": state,
        "buffers": {name: buffer.tolist() for name, buffer in wrapped.module.named_buffers()},
    }


def learn_each(ranks: Ranks, models: list[str], **more: Any) -> dict[str, dict[str, Any]]:
    """learn() of one model after the other, in one start of ranks. A refusal, the same on all ranks, is noted."""
    found = {}
    for model in models:
        try:
            found[model] = learn(ranks, model, **more)
        except UsageError as error:
            found[model] = {"error": type(error).__name__, "message": str(error)}
    return found


def resume_each(ranks: Ranks, cases: list[dict[str, Any]], save: bool) -> list[list[list[float | None]]]:
    """resume() of one case after the other, in one start of ranks."""
    return [resume(ranks, save=save, **case) for case in cases]


def full(parameter: Any) -> Tensor:
    if hasattr(parameter, "ds_status"):  # DeepSpeed has cut it
        from dtrain.strategies.zero_partitions import gathered

        with gathered(parameter):
            return parameter.detach().clone()  # type: ignore[no-any-return]
    found: Tensor = parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter
    return found.detach()


def resume(
    ranks: Ranks, model: str, strategy: str, folder: str, optimizer: dict[str, Any], save: bool, parts: int = 2
) -> list[list[float | None]]:
    """Six steps. `save`: a checkpoint after the third. Else: a checkpoint of step 3 is loaded, and steps 4 to 6 follow.
    [[loss, norm], ...] of steps 4 to 6."""
    wrapped = make(ranks, model, strategy, [], optimizer)
    if not save:
        restore(CountingStorage(folder), 3, 1, wrapped, ranks)
    results = []
    for step in range(1 if save else 4, 7):
        micro = micro_batches(step, ranks.global_rank, ranks.world_size, parts)
        results.append(run_step(wrapped, micro, options(ranks, 7.0)))
        if save and step == 3:
            save_state(ranks, wrapped, folder, step)
    return [[result.loss, result.grad_norm] for result in results[-3:]]


def save_state(ranks: Ranks, wrapped: Wrapped, folder: str, step: int) -> None:
    checkpointer = Checkpointer(
        FileStorage(folder),
        attempt=1,
        rank=ranks.global_rank,
        world_size=ranks.world_size,
        strategy={"name": "test"},
        board=ranks.board,
        on_commit=lambda _: None,
        keep=None,
    )
    specs, local, values = wrapped.state.canonical()
    checkpointer.save(step, specs, local, {"position": 0, "optimizer": values})
    checkpointer.wait()
    ranks.all_reduce([0.0])  # rank 0 has committed


class CountingStorage(FileStorage):
    """Counts the bytes that are read of data files."""

    bytes_read = 0

    def read_into(self, key: str, offset: int, target: memoryview) -> None:
        self.bytes_read += target.nbytes
        super().read_into(key, offset, target)


def restore_big(ranks: Ranks, folder: str, strategy: str, damage: bool = False) -> dict[str, Any]:
    """The parity model, saved after a step and loaded into another one by several exchanges."""
    share.EXCHANGE_BYTES, share.MIN_PART_BYTES = 3 << 20, 1 << 20
    wrapped = _parity(ranks, strategy, seed=0)
    save_state(ranks, wrapped, folder, 1)
    if damage and ranks.global_rank == 0:
        path = next(Path(folder).glob("step-*/*.safetensors"))
        raw = bytearray(path.read_bytes())
        raw[-5] ^= 1
        path.write_bytes(raw)
    ranks.all_reduce([0.0])
    other = _parity(ranks, strategy, seed=1)
    storage = CountingStorage(folder)
    restore(storage, 1, 1, other, ranks)
    pairs = zip(wrapped.module.parameters(), other.module.parameters(), strict=True)
    states = zip(wrapped.optimizer.state.values(), other.optimizer.state.values(), strict=True)
    same = all(torch.equal(full(a), full(b)) for a, b in pairs) and all(
        torch.equal(full(a[key]), full(b[key])) for a, b in states for key in a
    )
    size = sum(path.stat().st_size for path in Path(folder).glob("step-*/*.safetensors"))
    return {"same": same, "bytes": storage.bytes_read, "stored": size}


def _parity(ranks: Ranks, strategy: str, seed: int) -> Wrapped:
    torch.manual_seed(seed)
    topology = Topology(global_rank=ranks.global_rank, world_size=ranks.world_size, nodes=1, device_type="cpu")
    wrapped = get_strategy(strategy).materialize(
        parity.Transformer(),
        lambda m: torch.optim.AdamW(m.parameters()),
        StrategyConfig(name=cast(StrategyName, strategy)),
        topology,
        ranks.device,
    )
    tokens = torch.arange(32).view(2, 16)
    batch = MicroBatch(batch=(tokens, tokens), count=2.0, weight=2, indices=(0, 1))
    loss_options = dataclasses.replace(
        options(ranks, 2.0 * ranks.world_size),
        loss=lambda output, batch, count: (parity.mean_loss(output, batch) * count, count),
    )
    run_step(wrapped, [batch], loss_options)
    return wrapped
