"""One optimizer step over the micro-batches of a global batch: the part that all data-parallel strategies share.

Each backward runs on sum / C, C the count over the whole global batch, and gradients are summed over ranks: the mean
over the global batch is exact however the samples are spread over micro-batches and ranks.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_leaves

from dtrain.cluster.errors import UsageError
from dtrain.strategies.protocol import MicroBatch, StepOptions, StepResult, Wrapped


class NonFinite(ArithmeticError):
    """The loss or the gradient norm of a step is not finite; the update has not been applied.

    `here` says whether this rank's own samples gave it: the others are not to blame. `scale`: fp16's, when it gave up.
    """

    def __init__(
        self, what: str, value: float, *, here: bool, indices: tuple[int, ...], scale: float | None = None
    ) -> None:
        samples = f" Samples of the first such micro-batch on this rank: {list(indices[:16])}." if indices else ""
        scaled = (
            f" So it was in the steps before, down to a loss scale of {scale:g}: fp16 does not hold this model's "
            "numbers. Set train.precision: bf16 or fp32, or a lower learning rate."
            if scale
            else ""
        )
        super().__init__(f"{what} is {value}: the update was not applied.{samples}{scaled}")
        self.what = what
        self.value = value
        self.here = here
        self.indices = indices


def run_step(wrapped: Wrapped, micro_batches: Sequence[MicroBatch], options: StepOptions) -> StepResult:
    """Forward and backward of every micro-batch, exact mean, clip, update. Collective.

    Raises NonFinite on every rank together, before the update. With fp16 such a step is skipped instead, on every rank,
    until its loss scale says that there is no hope.
    """
    wrapped.sync.zero()
    divisor = _divisor(wrapped, options)
    loss_sum, true_count, bad = _accumulate(wrapped, micro_batches, options, divisor)
    unused = wrapped.sync.finish()
    loss_sum, true_count, num_bad, num_unused = options.all_reduce(
        [loss_sum, true_count, float(bad is not None), float(unused)]
    )
    if not true_count:
        raise UsageError(
            "count: the counts of this step's micro-batches add up to 0 over all ranks: nothing to take a mean over"
        )
    loss = loss_sum / true_count
    if num_bad:
        error = NonFinite("loss", loss, here=bad is not None, indices=bad.indices if bad else ())
        return _skip(wrapped, loss, true_count, error)

    options.on_phase("optimizer")
    if num_unused:
        wrapped.sync.drop_unused()
    gradients = [p.grad for group in wrapped.optimizer.param_groups for p in group["params"] if p.grad is not None]
    # Where the loss says itself what it is a mean over, C was only a guess: put it right once, on the sums.
    correction = divisor / true_count
    norm = _global_norm(gradients, options) * correction
    if not math.isfinite(norm):
        return _skip(wrapped, loss, true_count, NonFinite("gradient norm", norm, here=True, indices=()))
    factor = correction * _clip_coefficient(norm, options.clip_grad_norm)
    if factor != 1.0 and gradients:
        torch._foreach_mul_([_local(g) for g in gradients], factor)
    wrapped.optimizer.step()
    return _done(wrapped, loss, norm, true_count)


def _done(wrapped: Wrapped, loss: float, norm: float | None, count: float) -> StepResult:
    """The result of a step, and the next one's loss scale."""
    scale = wrapped.loss_scale
    used = scale.value if scale else None
    if scale:
        scale.update(finite=norm is not None)
    return StepResult(loss=loss, grad_norm=norm, count=count, loss_scale=used)


def _skip(wrapped: Wrapped, loss: float, count: float, error: NonFinite) -> StepResult:
    """No update. Raises `error` where no smaller loss scale can help."""
    wrapped.sync.zero()
    if wrapped.loss_scale is None:
        raise error
    result = _done(wrapped, loss, None, count)
    if wrapped.loss_scale.hopeless:
        raise NonFinite(error.what, error.value, here=error.here, indices=error.indices, scale=result.loss_scale)
    return result


def _accumulate(
    wrapped: Wrapped, micro_batches: Sequence[MicroBatch], options: StepOptions, divisor: float
) -> tuple[float, float, MicroBatch | None]:
    """This rank's sum of losses and counts, and its first micro-batch whose loss was not finite."""
    sums: list[Tensor] = []
    true_count = 0.0
    for number, micro in enumerate(micro_batches, start=1):
        wrapped.sync.begin(last=number == len(micro_batches))
        options.on_phase("forward")
        with options.autocast():
            output = options.forward(wrapped.module, micro.batch, micro.count)
            total, count = options.loss(output, micro.batch, micro.count)
        if not total.requires_grad:
            raise UsageError("loss: it does not depend on any parameter that requires a gradient")
        if micro.weight == 0 or not count:
            total, count = _silenced(output, total), 0.0
        options.on_phase("backward")
        (total / divisor).backward()  # type: ignore[no-untyped-call]
        sums.append(total.detach().double())
        true_count += count
    values = torch.stack(sums).tolist()
    bad = next((m for m, value in zip(micro_batches, values, strict=True) if not math.isfinite(value)), None)
    return math.fsum(values) if bad is None else math.nan, true_count, bad


def _divisor(wrapped: Wrapped, options: StepOptions) -> float:
    """C, over the loss scale. A guess of 0 that the loss then contradicts is as good as any other guess."""
    count = options.total_count or 1.0
    return count / wrapped.loss_scale.value if wrapped.loss_scale else count


def _silenced(output: object, total: Tensor) -> Tensor:
    """A loss of 0 whose backward brings exact zeros to the model. By where and a hook, not by 0 *: a mean over nothing
    is NaN, and 0 * NaN would leak from it, forward or backward."""
    for tensor in tree_leaves(output):
        if isinstance(tensor, Tensor) and tensor.requires_grad:
            tensor.register_hook(torch.zeros_like)  # type: ignore[no-untyped-call]
    return torch.where(torch.zeros_like(total, dtype=torch.bool), total, 0.0)


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _global_norm(gradients: Iterable[Tensor], options: StepOptions) -> float:
    """The 2-norm over all axes; a replicated or tied gradient counts once."""
    whole: list[Tensor] = []  # the same on every rank
    shards: list[Tensor] = []
    copies: list[Tensor] = []  # shards that another rank counts
    for gradient in gradients:
        kind = whole if not isinstance(gradient, DTensor) else shards if _is_first_copy(gradient) else copies
        kind.append(_local(gradient))
    norm = float(torch.nn.utils.get_total_norm(whole)) if whole else 0.0
    if not shards and not copies:
        return norm
    local = float(torch.nn.utils.get_total_norm(shards)) if shards else 0.0
    (square,) = options.all_reduce([local * local])
    return math.sqrt(norm * norm + square)


def _is_first_copy(tensor: DTensor) -> bool:
    """Whether this rank is the first along every mesh axis over which `tensor` is replicated."""
    coordinate = tensor.device_mesh.get_coordinate()
    assert coordinate is not None
    return all(c == 0 for c, placement in zip(coordinate, tensor.placements, strict=True) if placement.is_replicate())


def _clip_coefficient(norm: float, limit: float | None) -> float:
    """As torch.nn.utils.clip_grad_norm_ defines it."""
    return 1.0 if limit is None else min(1.0, limit / (norm + 1e-6))
