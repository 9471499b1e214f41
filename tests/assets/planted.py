"""Mistakes, planted into the processes of ranks (rank_runner's "before") or into what a user brings. None is in the
product, which has no hooks for them: they replace functions of it."""

from __future__ import annotations

import dataclasses
import itertools
import random
from typing import Any

import parity
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.utils.data import Dataset

from dtrain.runtime import buffers, data, trainer
from dtrain.strategies import ddp, fsdp, passes, pipelinestage, pipelinestate, pipelinesync, update, zero_gradients
from dtrain.strategies.protocol import StepOptions, Wrapped


def _replace(module: Any, name: str, make: Any) -> None:
    setattr(module, name, make(getattr(module, name)))


# ---- loss normalization ----


def own_count() -> None:
    """Each rank divides by what it has itself, times the ranks: right only where all have alike."""

    def make(run_step: Any) -> Any:
        def wrong(wrapped: Wrapped, micro_batches: Any, options: StepOptions) -> Any:
            own = sum(micro.count for micro in micro_batches) * dist.get_world_size()
            ratio = own / options.total_count
            return run_step(wrapped, micro_batches, dataclasses.replace(options, loss=_scaled(options.loss, 1 / ratio)))

        return wrong

    _replace(trainer, "run_step", make)


def _scaled(loss: Any, factor: float) -> Any:
    """Its gradient is scaled, its value is not."""

    def wrong(output: Any, batch: Any, count: float) -> Any:
        total, counted = loss(output, batch, count)
        return total * factor + (total * (1 - factor)).detach(), counted

    return wrong


def mean_of_means() -> None:
    """Each micro-batch's own mean, all of them alike."""

    def make(run_step: Any) -> Any:
        def wrong(wrapped: Wrapped, micro_batches: Any, options: StepOptions) -> Any:
            number = len(micro_batches) * wrapped.degrees.data

            def loss(output: Any, batch: Any, count: float) -> Any:
                return _scaled(options.loss, options.total_count / number / count)(output, batch, count)

            return run_step(wrapped, micro_batches, dataclasses.replace(options, loss=loss))

        return wrong

    _replace(trainer, "run_step", make)


def reported_mean_of_ranks() -> None:
    """The update is right, what rank 1 says of the loss is not: the mean of the ranks' means."""

    def make(run_step: Any) -> Any:
        def wrong(wrapped: Wrapped, micro_batches: Any, options: StepOptions) -> Any:
            kept: list[tuple[float, float]] = []

            def loss(output: Any, batch: Any, count: float) -> Any:
                total, counted = options.loss(output, batch, count)
                kept.append((float(total.detach()), counted))
                return total, counted

            result = run_step(wrapped, micro_batches, dataclasses.replace(options, loss=loss))
            mean = sum(total for total, _ in kept) / sum(counted for _, counted in kept)
            (total,) = options.all_reduce([mean])
            return dataclasses.replace(result, loss=total / dist.get_world_size()) if dist.get_rank() else result

        return wrong

    _replace(trainer, "run_step", make)


def mean_over_tokens(output: Tensor, batch: Any) -> Tensor:
    """A user's loss: a mean over the tokens that are not ignored, where samples are counted."""
    return nn.functional.cross_entropy(output.flatten(0, 1), batch[-1].flatten(), ignore_index=-100)


# ---- gradient scale, and gradients that are left out ----


def averaged() -> None:
    """ddp: the mean over ranks of what was divided by the whole count already."""

    def make(finish: Any) -> Any:
        def wrong(self: Any) -> bool:
            found: bool = finish(self)
            for bucket in self._buckets:
                bucket.buffer.div_(dist.get_world_size())
            return found

        return wrong

    _replace(ddp.BucketedAllReduce, "finish", make)


def averaged_shards() -> None:
    """fsdp: its own default, which divides by the ranks."""

    def make(factor: Any) -> Any:
        return lambda self, value: factor(self, float(dist.get_world_size()))

    _replace(FSDPModule, "set_gradient_divide_factor", make)


