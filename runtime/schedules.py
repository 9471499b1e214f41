"""Learning-rate schedules as pure functions of the step, so that a resumed run needs no schedule state.

A user's own LRScheduler (a Target) is brought to a step by replaying its calls.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import Protocol

import torch

from dtrain.cluster.errors import UsageError
from dtrain.runtime import targets
from dtrain.runtime.config import ParamGroup, ScheduleConfig, Schedules, Target


class Schedule(Protocol):
    def set_rate(self, step: int) -> float:
        """Sets the learning rates for update number `step` (from 1, each once and in order) and returns the first
        group's."""


def factor(config: ScheduleConfig, step: int, steps: int) -> float:
    """The rate of update `step` (1 .. steps) over the peak rate."""
    if step <= config.warmup:
        return step / config.warmup
    span = max(1, steps - config.warmup)
    done = min(1.0, (step - config.warmup) / span)
    low = config.min_ratio
    match config.name:
        case "constant":
            return 1.0
        case "linear":
            return 1.0 + (low - 1.0) * done
        case "cosine":
            return low + (1.0 - low) * (1.0 + math.cos(math.pi * done)) / 2.0
        case "wsd":  # arXiv 2404.06395, section 4: warm-up, stable, decay
            fall = min(1.0, max(0, step - (steps - config.decay)) / max(1, config.decay))
            return 1.0 + (low - 1.0) * fall


def ratio(schedules: Schedules, step: int, steps: int) -> float:
    """As factor, where several follow one another: each but the last for its own number of steps."""
    parts = schedules if isinstance(schedules, tuple) else (schedules,)
    begun = 0
    for part in parts[:-1]:
        length = part.steps or 0
        if step <= begun + length:
            return factor(part, step - begun, length)
        begun += length
    return factor(parts[-1], step - begun, steps - begun)


class PureSchedule:
    def __init__(self, schedules: Sequence[Schedules], optimizer: torch.optim.Optimizer, steps: int) -> None:
        """`schedules`: one for each of the optimizer's groups."""
        self._schedules = schedules
        self._optimizer = optimizer
        self._steps = steps
        self._peaks = [float(group["lr"]) for group in optimizer.param_groups]

    def set_rate(self, step: int) -> float:
        groups = self._optimizer.param_groups
        for group, peak, schedule in zip(groups, self._peaks, self._schedules, strict=True):
            group["lr"] = peak * ratio(schedule, step, self._steps)
        return float(groups[0]["lr"])


class ReplayedSchedule:
    """`target` is called with the optimizer and returns an LRScheduler; its state at a step comes from replay."""

    def __init__(self, target: Target, optimizer: torch.optim.Optimizer, start_step: int) -> None:
        self._optimizer = optimizer
        self._scheduler = _build(target, optimizer)
        self._calls = 0
        self._advance(start_step)

    def _advance(self, calls: int) -> None:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Detected call of `lr_scheduler.step")
            while self._calls < calls:
                self._scheduler.step()
                self._calls += 1

    def set_rate(self, step: int) -> float:
        self._advance(step - 1)
        return float(self._optimizer.param_groups[0]["lr"])


def _build(target: Target, optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
    scheduler = targets.build(target, optimizer)
    if isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau):
        raise UsageError(
            f"schedule: {target.target} follows a measured value, so the rate is no function of the step. "
            "Take one that depends on the step alone"
        )
    if not isinstance(scheduler, torch.optim.lr_scheduler.LRScheduler):
        raise UsageError(f"schedule: {target.target} returned {type(scheduler).__name__}, not an LRScheduler")
    return scheduler


def make_schedule(
    config: Schedules | Target,
    optimizer: torch.optim.Optimizer,
    steps: int,
    start_step: int,
    groups: Sequence[ParamGroup] = (),
) -> Schedule:
    """Call it before optimizer state is loaded: it reads the peak rates of the groups. `groups`: those of the config,
    of which some may have a schedule of their own."""
    if isinstance(config, Target):
        return ReplayedSchedule(config, optimizer, start_step)
    rest = len(optimizer.param_groups) - len(groups)  # build.py puts the parameters without a pattern first
    if any(group.schedule for group in groups) and rest not in (0, 1):
        raise UsageError(
            f"optimizer.groups: {type(optimizer).__name__} made {len(optimizer.param_groups)} groups of "
            f"{len(groups)} patterns, so it can't be told which one has which schedule. Leave the groups' schedules out"
        )
    own = [group.schedule or config for group in groups] if rest in (0, 1) else []
    return PureSchedule([config] * (len(optimizer.param_groups) - len(own)) + own, optimizer, steps)
