"""One optimizer step over the micro-batches of a global batch: what happens in which order, for all strategies.

Each backward runs on sum / C, C the count over the whole global batch, and gradients are summed over ranks: the mean
over the global batch is exact however the samples are spread over micro-batches and ranks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from dtrain.cluster.errors import UsageError
from dtrain.strategies.protocol import AllReduce, MicroBatch, StepOptions, StepResult, Wrapped


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
    try:
        passed = wrapped.passes.train(wrapped, micro_batches, options, divisor)
    except Exception as raised:
        if wrapped.degrees.tensor > 1:
            from dtrain.strategies.tensorops import explain_cut_tensors

            explain_cut_tensors(raised)
        raise
    unused = wrapped.sync.finish()
    mine = [passed.loss_sum, passed.count] if wrapped.data.counts else [0.0, 0.0]
    together = _Together(options.all_reduce, [*mine, float(passed.bad is not None), float(unused)])
    own_norm = wrapped.update.norm(together)  # parameters that no rank used are zeros so far
    loss_sum, true_count, num_bad, num_unused = together.sums()
    if not true_count:
        raise UsageError(
            "count: the counts of this step's micro-batches add up to 0 over all ranks: nothing to take a mean over"
        )
    loss = loss_sum / true_count
    if num_bad:
        indices = passed.bad.indices if passed.bad else ()
        error = NonFinite("loss", loss, here=passed.bad is not None, indices=indices)
        return _skip(wrapped, loss, true_count, error)

    options.on_phase("optimizer")
    if num_unused:
        wrapped.sync.drop_unused()
    # Where the loss says itself what it is a mean over, C was only a guess: put it right once, on the sums.
    correction = divisor / true_count
    norm = own_norm * correction
    if not math.isfinite(norm):
        return _skip(wrapped, loss, true_count, NonFinite("gradient norm", norm, here=True, indices=()))
    wrapped.update.apply(correction * _clip_coefficient(norm, options.clip_grad_norm))
    return _done(wrapped, loss, norm, true_count)


class _Together:
    """Sums over all ranks what is known before the gradient norm in one message with what the norm sums: to wait for
    one more takes as long as many parameters' update."""

    def __init__(self, all_reduce: AllReduce, known: Sequence[float]) -> None:
        self._all_reduce = all_reduce
        self._known = tuple(known)
        self._sums: list[float] | None = None

    def __call__(self, values: list[float]) -> list[float]:
        """As AllReduce."""
        if self._sums is not None:
            return self._all_reduce(values)
        sums = self._all_reduce([*self._known, *values])
        self._sums = sums[: len(self._known)]
        return sums[len(self._known) :]

    def sums(self) -> list[float]:
        """Of what is known; a message of its own where the norm has sent none. Collective."""
        return self._sums if self._sums is not None else self._all_reduce(list(self._known))


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


def _divisor(wrapped: Wrapped, options: StepOptions) -> float:
    """C, over the loss scale. A guess of 0 that the loss then contradicts is as good as any other guess."""
    count = options.total_count or 1.0
    return count / wrapped.loss_scale.value if wrapped.loss_scale else count


def _clip_coefficient(norm: float, limit: float | None) -> float:
    """As torch.nn.utils.clip_grad_norm_ defines it."""
    return 1.0 if limit is None else min(1.0, limit / (norm + 1e-6))
