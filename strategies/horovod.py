"""Replicated data parallelism through Horovod: its DistributedOptimizer sums gradients while backward goes on.

The DistributedOptimizer only carries the hooks and the sums; the update is the user's own optimizer's. Horovod fuses
whatever is ready when its cycle comes, so that sums are taken in another order each time: here gradients meet in groups
that never change. How the ranks join Horovod is strategies/horovodjoin.py's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dtrain.cluster.errors import UsageError
from dtrain.strategies.buckets import split_into_buckets
from dtrain.strategies.caps import CAPS
from dtrain.strategies.config import StrategyConfig
from dtrain.strategies.horovodjoin import join
from dtrain.strategies.layout import degrees_of
from dtrain.strategies.protocol import MakeOptimizer, ModelSpec, Prediction, Topology, Wrapped, whole_model
from dtrain.strategies.single import LocalGradients
from dtrain.strategies.wrapping import wrap

# What Horovod 0.28.1 can sum, and what it can broadcast.
SUMMED = frozenset({torch.float64, torch.float32, torch.float16})
SENT = SUMMED | {torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool}
_NOT_YET = 1 << 30  # more backwards than a step has


class FlatCompression:
    """Horovod takes contiguous tensors only: others (channels last, say) go as the flat memory that they fill. A
    gradient has the strides of its parameter, which are the same on every rank."""

    @staticmethod
    def compress(tensor: Tensor) -> tuple[Tensor, Tensor]:
        return flat(tensor), tensor

    @staticmethod
    def decompress(summed: Tensor, tensor: Tensor) -> Tensor:
        return tensor  # Horovod sums in place


def flat(tensor: Tensor) -> Tensor:
    return tensor if tensor.is_contiguous() else tensor.as_strided((tensor.numel(),), (1,))


class HorovodGradients:
    """Sums gradients over all ranks in fixed groups. `distributed`: an hvd.DistributedOptimizer with these groups."""

    def __init__(self, parameters: Sequence[nn.Parameter], distributed: Any) -> None:
        self._parameters = tuple(parameters)
        self._distributed = distributed
        self._last = False
        self._pending: set[nn.Parameter] = set()  # those that the last micro-batch's backward has not reached
        self._unused: list[nn.Parameter] = []  # those without a gradient of this rank's own in this step
        # Parameters outlive the step: torch calls these before Horovod's hooks, which are on the graph's nodes.
        self._handles = [
            parameter.register_post_accumulate_grad_hook(self._reached)  # type: ignore[no-untyped-call]
            for parameter in self._parameters
        ]

    def zero(self) -> None:
        self._distributed.zero_grad()

    def begin(self, *, last: bool) -> None:
        """Horovod sends a gradient once as many backwards as it was told have reached it."""
        self._last = last
        self._distributed.set_backward_passes_per_step(1 if last else _NOT_YET)
        self._pending = set(self._parameters)

    def backward(self, loss: Tensor) -> None:
        loss.backward()  # type: ignore[no-untyped-call]

    def finish(self) -> bool:
        """A group leaves when all of it has been reached, so what was not gets zeros on the same way."""
        self._unused = [parameter for parameter in self._parameters if parameter.grad is None]
        missed = [parameter for parameter in self._parameters if parameter in self._pending]
        if missed:
            zeros = [torch.zeros_like(parameter) for parameter in missed]
            torch.autograd.backward([parameter.expand_as(parameter) for parameter in missed], zeros)
        self._distributed.synchronize()
        return bool(self._unused)

    def drop_unused(self) -> None:
        unused = torch.zeros(len(self._parameters))
        here = set(self._unused)
        for index, parameter in enumerate(self._parameters):
            unused[index] = float(parameter in here)
        dist.all_reduce(unused)
        for parameter, ranks in zip(self._parameters, unused.tolist(), strict=True):
            if ranks == dist.get_world_size():
                parameter.grad = None

    def settle(self) -> None:
        pass

    def _reached(self, parameter: Tensor) -> None:
        assert isinstance(parameter, nn.Parameter)
        assert parameter.grad is not None
        if self._last and parameter not in self._pending:  # its group counts it twice, and may have left already
            raise UsageError(
                f"a parameter of shape {tuple(parameter.shape)} got its gradient in two parts in one backward, as "
                "reentrant activation checkpointing does. Set use_reentrant=False, or strategy: fsdp"
            )
        self._pending.discard(parameter)
        if parameter.grad.is_sparse:
            parameter.grad = parameter.grad.to_dense()


class Horovod:
    name = "horovod"
    caps = CAPS["horovod"]

    def check(self, config: StrategyConfig, topology: Topology) -> Sequence[str]:
        return ()

    def predict(self, model: ModelSpec, config: StrategyConfig, topology: Topology) -> Prediction:
        return whole_model(model)

    def materialize(
        self,
        model: nn.Module,
        make_optimizer: MakeOptimizer,
        config: StrategyConfig,
        topology: Topology,
        device: torch.device,
    ) -> Wrapped:
        model.to(device)
        optimizer = make_optimizer(model)
        degrees = degrees_of(config, topology.world_size)
        if topology.world_size == 1:
            return wrap(model, optimizer, LocalGradients(optimizer=optimizer), degrees, global_rank=0)
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        _check(trained)
        hvd = join(topology, num_tensors=len(trained))
        # As Horovod's users expect: what rank 0 built is what all start from.
        start = {name: flat(t.detach()) for name, t in [*model.named_parameters(), *model.named_buffers()]}
        hvd.broadcast_parameters({name: t for name, t in start.items() if t.dtype in SENT}, root_rank=0)
        backwards = list(reversed(trained.values()))
        distributed = hvd.DistributedOptimizer(
            torch.optim.SGD(trained.values(), lr=0.0),
            named_parameters=trained.items(),
            compression=FlatCompression,
            op=hvd.Sum,
            groups=split_into_buckets(backwards, [p.numel() for p in backwards]),
        )
        sync = HorovodGradients(list(trained.values()), distributed)
        wrapped = wrap(model, optimizer, sync, degrees, global_rank=topology.global_rank)
        return replace(wrapped, close=hvd.shutdown)


def _check(trained: dict[str, nn.Parameter]) -> None:
    """Raises UsageError."""
    for name, parameter in trained.items():
        if parameter.dtype not in SUMMED:
            raise UsageError(
                f"strategy: Horovod can't sum gradients of {str(parameter.dtype).removeprefix('torch.')}, and {name} "
                "has them. Keep parameters in float32 and set train.precision, or take ddp"
            )


strategy = Horovod()
