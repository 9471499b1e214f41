"""Micro-batches one after another through a module that lies whole, or gathers itself, on every rank."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dtrain.cluster.errors import UsageError
from dtrain.strategies.outputs import tensors_in
from dtrain.strategies.protocol import Forward, Measured, MicroBatch, Passed, StepOptions, Wrapped


class OneByOne:
    def train(
        self, wrapped: Wrapped, micro_batches: Sequence[MicroBatch], options: StepOptions, divisor: float
    ) -> Passed:
        sums: list[Tensor] = []
        true_count = 0.0
        for number, micro in enumerate(micro_batches, start=1):
            total, count = one_pass(wrapped, micro, options, divisor, last=number == len(micro_batches))
            sums.append(total)
            true_count += count
        values = torch.stack(sums).tolist()
        bad = next((m for m, value in zip(micro_batches, values, strict=True) if not math.isfinite(value)), None)
        return Passed(loss_sum=math.fsum(values) if bad is None else math.nan, count=true_count, bad=bad)

    def evaluate(
        self, module: nn.Module, micro: MicroBatch, forward: Forward, measure: Callable[[Any], Measured]
    ) -> Measured:
        return measure(forward(module, micro.batch, micro.count))


def one_pass(
    wrapped: Wrapped, micro: MicroBatch, options: StepOptions, divisor: float, *, last: bool
) -> tuple[Tensor, float]:
    """Forward and backward of one micro-batch: (its sum of losses in float64, its true count)."""
    wrapped.sync.begin(last=last)
    options.on_phase("forward")
    with options.autocast():
        output = options.forward(wrapped.module, micro.batch, micro.count)
        total, count = loss_of(output, micro, options)
    options.on_phase("backward")
    wrapped.sync.backward(total / divisor)
    return total.detach().double(), count


def loss_of(output: Any, micro: MicroBatch, options: StepOptions) -> tuple[Tensor, float]:
    """(the sum of a micro-batch's losses, its true count): 0 and 0 where it must not count. Raises UsageError."""
    total, count = options.loss(output, micro.batch, micro.count)
    if not total.requires_grad:
        raise UsageError("loss: it does not depend on any parameter that requires a gradient")
    if micro.weight == 0 or not count:
        return _silenced(output, total), 0.0
    return total, count


def _silenced(output: object, total: Tensor) -> Tensor:
    """A loss of 0 whose backward brings exact zeros to the model. By where and a hook, not by 0 *: a mean over nothing
    is NaN, and 0 * NaN would leak from it, forward or backward."""
    for tensor in tensors_in(output):
        if tensor.requires_grad:
            tensor.register_hook(torch.zeros_like)  # type: ignore[no-untyped-call]
    return torch.where(torch.zeros_like(total, dtype=torch.bool), total, 0.0)
