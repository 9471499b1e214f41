"""Replicated data parallelism: every rank holds the whole model, gradients are summed in buckets during backward.

Not torch's DistributedDataParallel: that rebuilds its buckets after the first step, so a run resumed at 3 or more ranks
sums in another order than the one it continues, and differs in the last bits. Here the buckets never change. With
`tensor` every copy is cut over neighbouring ranks, and each of them sums its part with those that hold the same one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from dtrain.cluster.errors import UsageError
from dtrain.strategies.buckets import split_into_buckets
from dtrain.strategies.caps import CAPS
from dtrain.strategies.config import StrategyConfig
from dtrain.strategies.deferred import place
from dtrain.strategies.layout import check_layout, degrees_of
from dtrain.strategies.mesh import group_of, make_mesh
from dtrain.strategies.protocol import (
    GradientSync,
    MakeOptimizer,
    ModelSpec,
    Prediction,
    Topology,
    Wrapped,
    cut_over,
    whole_model,
)
from dtrain.strategies.tensor import spread_over_tensor
from dtrain.strategies.tensorgrads import OneCopy, as_gradient, own_part, part_of_gradient, sum_over_tensor
from dtrain.strategies.wrapping import wrap


class _Bucket:
    """A flat buffer of gradients, with one more element a parameter: how many ranks produced a gradient for it."""

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        self.parameters = tuple(parameters)
        sizes = [own_part(p).numel() for p in parameters]
        first = own_part(parameters[0])
        self.buffer = torch.zeros(sum(sizes) + len(sizes), dtype=first.dtype, device=first.device)
        *flat, self.produced = torch.split(self.buffer, [*sizes, len(sizes)])
        self.views = tuple(_shaped_like(own_part(p), part) for part, p in zip(flat, parameters, strict=True))
        self.missing: set[int] = set()  # parameters without a gradient in this step so far
        self.pending: set[int] = set()  # parameters that the last micro-batch's backward has not reached
        self.partial: set[int] = set()  # parameters of which every tensor rank has a summand of the gradient
        self.work: dist.Work | None = None
        self._typed: dict[tuple[int, bool], Tensor] = {}  # made once: to make a DTensor costs as much as a layer's bias

    def reset(self) -> None:
        """The buffer is not zeroed: the first gradient of a step is copied over what lies there, which costs less than
        to zero it and to add."""
        for parameter in self.parameters:
            parameter.grad = None
        self.missing = set(range(len(self.parameters)))
        self.pending = set(self.missing)
        self.partial.clear()

    def take(self, index: int) -> None:
        """The first gradient of a step moves into the buffer; what autograd adds later it adds there."""
        parameter, view = self.parameters[index], self.views[index]
        gradient = parameter.grad
        assert gradient is not None
        if isinstance(gradient, DTensor):
            local, is_partial = part_of_gradient(gradient, parameter)
            view.copy_(local)
            if is_partial:
                self.partial.add(index)
            parameter.grad = self._as_gradient(index, partial=is_partial)
        else:
            view.copy_(gradient.to_dense() if gradient.is_sparse else gradient)
            parameter.grad = view
        self.missing.discard(index)

    def sum_partial(self) -> None:
        """Over the tensor ranks, before the sum over copies: other copies may not know that there are any."""
        if self.partial:
            indices = sorted(self.partial)
            sum_over_tensor([self.parameters[i] for i in indices], [self.views[i] for i in indices])
            for index in indices:
                self.parameters[index].grad = self._as_gradient(index)

    def fill_gaps(self) -> None:
        """Says which parameters have a gradient here. The others' places are zeros, for the ranks that have one."""
        self.produced.fill_(1.0)
        for index in self.missing:
            self.produced[index] = 0.0
            self.views[index].zero_()

    def spread(self) -> None:
        """After the sum: a parameter without a gradient here has one all the same where another rank found one."""
        if not self.missing:
            return
        produced = self.produced.tolist()
        for index in self.missing:
            if produced[index]:
                self.parameters[index].grad = self._as_gradient(index)

    def _as_gradient(self, index: int, *, partial: bool = False) -> Tensor:
        key = index, partial
        if key not in self._typed:
            self._typed[key] = as_gradient(self.views[index], self.parameters[index], partial=partial)
        return self._typed[key]


