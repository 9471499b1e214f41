"""Optimizers that nobody here knows, tried on a small tensor and on its halves."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dtrain.strategies.elementwise import differs_on_parts, is_elementwise


class Own(torch.optim.Optimizer):
    """Momentum; `trust` scales a tensor's update by its norm, as LAMB and LARS do."""

    def __init__(self, params: Iterable[Any], lr: float = 0.1, *, trust: bool = False, sign: bool = False) -> None:
        super().__init__(params, {"lr": lr, "trust": trust})
        self.sign = sign
        self.steps = 0

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.steps += 1
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                momentum = state["momentum"] = 0.9 * state.get("momentum", 0) + parameter.grad
                update = momentum.sign() if self.sign else momentum
                scale = parameter.norm() / update.norm() if group["trust"] else 1.0
                parameter.sub_(group["lr"] * scale * update)


class Together(Own):
    """One factor for all tensors, as Prodigy and D-Adaptation have it."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        every = [p for group in self.param_groups for p in group["params"]]
        total = sum(float(p.grad.square().sum()) for p in every)
        for parameter in every:
            parameter.sub_(parameter.grad / (1 + total))


class Pairs(Own):
    """Can't be tried on what it is not made for."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        assert all(p.shape == (3, 2) for group in self.param_groups for p in group["params"])


class HalvedAdam(torch.optim.AdamW):
    pass


def parameters() -> list[nn.Parameter]:
    return [nn.Parameter(torch.ones(3, 2)), nn.Parameter(torch.ones(2))]


CASES: list[tuple[Callable[[], torch.optim.Optimizer], bool]] = [
    (lambda: Own(parameters()), False),
    (lambda: Own(parameters(), sign=True), False),
    (lambda: HalvedAdam(parameters()), False),
    (lambda: Own(parameters(), trust=True), True),
    (lambda: Own([{"params": parameters()[:1], "trust": True}, {"params": parameters()[1:]}]), True),
    (lambda: type("Factored", (torch.optim.Adafactor,), {})(parameters()), True),
    (lambda: Together(parameters()), True),
    (lambda: Pairs(parameters()), False),
]


@pytest.mark.parametrize(("make", "differs"), CASES)
def test_what_is_not_elementwise_shows(make: Callable[[], torch.optim.Optimizer], differs: bool) -> None:
    optimizer = make()
    assert is_elementwise(type(optimizer)) is None
    assert differs_on_parts(optimizer) is differs


def test_a_trial_leaves_no_trace() -> None:
    optimizer = Own(parameters(), trust=True)
    groups, state, values = optimizer.param_groups, optimizer.state, optimizer.param_groups[0]["params"]
    torch.manual_seed(3)
    expected: Tensor = torch.rand(1)
    torch.manual_seed(3)
    differs_on_parts(optimizer)
    assert optimizer.param_groups is groups
    assert optimizer.state is state
    assert (optimizer.steps, len(state), len(groups)) == (0, 0, 1)
    assert all(torch.equal(value, torch.ones_like(value)) for value in values)
    assert torch.equal(torch.rand(1), expected)
