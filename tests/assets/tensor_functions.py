"""What the ranks of a tensor layout say to each other."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any

import parity
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.utils.data import default_collate

from dtrain.runtime.ranks import Ranks
from dtrain.strategies.absent import absent_like, is_absent
from dtrain.strategies.config import StrategyConfig
from dtrain.strategies.ddp import BucketedAllReduce
from dtrain.strategies.outputs import tensors_in
from dtrain.strategies.pipeline import _border
from dtrain.strategies.tensorcuts import cut_model
from dtrain.strategies.tensorgrads import OneCopy
from dtrain.strategies.tensorops import teach_torch
from dtrain.strategies.tensorplan import tensor_plan

BLOCKS = {"blocks.*.qkv": "column 3", "blocks.*.out": "row", "blocks.*.up": "column", "blocks.*.down": "row"}


def padding(ranks: Ranks) -> bool:
    """Whether a cut embedding has the gradient of a whole one: none at its padding entry, its own at all others. On
    each rank some entry has, counted from that rank's first one, the padding entry's number."""
    model = nn.Sequential(nn.Embedding(12, 4, padding_idx=2))
    tokens, factors = torch.arange(12).repeat(2, 1), torch.rand(2, 12, 4)
    (model(tokens) * factors).sum().backward()
    (wanted,) = (parameter.grad for parameter in model.parameters())
    mesh = init_device_mesh("cpu", (ranks.world_size,), mesh_dim_names=("tensor",))
    cut_model(model, tensor_plan(model, {"0": "embedding"}, 2), mesh, ranks.device, sequence=False)
    (model(tokens) * factors).sum().backward()
    (found,) = (parameter.grad for parameter in model.parameters())
    assert isinstance(found, DTensor)
    assert wanted is not None
    return torch.equal(found.full_tensor(), wanted)


def absent(ranks: Ranks) -> bool:
    """Whether what a stage computes of an absent tensor and a DTensor is absent, whichever stands first."""
    teach_torch()
    mesh = init_device_mesh("cpu", (ranks.world_size,), mesh_dim_names=("tensor",))
    border = _border(StrategyConfig(name="ddp", tensor=2, pipeline=2), mesh)
    here = DTensor.from_local(torch.ones(4), mesh, (Replicate(),))
    missing = absent_like(torch.ones(4))
    with border.around():
        return all(is_absent(found) for found in (missing + here, here + missing, torch.cat([here, missing])))


def collectives(ranks: Ranks) -> dict[str, int]:
    """How many of each kind a forward and a backward take."""
    model = parity.Transformer()
    mesh = init_device_mesh("cpu", (ranks.world_size,), mesh_dim_names=("tensor",))
    cut_model(model, tensor_plan(model, BLOCKS, ranks.world_size), mesh, ranks.device, sequence=False)
    batch = default_collate([parity.Tokens()[index] for index in range(2)])
    with torch.profiler.profile() as profile:
        parity.mean_loss(model(batch[0]), batch).backward()  # type: ignore[no-untyped-call]
    names = Counter(event.name for event in profile.events() or ())
    return {name: names[f"_c10d_functional::{name}"] for name in ("all_reduce", "all_gather_into_tensor")}


def output(ranks: Ranks) -> bool:
    """Whether a cut model gives a tensor of its own, which may be written to as that of a whole one may."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    mesh = init_device_mesh("cpu", (ranks.world_size,), mesh_dim_names=("tensor",))
    wanted = model(torch.ones(2, 4)) * 3
    cut_model(model, tensor_plan(model, {"0": "column", "1": "row"}, 2), mesh, ranks.device, sequence=False)
    found = model(torch.ones(2, 4))
    is_view = found._base is not None
    found *= 3
    found.sum().backward()
    return not is_view and torch.allclose(found, wanted)


class Counting(parity.Transformer):
    """Does what DTensors can't: how many values are above 0 is no shape that is known."""

    def forward(self, tokens: Tensor) -> Tensor:
        x = super().forward(tokens)
        return x + len((x > 0).nonzero())


@dataclass(frozen=True, slots=True)
class Answer:
    logits: Tensor
    more: list[Any]


class Scores(dict[str, Any]):
    pass