class BucketedAllReduce:
    """Sums gradients over the ranks of `group`, bucket by bucket in one fixed order, while backward goes on.

    A parameter that took part on no rank keeps no gradient, as in one process.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], group: dist.ProcessGroup | None = None) -> None:
        self._group = group
        # Backward reaches the last registered parameters first.
        learning = [parameter for parameter in reversed(parameters) if parameter.requires_grad]
        chunks = split_into_buckets(learning, [own_part(parameter).numel() for parameter in learning])
        self._buckets = [_Bucket(chunk) for chunk in chunks]
        self._next = 0
        self._last = False
        self._handles = [
            parameter.register_post_accumulate_grad_hook(self._make_hook(bucket, index))  # type: ignore[no-untyped-call]
            for bucket in self._buckets
            for index, parameter in enumerate(bucket.parameters)
        ]

    def zero(self) -> None:
        for bucket in self._buckets:
            bucket.reset()
        self._next = 0

    def begin(self, *, last: bool) -> None:
        self._last = last

    def backward(self, loss: Tensor) -> None:
        loss.backward()  # type: ignore[no-untyped-call]

    def settle(self) -> None:
        pass

    def finish(self) -> bool:
        while self._next < len(self._buckets):  # buckets with parameters that had no part in the last micro-batch
            self._reduce(self._buckets[self._next])
        for bucket in self._buckets:
            assert bucket.work is not None
            bucket.work.wait()
            bucket.work = None
            bucket.spread()
        return False  # the buckets say it themselves

    def drop_unused(self) -> None:
        pass

    def _make_hook(self, bucket: _Bucket, index: int) -> Callable[[Tensor], None]:
        def hook(parameter: Tensor) -> None:
            if index in bucket.missing:
                bucket.take(index)
            if not self._last:
                return
            if index not in bucket.pending:  # its bucket may be on the way already
                raise UsageError(
                    f"a parameter of shape {tuple(parameter.shape)} got its gradient in two parts in one backward, as "
                    "reentrant activation checkpointing does. Set use_reentrant=False, or strategy: fsdp"
                )
            bucket.pending.discard(index)
            while self._next < len(self._buckets) and not self._buckets[self._next].pending:
                self._reduce(self._buckets[self._next])

        return hook

    def _reduce(self, bucket: _Bucket) -> None:
        bucket.sum_partial()
        bucket.fill_gaps()
        bucket.work = dist.all_reduce(bucket.buffer, group=self._group, async_op=True)
        self._next += 1


def _shaped_like(parameter: Tensor, flat: Tensor) -> Tensor:
    """`flat` as autograd lays out a gradient: with the parameter's strides where it is dense (channels last, say)."""
    return flat.as_strided(parameter.shape, torch.empty_like(parameter, device="meta").stride(), flat.storage_offset())


class Ddp:
    name = "ddp"
    caps = CAPS["ddp"]

    def check(self, config: StrategyConfig, topology: Topology) -> Sequence[str]:
        return [message for _, message in check_layout(config, topology.nodes, topology.world_size // topology.nodes)]

    def predict(self, model: ModelSpec, config: StrategyConfig, topology: Topology) -> Prediction:
        degrees = degrees_of(config, topology.world_size)
        return cut_over(whole_model(model), degrees.tensor * degrees.pipeline)

    def materialize(
        self,
        model: nn.Module,
        make_optimizer: MakeOptimizer,
        config: StrategyConfig,
        topology: Topology,
        device: torch.device,
    ) -> Wrapped:
        degrees = degrees_of(config, topology.world_size)
        group: dist.ProcessGroup | None = None
        notes: tuple[str, ...] = ()
        if degrees.tensor > 1:
            mesh = make_mesh(degrees, device.type, ("replicate",))
            notes = spread_over_tensor(model, config, mesh, device)
            group = group_of(mesh, "replicate")
        place(model, device)
        optimizer = make_optimizer(model)
        parameters = list(model.parameters())
        alone = degrees.tensor == topology.world_size > 1  # no other copy to sum over
        sync: GradientSync = OneCopy(parameters) if alone else BucketedAllReduce(parameters, group)
        return wrap(model, optimizer, sync, degrees, global_rank=topology.global_rank, notes=notes)


strategy = Ddp()
