"""The self-check at every start under ZeRO: a pattern is written into the partitions, spread, and read back from the
model's parameters. So a DeepSpeed that moved things is refused, and never trains or saves something else.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dtrain.cluster.errors import UsageError
from dtrain.strategies.zero_engine import unknown
from dtrain.strategies.zero_partitions import Slice

_STRIDE, _PERIOD = 7919, 1 << 22  # every value is a whole number that float32 holds exactly

Gathered = Callable[[nn.Parameter], AbstractContextManager[object]]


@torch.no_grad()
def check_partitions(slices: Sequence[Slice], publish: Callable[[], None], gathered: Gathered) -> None:
    """`gathered`: a context in which a parameter is whole. All values are afterwards as they were. Collective.

    Raises UsageError on every rank together.
    """
    kept = [one.mine.detach().clone() for one in slices]
    for number, one in enumerate(slices):
        begin, end = one.range
        one.mine.copy_(_pattern(number, begin, end, one.mine.device))
    publish()
    wrong = _first_wrong(slices, gathered)
    for one, values in zip(slices, kept, strict=True):
        one.mine.copy_(values)
    publish()
    if wrong < len(slices):
        raise UsageError(unknown(f"{slices[wrong].name} does not lie where it is looked for"))


def _first_wrong(slices: Sequence[Slice], gathered: Gathered) -> int:
    """The number of the first parameter that any rank reads something else from; len(slices) where there is none."""
    found = len(slices)
    for number, one in enumerate(slices):
        with gathered(one.parameter):
            held = one.parameter.detach().reshape(-1)
            wanted = _pattern(number, 0, held.numel(), held.device)
            if tuple(one.parameter.shape) != one.shape or not torch.equal(held, wanted):
                found = min(found, number)
    first = torch.tensor(found)
    dist.all_reduce(first, op=dist.ReduceOp.MIN)
    return int(first)


def _pattern(number: int, begin: int, end: int, device: torch.device) -> Tensor:
    return ((torch.arange(begin, end, device=device) + number * _STRIDE) % _PERIOD).float()
