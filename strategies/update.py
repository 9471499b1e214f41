"""The update of parameters that hold their own gradients: the global norm, and the optimizer's step."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from dtrain.strategies.boxes import whole
from dtrain.strategies.placement import first_copies, local_boxes, local_part
from dtrain.strategies.protocol import AllReduce, Lying


@dataclass(frozen=True, slots=True, kw_only=True)
class OwnGradients:
    """Plain gradients are the same on every rank; of a DTensor's each rank holds what its placements say."""

    optimizer: torch.optim.Optimizer
    step: Callable[[], object]  # of it; see localstep.py

    def norm(self, all_reduce: AllReduce) -> float:
        return global_norm(self._gradients(), all_reduce)

    def gradients(self, module: nn.Module) -> Iterator[Lying]:
        for name, parameter in module.named_parameters():
            if (gradient := parameter.grad) is not None:
                shape = tuple(gradient.shape)
                boxes = local_boxes(gradient) if isinstance(gradient, DTensor) else [(whole(shape), gradient)]
                yield name, shape, boxes

    def apply(self, factor: float) -> None:
        gradients = self._gradients()
        if factor != 1.0 and gradients:
            torch._foreach_mul_([local_part(g) for g in gradients], factor)
        self.step()

    def _gradients(self) -> list[Tensor]:
        return [p.grad for group in self.optimizer.param_groups for p in group["params"] if p.grad is not None]


def global_norm(gradients: Iterable[Tensor], all_reduce: AllReduce) -> float:
    """The 2-norm over all axes; a replicated or tied gradient counts once."""
    whole: list[Tensor] = []  # the same on every rank
    cut: list[DTensor] = []
    for gradient in gradients:
        if isinstance(gradient, DTensor):
            cut.append(gradient)
        else:
            whole.append(gradient)
    norm = float(torch.nn.utils.get_total_norm(whole)) if whole else 0.0
    if not cut:
        return norm
    shards = [local_part(gradient) for gradient, first in zip(cut, first_copies(cut), strict=True) if first]
    local = float(torch.nn.utils.get_total_norm(shards)) if shards else 0.0
    (square,) = all_reduce([local * local])
    return math.sqrt(norm * norm + square)
