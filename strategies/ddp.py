"""Replicated data parallelism: every rank holds the whole model, gradients are summed in buckets during backward.

Not torch's DistributedDataParallel: that rebuilds its buckets after the first step, so a run resumed at 3 or more ranks
sums in another order than the one it continues, and differs in the last bits. Here the buckets never change.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dtrain.cluster.errors import UsageError
from dtrain.strategies.caps import CAPS
from dtrain.strategies.config import StrategyConfig
from dtrain.strategies.protocol import MakeOptimizer, ModelSpec, Prediction, Topology, Wrapped, whole_model

BUCKET_BYTES = 25 << 20  # DDP's default; the first bucket is small so that communication starts early
FIRST_BUCKET_BYTES = 1 << 20


class _Bucket:
    """A flat buffer of gradients, with one more element a parameter: how many ranks produced a gradient for it."""

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        self.parameters = tuple(parameters)
        sizes = [p.numel() for p in parameters]
        first = parameters[0]
        self.buffer = torch.zeros(sum(sizes) + len(sizes), dtype=first.dtype, device=first.device)
        *flat, self.produced = torch.split(self.buffer, [*sizes, len(sizes)])
        self.views = tuple(_shaped_like(p, part) for part, p in zip(flat, parameters, strict=True))
        self.missing: set[int] = set()  # parameters without a gradient in this step so far
        self.pending: set[int] = set()  # parameters that the last micro-batch's backward has not reached
        self.work: dist.Work | None = None

    def reset(self) -> None:
        """The buffer is not zeroed: the first gradient of a step is copied over what lies there, which costs less than
        to zero it and to add."""
        for parameter in self.parameters:
            parameter.grad = None
        self.missing = set(range(len(self.parameters)))
        self.pending = set(self.missing)

    def take(self, index: int) -> None:
        """The first gradient of a step moves into the buffer; what autograd adds later it adds there."""
        parameter, view = self.parameters[index], self.views[index]
        gradient = parameter.grad
        assert gradient is not None
        view.copy_(gradient.to_dense() if gradient.is_sparse else gradient)
        parameter.grad = view
        self.missing.discard(index)

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
                self.parameters[index].grad = self.views[index]


class BucketedAllReduce:
    """Sums gradients over the ranks of `group`, bucket by bucket in one fixed order, while backward goes on.

    A parameter that took part on no rank keeps no gradient, as in one process.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], group: dist.ProcessGroup | None = None) -> None:
        self._group = group
        # Backward reaches the last registered parameters first.
        self._buckets = [_Bucket(chunk) for chunk in _split([p for p in reversed(parameters) if p.requires_grad])]
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
        bucket.fill_gaps()
        bucket.work = dist.all_reduce(bucket.buffer, group=self._group, async_op=True)
        self._next += 1


def _shaped_like(parameter: Tensor, flat: Tensor) -> Tensor:
    """`flat` as autograd lays out a gradient: with the parameter's strides where it is dense (channels last, say)."""
    return flat.as_strided(parameter.shape, torch.empty_like(parameter, device="meta").stride(), flat.storage_offset())


def _split(parameters: Sequence[nn.Parameter]) -> list[list[nn.Parameter]]:
    """Buckets of one dtype and device each, filled in order up to the limit."""
    chunks: list[list[nn.Parameter]] = []
    open_chunks: dict[tuple[torch.dtype, torch.device], list[nn.Parameter]] = {}
    filled: dict[int, int] = defaultdict(int)
    for parameter in parameters:
        key = (parameter.dtype, parameter.device)
        chunk = open_chunks.get(key)
        limit = FIRST_BUCKET_BYTES if chunk is not None and chunk is chunks[0] else BUCKET_BYTES
        if chunk is None or filled[id(chunk)] >= limit:
            chunk = open_chunks[key] = []
            chunks.append(chunk)
        chunk.append(parameter)
        filled[id(chunk)] += parameter.numel() * parameter.element_size()
    return chunks


class Ddp:
    name = "ddp"
    caps = CAPS["ddp"]

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
        return Wrapped(module=model, optimizer=optimizer, sync=BucketedAllReduce(list(model.parameters())))


strategy = Ddp()
