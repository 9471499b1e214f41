"""Gradients of logical shards, each on its own until the tree adds it: the same bits whichever ranks have which shards.

For parameters that lie whole on every rank and for those that FSDP gathers: it takes every gradient away as soon as
autograd has made it, so FSDP finds none to reduce, and leaves each rank its part of the sum.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from dtrain.cluster.errors import UsageError
from dtrain.strategies.degrees import Degrees
from dtrain.strategies.exactexchange import Exchange, Groups, make_groups
from dtrain.strategies.exacttree import GrowingSums, LogicalShards, Node

Gradients = list[Tensor | None]  # flat, one a parameter; None: zeros
OnGradient = Callable[[int, Tensor], None]  # (index of the parameter, the tensor that has got its gradient)
# Has it called from then on whenever a backward has made a gradient.
Watch = Callable[[OnGradient], None]


class _Bucket:
    """Gradients that travel together: of the shard in work, and the tree's sums so far."""

    def __init__(self, parameters: Sequence[nn.Parameter], exchange: Exchange | None, tree: GrowingSums) -> None:
        self.parameters = tuple(parameters)
        self.exchange = exchange
        self._tree = tree
        self._strides = [torch.empty_like(p, device="meta").stride() for p in parameters]
        self.pending: set[int] = set()  # parameters that the last micro-batch's backward has not reached
        self._shard: Gradients = []
        self._sums: list[tuple[Node, Gradients]] = []
        self.reset()

    def reset(self) -> None:
        self._shard = [None] * len(self.parameters)
        self._sums = []
        self.pending = set(range(len(self.parameters)))
        for parameter in self.parameters:
            parameter.grad = None

    def take(self, index: int, gradient: Tensor) -> None:
        flat, before = _flat(gradient, self._strides[index]), self._shard[index]
        self._shard[index] = flat if before is None else before.add_(flat)

    def close_shard(self, shard: int) -> None:
        self._tree.add_to(self._sums, shard, self._shard, _add)
        self._shard = [None] * len(self.parameters)

    def start(self) -> None:
        if self.exchange:
            self.exchange.start([gradients for _, gradients in self._sums])
            self._sums = []

    def found(self) -> Gradients:
        """The sums over all shards of what this rank holds; after the exchange, where there is one."""
        if self.exchange:
            return [*self.exchange.finish()]
        ((_, gradients),) = self._sums
        return gradients


class ExactGradients:
    """Keeps protocol.GradientSync. Besides: `begin_shard` and `end_shard` around the micro-batches of one."""

    def __init__(
        self,
        parameters: Sequence[nn.Parameter],
        buckets: Sequence[Sequence[int]],
        shards: LogicalShards,
        degrees: Degrees,
        *,
        watch: Watch,
        settle: Callable[[], None],
    ) -> None:
        """`buckets`: indices of parameters, in the order in which their gradients come. Collective."""
        self._parameters = parameters
        groups = make_groups(degrees, shards.rank) if degrees.world_size > 1 else None
        tree = GrowingSums(shards.num)
        self._buckets = [_make_bucket([parameters[i] for i in b], shards, degrees, groups, tree) for b in buckets]
        self._places = {
            index: (bucket, number)
            for bucket, chunk in zip(self._buckets, buckets, strict=True)
            for number, index in enumerate(chunk)
        }
        self._settle = settle
        self._produced: set[int] = set()
        self._shard: int | None = None
        self._last = False
        self._next = 0
        watch(self._on_gradient)

    def zero(self) -> None:
        for bucket in self._buckets:
            bucket.reset()
        self._produced.clear()
        self._next = 0

    def begin_shard(self, shard: int | None) -> None:
        """None: this rank has no more of them and goes along with the others; its gradients must not count."""
        self._shard = shard

    def begin(self, *, last: bool) -> None:
        self._last = last

    def backward(self, loss: Tensor) -> None:
        loss.backward()  # type: ignore[no-untyped-call]

    def end_shard(self) -> None:
        """After the backward of its last micro-batch. Those of the step's last one are closed bucket by bucket."""
        if self._shard is not None and not self._last:
            for bucket in self._buckets:
                bucket.close_shard(self._shard)

    def finish(self) -> bool:
        while self._next < len(self._buckets):  # those with parameters that had no part in the last micro-batch
            self._start(self._buckets[self._next])
        for bucket in self._buckets:
            if bucket.exchange:
                bucket.exchange.fold()
        for bucket in self._buckets:
            for parameter, gradient in zip(bucket.parameters, bucket.found(), strict=True):
                parameter.grad = None if gradient is None else _like(parameter, gradient)
        return len(self._produced) < len(self._parameters)

    def drop_unused(self) -> None:
        produced = torch.zeros(len(self._parameters), dtype=torch.int32)
        produced[list(self._produced)] = 1
        if dist.is_initialized():
            dist.all_reduce(produced)
        for parameter, ranks in zip(self._parameters, produced.tolist(), strict=True):
            if not ranks:
                parameter.grad = None

    def settle(self) -> None:
        self._settle()

    def _on_gradient(self, index: int, tensor: Tensor) -> None:
        gradient, tensor.grad = tensor.grad, None
        bucket, number = self._places[index]
        assert gradient is not None
        if self._shard is not None:
            bucket.take(number, gradient)
            self._produced.add(index)
        if not self._last:
            return
        if number not in bucket.pending:  # its bucket may be on the way already
            raise UsageError(
                f"a parameter of shape {tuple(tensor.shape)} got its gradient in two parts in one backward, as "
                "reentrant activation checkpointing does. Set use_reentrant=False, or leave train.exact out"
            )
        bucket.pending.discard(number)
        while self._next < len(self._buckets) and not self._buckets[self._next].pending:
            self._start(self._buckets[self._next])

    def _start(self, bucket: _Bucket) -> None:
        if self._shard is not None:
            bucket.close_shard(self._shard)
        bucket.start()
        self._next += 1