def one_copy() -> None:
    """ddp: rank 1 makes something of its own of the sums, rank 0's are right."""

    def make(finish: Any) -> Any:
        def wrong(self: Any) -> bool:
            found: bool = finish(self)
            for bucket in self._buckets:
                bucket.buffer.mul_(1.0 + 0.01 * dist.get_rank())
            return found

        return wrong

    _replace(ddp.BucketedAllReduce, "finish", make)


def accumulated_twice() -> None:
    """The first micro-batch's gradients are in the sum twice."""

    def make(backward: Any) -> Any:
        seen = itertools.count()

        def wrong(self: Any, loss: Tensor) -> None:
            backward(self, loss * (2.0 if next(seen) == 0 else 1.0))

        return wrong

    _replace(ddp.BucketedAllReduce, "backward", make)


def forgotten_bucket() -> None:
    """ddp: the last bucket is never summed."""

    def make(reduce: Any) -> Any:
        def wrong(self: Any, bucket: Any) -> None:
            if bucket is not self._buckets[-1]:
                reduce(self, bucket)
                return
            bucket.fill_gaps()
            bucket.work = dist.all_reduce(torch.zeros(1), group=self._group, async_op=True)
            self._next += 1

        return wrong

    _replace(ddp.BucketedAllReduce, "_reduce", make)


def divided_by_micro_batches() -> None:
    """zero: what DeepSpeed does by default with gradient_accumulation_steps."""

    def make(train: Any) -> Any:
        def wrong(self: Any, wrapped: Wrapped, micro_batches: Any, options: StepOptions, divisor: float) -> Any:
            return train(self, wrapped, micro_batches, options, divisor * len(micro_batches))

        return wrong

    _replace(passes.OneByOne, "train", make)


def zero3_means() -> None:
    """zero3: what it knows are means over the ranks, and nobody makes sums of them."""

    def make(init: Any) -> Any:
        def wrong(self: Any, *args: Any, **keywords: Any) -> None:
            init(self, *args, **keywords)
            self._scale = 1.0

        return wrong

    _replace(zero_gradients.ZeroUpdate, "__init__", make)


def zero_last_micro_batch() -> None:
    """zero2: the partitions keep the last micro-batch's gradients only."""

    def make(begin: Any) -> Any:
        def wrong(self: Any, *, last: bool) -> None:
            begin(self, last=last)
            for sums in (self._zero.averaged_gradients, self._zero.all_grad_tensors):
                sums.update(dict.fromkeys(sums))

        return wrong

    _replace(zero_gradients.ZeroGradients, "begin", make)


def tied_alone() -> None:
    """pipeline: a weight that two stages use gets in each what that stage found."""
    _replace(pipelinesync.SharedGradients, "sum", lambda _: lambda self: False)


def averaged_stages() -> None:
    """pipeline: torch's default, gradients over the number of micro-batches."""

    def make(train: Any) -> Any:
        def wrong(self: Any, wrapped: Wrapped, micro_batches: Any, options: StepOptions, divisor: float) -> Any:
            passed = train(self, wrapped, micro_batches, options, divisor)
            for gradient in (p.grad for p in wrapped.module.parameters() if p.grad is not None):
                gradient.div_(len(micro_batches))
            return passed

        return wrong

    _replace(pipelinestage.Pipelined, "train", make)


# ---- norm ----


def zero_own_norm() -> None:
    """zero: the norm over this rank's partitions."""
    _replace(zero_gradients.ZeroUpdate, "norm", lambda norm: lambda self, _: norm(self, lambda values: values))


def stage_norm() -> None:
    """pipeline: the norm over this rank's stages."""
    _replace(pipelinestate.StageGradients, "norm", lambda norm: lambda self, _: norm(self, lambda values: values))


