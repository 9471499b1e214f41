"""Learning-rate schedules as pure functions of the step, so that a resumed run needs no schedule state.

A user's own LRScheduler (a Target) is brought to a step by replaying its calls.
"""

from __future__ import annotations

import math
import warnings
from typing import Protocol

import torch

from dtrain.cluster.errors import UsageError
from dtrain.runtime import targets
from dtrain.runtime.config import ScheduleConfig, Target


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


class PureSchedule:
    def __init__(self, config: ScheduleConfig, optimizer: torch.optim.Optimizer, steps: int) -> None:
        self._config = config
        self._optimizer = optimizer
        self._steps = steps
        self._peaks = [float(group["lr"]) for group in optimizer.param_groups]

    def set_rate(self, step: int) -> float:
        ratio = factor(self._config, step, self._steps)
        for group, peak in zip(self._optimizer.param_groups, self._peaks, strict=True):
            group["lr"] = peak * ratio
        return self._peaks[0] * ratio


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
    config: ScheduleConfig | Target, optimizer: torch.optim.Optimizer, steps: int, start_step: int
) -> Schedule:
    """Call it before optimizer state is loaded: it reads the peak rates of the groups."""
    if isinstance(config, Target):
        return ReplayedSchedule(config, optimizer, start_step)
    return PureSchedule(config, optimizer, steps)