def _make_bucket(
    parameters: Sequence[nn.Parameter],
    shards: LogicalShards,
    degrees: Degrees,
    groups: Groups | None,
    tree: GrowingSums,
) -> _Bucket:
    return _Bucket(parameters, Exchange(parameters, shards, degrees, groups) if groups else None, tree)


def watch_parameters(parameters: Sequence[nn.Parameter]) -> Watch:
    """Of parameters that lie whole on every rank."""

    def watch(on_gradient: OnGradient) -> None:
        def hook_for(index: int) -> Callable[[Tensor], None]:
            return lambda parameter: on_gradient(index, parameter)

        for index, parameter in enumerate(parameters):
            parameter.register_post_accumulate_grad_hook(hook_for(index))  # type: ignore[no-untyped-call]

    return watch


def _flat(gradient: Tensor, strides: tuple[int, ...]) -> Tensor:
    """Its elements as the parameter's lie in memory. `strides`: the parameter's, which is dense."""
    if gradient.is_sparse:
        gradient = gradient.to_dense()
    if gradient.stride() != strides:
        gradient = torch.empty_strided(gradient.shape, strides, dtype=gradient.dtype, device=gradient.device).copy_(
            gradient
        )
    return gradient.as_strided((gradient.numel(),), (1,))


def _add(left: Gradients, right: Gradients) -> Gradients:
    """Into `left`, which nobody else holds. No gradient is one of zeros: 0 + -0 is 0, in every layout."""
    pairs = list(zip(left, right, strict=True))
    if both := [(a, b) for a, b in pairs if a is not None and b is not None]:
        torch._foreach_add_([a for a, _ in both], [b for _, b in both])
    for lonely in (a if b is None else b for a, b in pairs if (a is None) != (b is None)):
        assert lonely is not None
        lonely.add_(0.0)
    return [b if a is None else a for a, b in pairs]


def _like(parameter: nn.Parameter, flat: Tensor) -> Tensor:
    """A gradient of the parameter: with its strides, and where it is cut, this rank's part."""
    held: Any = parameter
    if isinstance(held, DTensor):
        local = flat.view(held.to_local().shape)
        return DTensor.from_local(
            local, held.device_mesh, held.placements, run_check=False, shape=held.shape, stride=held.stride()
        )
    strides = torch.empty_like(parameter, device="meta").stride()
    return flat.as_strided(parameter.shape, strides, flat.storage_offset())