def tied_twice() -> None:
    """pipeline: a weight that two stages use is counted in both."""

    def make(init: Any) -> Any:
        def wrong(self: Any, *args: Any) -> None:
            init(self, *args)
            self.copies = frozenset()

        return wrong

    _replace(pipelinesync.SharedGradients, "__init__", make)


def own_norm() -> None:
    """fsdp: rank 1's is the norm over its own shard, rank 0's is right."""

    def make(norm: Any) -> Any:
        def wrong(gradients: Any, all_reduce: Any) -> float:
            gradients = list(gradients)
            right: float = norm(gradients, all_reduce)
            return norm(gradients, lambda values: values) if dist.get_rank() else right

        return wrong

    _replace(update, "global_norm", make)


def own_clipping() -> None:
    """fsdp: the norm that is told is right, the one that is clipped by is that of this rank's shard."""

    def make(apply: Any) -> Any:
        def wrong(self: Any, factor: float) -> None:
            local = [g.to_local() for g in self._gradients() if isinstance(g, DTensor)]
            apply(self, min(1.0, CLIP / float(torch.nn.utils.get_total_norm(local))))

        return wrong

    _replace(update.OwnGradients, "apply", make)


def norm_of_a_group() -> None:
    """ddp: the norm over the optimizer's first group."""

    def make(_: Any) -> Any:
        def wrong(self: Any, all_reduce: Any) -> float:
            first = [p.grad for p in self.optimizer.param_groups[0]["params"] if p.grad is not None]
            return float(torch.nn.utils.get_total_norm(first))

        return wrong

    _replace(update.OwnGradients, "norm", make)


CLIP = 0.05  # small: every step is clipped


# ---- dtype ----


def half_weights() -> None:
    """ddp: the model lies in bf16 on the ranks."""
    _replace(ddp.Ddp, "materialize", lambda make: lambda self, model, *rest: make(self, model.bfloat16(), *rest))


def rounded_weights() -> None:
    """fsdp: weights are fp32, and hold what bf16 would after each update."""

    def make(apply: Any) -> Any:
        def wrong(self: Any, factor: float) -> None:
            apply(self, factor)
            with torch.no_grad():
                for group in self.optimizer.param_groups:
                    for parameter in group["params"]:
                        local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
                        local.copy_(local.bfloat16().float())

        return wrong

    _replace(update.OwnGradients, "apply", make)


def half_masters() -> None:
    """zero: master weights hold what fp16 would."""

    def make(step: Any) -> Any:
        def wrong(self: Any, flat: Tensor) -> None:
            step(self, flat)
            flat.data.copy_(flat.data.half().float())

        return wrong

    _replace(zero_gradients.ZeroUpdate, "_step_flat", make)


def rounded_moments() -> None:
    """pipeline: its optimizer's state holds what bf16 would."""

    def make(apply: Any) -> Any:
        def wrong(self: Any, factor: float) -> None:
            apply(self, factor)
            for state in self.own.optimizer.state.values():
                for key in ("exp_avg", "exp_avg_sq"):
                    state[key].copy_(state[key].bfloat16().float())

        return wrong

    _replace(pipelinestate.StageGradients, "apply", make)


class HalfTransformer(parity.Transformer):
    """A user's model that casts its weights."""

    def __init__(self, **keywords: Any) -> None:
        super().__init__(**keywords)
        self.blocks.bfloat16()

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens) + self.position[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x.bfloat16())
        logits: Tensor = self.head(self.norm(x.float()))
        return logits


# ---- no mistakes ----


class Keys(nn.Module):
    """Attention whose keys have a bias of their own: the loss does not react to it."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(64, 16)
        self.query, self.key, self.value = (nn.Linear(16, 16) for _ in range(3))
        self.norm = nn.LayerNorm(16)
        self.head = nn.Linear(16, 1024)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.norm(self.embed(tokens % 64))
        found: Tensor = self.head(nn.functional.scaled_dot_product_attention(self.query(x), self.key(x), self.value(x)))
        return found


class Chance(Keys):
    """Its dropout is nobody's module."""

    def forward(self, tokens: Tensor) -> Tensor:
        return nn.functional.dropout(super().forward(tokens), 0.1)


