"""Learning-rate schedules: pure functions of the step; a user's own scheduler is brought to a step by replay."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dtrain.cluster.errors import UsageError
from dtrain.runtime.config import ParamGroup, ScheduleConfig, Target
from dtrain.runtime.schedules import factor, make_schedule, ratio


def rates(config: ScheduleConfig, steps: int) -> list[float]:
    return [factor(config, step, steps) for step in range(1, steps + 1)]


def test_shapes() -> None:
    assert rates(ScheduleConfig(name="constant"), 3) == [1.0, 1.0, 1.0]
    assert rates(ScheduleConfig(name="constant", warmup=2), 4) == [0.5, 1.0, 1.0, 1.0]
    assert rates(ScheduleConfig(name="linear", warmup=1), 5) == pytest.approx([1.0, 0.75, 0.5, 0.25, 0.0])
    assert rates(ScheduleConfig(name="linear", warmup=1, min_ratio=0.5), 5) == pytest.approx(
        [1, 0.875, 0.75, 0.625, 0.5]
    )
    assert rates(ScheduleConfig(name="cosine", warmup=1), 5)[2] == pytest.approx(0.5)
    assert rates(ScheduleConfig(name="cosine", min_ratio=0.1), 10)[-1] == pytest.approx(0.1)
    assert rates(ScheduleConfig(name="wsd", warmup=1, decay=2), 6) == pytest.approx([1, 1, 1, 1, 0.5, 0.0])


def make_optimizer() -> torch.optim.Optimizer:
    parameters = [torch.nn.Parameter(torch.zeros(1)) for _ in range(2)]
    groups: list[dict[str, Any]] = [{"params": parameters[:1]}, {"params": parameters[1:], "lr": 0.01}]
    return torch.optim.SGD(groups, lr=0.1)


def test_every_group_keeps_its_own_peak() -> None:
    optimizer = make_optimizer()
    schedule = make_schedule(ScheduleConfig(name="linear", warmup=2), optimizer, 4, 0)
    assert schedule.set_rate(1) == pytest.approx(0.05)
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.05, 0.005])


@pytest.mark.parametrize(
    ("name", "arguments"), [("StepLR", {"step_size": 3, "gamma": 0.5}), ("CosineAnnealingLR", {"T_max": 10})]
)
def test_a_users_scheduler_resumes_exactly(name: str, arguments: dict[str, object]) -> None:
    target = Target(target=f"torch.optim.lr_scheduler.{name}", kwargs=dict(arguments))
    whole = make_schedule(target, make_optimizer(), 10, 0)
    straight = [whole.set_rate(step) for step in range(1, 11)]
    resumed = make_schedule(target, make_optimizer(), 10, 6)
    assert [resumed.set_rate(step) for step in range(7, 11)] == straight[6:]
    assert len(set(straight)) > 2


@pytest.mark.parametrize("name", ["torch.optim.lr_scheduler.ReduceLROnPlateau", "builtins.list"])
def test_what_is_no_function_of_the_step_is_refused(name: str) -> None:
    optimizer: Any = make_optimizer() if name != "builtins.list" else ()
    with pytest.raises(UsageError, match="schedule"):
        make_schedule(Target(target=name, kwargs={}), optimizer, 10, 0)


def test_one_schedule_after_another() -> None:
    parts = (ScheduleConfig(name="constant", warmup=2, steps=4), ScheduleConfig(name="linear", min_ratio=0.5, steps=2),
             ScheduleConfig(name="cosine"))  # fmt: skip
    found = [ratio(parts, step, 10) for step in range(1, 11)]
    assert found[:6] == pytest.approx([0.5, 1.0, 1.0, 1.0, 0.75, 0.5])
    assert found[6:] == pytest.approx(rates(ScheduleConfig(name="cosine"), 4))


def test_a_group_with_a_schedule_of_its_own() -> None:
    """By number: the group without a pattern comes first, where parameters are left for it."""
    first, second = torch.nn.Parameter(torch.ones(1)), torch.nn.Parameter(torch.ones(1))
    groups = (ParamGroup(match="a", settings={"lr": 0.1}, schedule=ScheduleConfig(warmup=4)),)
    both: list[dict[str, Any]] = [{"params": [first]}, {"params": [second], "lr": 0.1}]
    optimizer = torch.optim.SGD(both, lr=1.0)
    schedule = make_schedule(ScheduleConfig(name="linear"), optimizer, 4, 0, groups)
    assert schedule.set_rate(1) == 0.75
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.75, 0.025])
    only = torch.optim.SGD([{"params": [first, second], "lr": 0.1}], lr=1.0)
    assert make_schedule(ScheduleConfig(name="linear"), only, 4, 0, groups).set_rate(2) == pytest.approx(0.05)


def test_an_optimizer_that_makes_groups_of_its_own() -> None:
    optimizer = torch.optim.SGD([{"params": [torch.nn.Parameter(torch.ones(1))]} for _ in range(4)], lr=1.0)
    plain = (ParamGroup(match="a", settings={"lr": 1.0}),)
    assert make_schedule(ScheduleConfig(name="linear"), optimizer, 4, 0, plain).set_rate(1) == 0.75
    own = (ParamGroup(match="a", settings={}, schedule=ScheduleConfig()),)
    with pytest.raises(UsageError, match="SGD made 4 groups of 1 patterns"):
        make_schedule(ScheduleConfig(name="linear"), optimizer, 4, 0, own)
