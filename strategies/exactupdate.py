"""The update in exact mode: a global norm that does not depend on how parameters are cut. The optimizer's own step does
not either, where it is elementwise and not fused.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from dtrain.strategies.degrees import Degrees
from dtrain.strategies.exactexchange import Range
from dtrain.strategies.placement import local_part
from dtrain.strategies.protocol import AllReduce
from dtrain.strategies.update import OwnGradients

_BLOCK_ELEMENTS = 1 << 20  # squared at once


@dataclass(frozen=True, slots=True, kw_only=True)
class ExactUpdate(OwnGradients):
    """Squares are added up in float64 along each row by halving it, and the rows of all parameters likewise: sums of
    two numbers each, in an order that shapes alone decide. Ranks that hold the same rows share them out."""

    degrees: Degrees
    rank: int

    def norm(self, all_reduce: AllReduce) -> float:
        rows = [self._rows(p) for group in self.optimizer.param_groups for p in group["params"]]
        if not rows:
            return 0.0
        together = torch.cat(rows)  # each row's sum on one rank, 0 on the others
        if self.degrees.world_size > 1:
            dist.all_reduce(together)
        return math.sqrt(float(halved(together[None])))

    def _rows(self, parameter: Tensor) -> Tensor:
        """Sums of squares of the rows that this rank looks after; 0 for the rest of the parameter's."""
        num_rows = parameter.shape[0] if parameter.ndim else 1
        found = torch.zeros(num_rows, dtype=torch.float64, device=parameter.device)
        gradient = parameter.grad
        if gradient is None or not parameter.numel():
            return found
        place = self.degrees.coordinate(self.rank)
        held = _part((0, num_rows), self.degrees.shard, place["shard"])
        first, last = _part(held, self.degrees.replicate, place["replicate"])
        if first < last:
            rows = local_part(gradient).reshape(held[1] - held[0], -1)
            found[first:last] = row_squares(rows[first - held[0] : last - held[0]])
        return found


def _part(rows: Range, num: int, which: int) -> Range:
    """One of `num` parts of some rows, cut as FSDP cuts them."""
    begin, end = rows
    size = -(-(end - begin) // num)
    return min(begin + which * size, end), min(begin + (which + 1) * size, end)


def row_squares(rows: Tensor) -> Tensor:
    """(rows, columns) -> (rows,): what a row gives depends on that row alone."""
    step = max(1, _BLOCK_ELEMENTS // rows.shape[1])
    return torch.cat([halved(block.to(torch.float64, copy=True).square_()) for block in torch.split(rows, step)])


def halved(rows: Tensor) -> Tensor:
    """(rows, columns) -> (rows,): the sum of each row, its second half added to the first again and again. In place."""
    columns = rows.shape[1]
    while columns > 1:
        half = (columns + 1) // 2
        rows[:, : columns - half] += rows[:, half:columns]
        columns = half
    return rows[:, 0]