# ---- buffers ----


class Counting(parity.Transformer):
    """A user's model with a running mean of what it sees; `kept`: it is saved, and so shared after each step."""

    seen: Tensor

    def __init__(self, kept: bool = True, **keywords: Any) -> None:
        super().__init__(**keywords)
        self.register_buffer("seen", torch.zeros(()), persistent=kept)

    def forward(self, tokens: Tensor) -> Tensor:
        self.seen.mul_(0.9).add_(tokens.float().mean().detach(), alpha=0.1)
        return super().forward(tokens)


class Normed(Keys):
    """Its batch norm sees a micro-batch at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.batch = nn.BatchNorm1d(16)
        self.body = nn.Linear(16, 1024)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens % 64)
        logits: Tensor = self.body(self.batch(x.flatten(0, 1)).view_as(x)) + super().forward(tokens)
        return logits


def own_buffer() -> None:
    """Rank 1 counts on after buffers were shared."""

    def make(share: Any) -> Any:
        def wrong(self: Any) -> None:
            share(self)
            for module, name in self._places:
                getattr(module, name).add_(dist.get_rank())

        return wrong

    _replace(buffers.SharedBuffers, "share", make)


def unshared() -> None:
    """Nobody takes rank 0's buffers after a step."""
    _replace(buffers.SharedBuffers, "share", lambda _: lambda self: None)


# ---- data ----


def own_seed() -> None:
    """Each rank shuffles with a seed of its own."""

    def make(init: Any) -> Any:
        def wrong(self: Any, num_samples: int, *, seed: int, rank: int, **keywords: Any) -> None:
            init(self, num_samples, seed=seed + rank, rank=rank, **keywords)

        return wrong

    _replace(data.BatchPlan, "__init__", make)


def everybodys_samples() -> None:
    """Each rank reads rank 0's."""

    def make(init: Any) -> Any:
        def wrong(self: Any, num_samples: int, *, rank: int, **keywords: Any) -> None:
            init(self, num_samples, rank=0, **keywords)

        return wrong

    _replace(data.BatchPlan, "__init__", make)


class Unseeded(Dataset[Any]):
    """A user's augmentation with a generator of its own."""

    def __init__(self) -> None:
        self.tokens = parity.Tokens()
        self.random = random.Random()

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> Any:
        inputs, targets = self.tokens[index]
        shift = self.random.randrange(1, 7)
        return (inputs + shift) % 1024, targets


# ---- start and forward ----


def other_start() -> None:
    """Each rank's weights follow from its own number."""

    def make(materialize: Any) -> Any:
        def wrong(self: Any, model: nn.Module, *rest: Any) -> Any:
            with torch.no_grad():
                next(model.parameters()).add_(0.01 * dist.get_rank())
            return materialize(self, model, *rest)

        return wrong

    _replace(ddp.Ddp, "materialize", make)


def other_attention() -> None:
    """Rank 1 attends to what comes later, too."""

    def make(attend: Any) -> Any:
        def wrong(*args: Any, is_causal: bool = False, **keywords: Any) -> Tensor:
            causal = is_causal and not (dist.is_initialized() and dist.get_rank() == 1)
            found: Tensor = attend(*args, is_causal=causal, **keywords)
            return found

        return wrong

    _replace(nn.functional, "scaled_dot_product_attention", make)


def weight_decay() -> None:
    """The optimizer's groups are lost: everything decays, and faster."""

    def make(materialize: Any) -> Any:
        def wrong(self: Any, model: nn.Module, make_optimizer: Any, *rest: Any) -> Any:
            def decaying(made: nn.Module) -> Any:
                optimizer = make_optimizer(made)
                for group in optimizer.param_groups:
                    group["weight_decay"] = 0.5
                return optimizer

            return materialize(self, model, decaying, *rest)

        return wrong

    _replace(fsdp.Fsdp, "materialize", make)
