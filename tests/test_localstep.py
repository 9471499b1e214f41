"""An optimizer's step on local tensors: the numbers and the state of torch's own step on DTensors, bit for bit."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from odd_models import Aging
from torch import Tensor, nn
from torch._C._distributed_c10d import HashStore  # as torch.distributed re-exports it
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from dtrain.strategies.localstep import LocalStep, step_of


@pytest.fixture(scope="module")
def mesh() -> Iterator[DeviceMesh]:
    dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


class Halves(torch.optim.AdamW):
    """Torch's own class is known; what is derived from it might do anything."""


def parameters(mesh: DeviceMesh, *, plain: bool) -> list[nn.Parameter]:
    torch.manual_seed(0)
    cut = [nn.Parameter(DTensor.from_local(torch.randn(4, 3), mesh, (Shard(0),))) for _ in range(3)]
    return [*cut, nn.Parameter(torch.randn(4))] if plain else cut


def local(value: Any) -> Any:
    return value.to_local() if isinstance(value, DTensor) else value


def same(one: Any, other: Any) -> bool:
    """Of one type, too: what is saved is asked where it lies."""
    if type(one) is not type(other):
        return False
    return torch.equal(local(one), local(other)) if isinstance(one, Tensor) else bool(one == other)


def load_other(optimizer: torch.optim.Optimizer) -> None:
    """A state of other values, in memory of its own."""
    saved = copy.deepcopy(optimizer.state_dict())
    for value in (value for entry in saved["state"].values() for key, value in entry.items() if key != "step"):
        if isinstance(value, Tensor):
            local(value).mul_(0.5)
    optimizer.load_state_dict(saved)


@pytest.mark.parametrize(
    ("make", "more"),
    [
        (torch.optim.AdamW, {"weight_decay": 0.1}),
        (torch.optim.AdamW, {"foreach": True}),
        (torch.optim.SGD, {"momentum": 0.9}),
        (torch.optim.Adagrad, {}),
        (Aging, {}),
    ],
)
@torch.no_grad()
def test_a_local_step_is_the_step(mesh: DeviceMesh, make: Any, more: dict[str, Any]) -> None:
    """With parameters that have no gradient in some steps, a plain one among them, state that is loaded between, and
    parameters that are put elsewhere in memory, as fsdp may do it."""
    plain = "foreach" not in more  # which torch 2.13 can't mix
    here, there = (parameters(mesh, plain=plain) for _ in range(2))
    ours, theirs = make(here, lr=0.1, **more), make(there, lr=0.1, **more)
    step = step_of(ours)
    assert isinstance(step, LocalStep)
    for number in range(6):
        for held in (here, there):
            for index, parameter in enumerate(held):
                parameter.grad = None if (index + number) % 3 == 0 else torch.sin(parameter.detach() * number + index)
        if number == 3:
            for optimizer in (ours, theirs):
                load_other(optimizer)
        if number == 4:
            for parameter in (each for each in (*here, *there) if isinstance(each, DTensor)):
                parameter._local_tensor = parameter._local_tensor.clone()
        step()
        theirs.step()
        for one, other in zip(here, there, strict=True):
            assert same(one.data, other.data)
            assert ours.state[one].keys() == theirs.state[other].keys()
            assert all(same(value, theirs.state[other][key]) for key, value in ours.state[one].items())


def test_what_may_not_be_elementwise_steps_on_the_whole(mesh: DeviceMesh) -> None:
    optimizer = Halves(parameters(mesh, plain=False))
    assert step_of(optimizer) == optimizer.step