class _Answering(nn.Module):
    """What a forward may return beside tensors, tuples and dicts."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Answer:
        x = self.down(torch.tanh(self.up(x)))
        return Answer(logits=x, more=[Scores(best=x * 2), SimpleNamespace(hidden=x), None])


def answers(ranks: Ranks) -> bool:
    """Whether a cut model's output holds plain tensors of the whole model's values, wherever they are in it."""
    model = _Answering()
    wanted = tensors_in(model(torch.ones(2, 4)))
    mesh = init_device_mesh("cpu", (ranks.world_size,), mesh_dim_names=("tensor",))
    cut_model(model, tensor_plan(model, {"up": "column", "down": "row"}, 2), mesh, ranks.device, sequence=False)
    answer = model(torch.ones(2, 4))
    found = tensors_in(answer)
    (answer.more[0]["best"] + answer.more[1].hidden).sum().backward()
    alike = [torch.allclose(one, other) for one, other in zip(found, wanted, strict=True)]
    return len(alike) == 3 and all(alike) and not any(isinstance(tensor, DTensor) for tensor in found)


def masks(ranks: Ranks) -> list[bool]:
    """Whether attention whose heads are cut gives what it gave whole, with masks of each kind: of all, of each sample,
    of each head, of both, learned."""
    (batch, heads, length, size), found = (2, 4, 3, 2), []
    mesh = init_device_mesh("cpu", (ranks.world_size,), mesh_dim_names=("tensor",))
    teach_torch()
    torch.manual_seed(0)
    whole = torch.randn(batch, heads, length, size)
    for shape in ((length, length), (batch, 1, 1, length), (batch, heads, 1, length), (1, heads, length, length)):
        for learned in (False, True):
            mask, results = torch.randn(shape, requires_grad=learned), []
            for x in (whole.clone(), DTensor.from_local(whole.chunk(2, 1)[ranks.global_rank], mesh, (Shard(1),))):
                query = x.requires_grad_()
                mask.grad = None
                output = F.scaled_dot_product_attention(query, query, query, attn_mask=mask)
                (output * torch.arange(float(size))).sum().backward()  # type: ignore[no-untyped-call]
                tensors = [output, query.grad, mask.grad if learned else output]
                results.append([t.full_tensor() if isinstance(t, DTensor) else t for t in tensors])
            found.append(all(torch.allclose(one, other, atol=1e-6) for one, other in zip(*results, strict=True)))
    return found


_WHOLE = torch.arange(1.0, 9.0).reshape(4, 2)
_ELSEWHERE = [
    (Shard(0), Replicate()),
    (Shard(0), Shard(1)),
    (Shard(0), Partial()),
    (Replicate(), Shard(0)),
    (Replicate(), Partial()),
]


def elsewhere(ranks: Ranks) -> list[bool]:
    """Whether gradients that lie in another way than their parameters, or are summands, become the whole's: of the only
    copy of a model, and in the buckets that several copies sum."""
    mesh = init_device_mesh("cpu", (ranks.world_size,), mesh_dim_names=("tensor",))
    alone, _ = dist.new_subgroups(group_size=1)  # type: ignore[no-untyped-call]
    found = []
    for place, other in _ELSEWHERE:
        for sync_of in (OneCopy, partial(BucketedAllReduce, group=alone)):
            held = torch.zeros(2, 2) if isinstance(place, Shard) else torch.zeros(4, 2)
            parameter = nn.Parameter(DTensor.from_local(held, mesh, (place,)))
            if isinstance(other, Shard):
                local = _WHOLE.chunk(ranks.world_size, other.dim)[ranks.global_rank].contiguous()
            else:
                local = _WHOLE / ranks.world_size if isinstance(other, Partial) else _WHOLE.clone()
            sync = sync_of([parameter])
            sync.zero()
            sync.begin(last=True)
            given = DTensor.from_local(local, mesh, (other,), run_check=False)
            sync.backward(_Given.apply(parameter, given))  # type: ignore[no-untyped-call]
            sync.finish()
            gradient = parameter.grad
            assert isinstance(gradient, DTensor)
            found.append(gradient.placements == (place,) and torch.equal(gradient.full_tensor(), _WHOLE))
    return found


class _Given(torch.autograd.Function):
    """A loss of which a parameter has a given gradient."""

    @staticmethod
    def forward(ctx: Any, parameter: Tensor, gradient: Tensor) -> Tensor:
        ctx.gradient = gradient
        return torch.zeros(())

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor, None]:
        return ctx.gradient, None
