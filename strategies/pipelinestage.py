"""Micro-batches through a pipeline: torch's schedules (torch.distributed.pipelining) say what a rank does and when, and
the stages here how, for micro-batches of any sizes. Torch's own stages take their buffers from the first micro-batch.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import Schedule1F1B, ScheduleGPipe, ScheduleInterleaved1F1B
from torch.distributed.pipelining.stage import _PipelineStageBase
from torch.utils._pytree import tree_flatten

from dtrain.strategies.config import ScheduleName
from dtrain.strategies.passes import loss_of
from dtrain.strategies.pipelinecut import StagedModel
from dtrain.strategies.pipelinetrace import Crossing, Shapes, Skeleton
from dtrain.strategies.protocol import Forward, MicroBatch, Passed, StepOptions, Wrapped
from dtrain.strategies.telling import broadcast_text

BeginBackward = Callable[[int, bool], None]  # (stage, whether it is the stage's last one of this step)


class Stage(_PipelineStageBase):
    """What torch's schedules call. Sizes of what comes in follow from the shapes of the micro-batch, which every rank
    of a pipeline knows."""

    def __init__(
        self, staged: StagedModel, index: int, group: dist.ProcessGroup, device: torch.device, begin: BeginBackward
    ) -> None:
        super().__init__(nn.Identity(), index, staged.cut.num_stages, device, group)
        self._staged = staged
        self._begin = begin
        self.prepare([], [], None, 0)

    def prepare(
        self, micro_batches: Sequence[MicroBatch], shapes: Sequence[Shapes], options: StepOptions | None, seed: int
    ) -> None:
        """For the next step."""
        self._micro_batches = micro_batches
        self._shapes = shapes
        self._options = options
        first, own = 0, self.stage_index
        self._seeds = [(_seed(seed, chunk, first), _seed(seed, chunk, own)) for chunk in range(len(micro_batches))]
        self._received: dict[int, list[Tensor]] = {}
        self._sent: dict[int, list[Tensor]] = {}
        self._gradients: dict[int, list[Tensor]] = {}  # of what was sent, received
        self.has_backward = True

    def get_fwd_recv_ops(self, fwd_chunk_id: int) -> list[dist.P2POp]:
        if self.is_first:
            return []
        self._received[fwd_chunk_id] = self.empty(self._shapes[fwd_chunk_id])
        return self._ops(dist.irecv, self._received[fwd_chunk_id], self.stage_index - 1)

    def forward_one_chunk(
        self, fwd_chunk_id: int, args: Any, kwargs: Any = None, save_forward_output: bool = True
    ) -> Any:
        micro, options = self._micro_batches[fwd_chunk_id], self._options
        assert options is not None
        options.on_phase("forward")
        received = self._received.get(fwd_chunk_id, [])
        for tensor, crossing in zip(received, self._crossings(self.stage_index, fwd_chunk_id), strict=True):
            tensor.requires_grad_(crossing.requires_grad)
        with options.autocast():
            output = self._staged.run(
                self.stage_index,
                received,
                self._shapes[fwd_chunk_id],
                lambda model: options.forward(model, micro.batch, micro.count),
                seeds=self._seeds[fwd_chunk_id],
            )
        self._sent[fwd_chunk_id] = [] if self.is_last else output
        return output

    def get_fwd_send_ops(self, fwd_chunk_id: int) -> list[dist.P2POp]:
        return self._ops(dist.isend, self._sent[fwd_chunk_id], self.stage_index + 1)

    def get_bwd_recv_ops(self, bwd_chunk_id: int) -> list[dist.P2POp]:
        if self.is_last:
            return []
        crossings = self._crossings(self.stage_index + 1, bwd_chunk_id)
        self._gradients[bwd_chunk_id] = [self._like(crossing) for crossing in crossings if crossing.requires_grad]
        return self._ops(dist.irecv, self._gradients[bwd_chunk_id], self.stage_index + 1)

    def backward_one_chunk(
        self, bwd_chunk_id: int, loss: Tensor | None = None, full_backward: bool = True, last_backward: bool = False
    ) -> None:
        assert self._options is not None
        self._options.on_phase("backward")
        self._begin(self.stage_index, last_backward)
        if self.is_last:
            assert loss is not None
            loss.backward()  # type: ignore[no-untyped-call]
            return
        crossings = self._crossings(self.stage_index + 1, bwd_chunk_id)
        sent = [t for t, c in zip(self._sent.pop(bwd_chunk_id), crossings, strict=True) if c.requires_grad]
        pairs = zip(sent, self._gradients.pop(bwd_chunk_id), strict=True)
        if found := [(tensor, gradient) for tensor, gradient in pairs if tensor.requires_grad]:
            tensors, gradients = zip(*found, strict=True)
            torch.autograd.backward(tensors, gradients)

    def get_bwd_send_ops(self, bwd_chunk_id: int) -> list[dist.P2POp]:
        if self.is_first:
            return []
        received = self._received.pop(bwd_chunk_id)
        gradients = [t.grad if t.grad is not None else torch.zeros_like(t) for t in received if t.requires_grad]
        return self._ops(dist.isend, gradients, self.stage_index - 1)

    def perform_reduce_grad(self, grad_scale_factor: int) -> None:
        pass  # the ranks' gradients meet in GradientSync

    def _prepare_forward_infra(self, *args: Any, **kwargs: Any) -> None:
        self.args_recv_info[0] = ()  # looked at, and then never asked for

    def _prepare_backward_infra(self, *args: Any, **kwargs: Any) -> None:
        pass

    def _create_grad_recv_info(self, act_send_info: Any) -> Any:
        return ()

    def _crossings(self, stage: int, chunk: int) -> tuple[Crossing, ...]:
        return self._shapes[chunk].crossings[self._staged.cut.firsts[stage - 1]] if stage else ()

    def empty(self, shapes: Shapes) -> list[Tensor]:
        """Room for what comes in."""
        return [self._like(crossing) for crossing in shapes.crossings[self._staged.cut.firsts[self.stage_index - 1]]]

    def _like(self, crossing: Crossing) -> Tensor:
        return torch.empty(crossing.shape, dtype=crossing.dtype, device=self.device)

    def _ops(self, operation: Any, tensors: Sequence[Tensor], stage: int) -> list[dist.P2POp]:
        if not tensors:
            return []
        peer = self._resolve_peer_global_rank(stage)
        return [dist.P2POp(operation, tensor.detach().contiguous(), peer, self.group) for tensor in tensors]


class Pipelined:
    """Keeps protocol.Passes."""

    def __init__(
        self,
        staged: StagedModel,
        skeleton: Skeleton,
        schedule: ScheduleName,
        group: dist.ProcessGroup,
        device: torch.device,
        begin: BeginBackward,
    ) -> None:
        self._staged = staged
        self._skeleton = skeleton
        self._schedule = schedule
        self._group = group
        self._device = device
        self._stages = [Stage(staged, index, group, device, begin) for index in staged.stages]
        self._made: dict[int, Any] = {}  # number of micro-batches -> torch's schedule
        self._shapes: dict[Hashable, Shapes] = {}
        self._step: tuple[StepOptions, float] | None = None
        self._sums: list[Tensor] = []
        self._counts: list[float] = []
        last = (staged.cut.num_stages - 1) % dist.get_world_size(group)
        self._last_rank = dist.get_global_rank(group, last)

    def train(
        self, wrapped: Wrapped, micro_batches: Sequence[MicroBatch], options: StepOptions, divisor: float
    ) -> Passed:
        seed = torch.initial_seed()
        shapes = [self._shapes_of(micro, options.forward, options.autocast) for micro in micro_batches]
        for stage in self._stages:
            stage.prepare(micro_batches, shapes, options, seed)
        self._step = (options, divisor)
        self._sums, self._counts = [], []
        # torch 2.13's step() cuts a whole batch evenly; these are cut already, and unevenly.
        self._schedule_of(len(micro_batches))._step_microbatches(target_mbs=list(micro_batches), return_outputs=False)
        for stage in self._stages:
            stage.prepare([], [], None, 0)
        return self._passed(micro_batches)

    def evaluate(self, module: nn.Module, micro: MicroBatch, forward: Forward, measure: Callable[[Any], Any]) -> Any:
        shapes = self._shapes_of(micro, forward, nullcontext)
        output = None
        for stage in self._stages:
            received = []
            if not stage.is_first:
                received = stage.empty(shapes)
                for tensor in received:
                    dist.recv(tensor, stage._resolve_peer_global_rank(stage.stage_index - 1), group=self._group)
            output = self._staged.run(
                stage.stage_index, received, shapes, lambda model: forward(model, micro.batch, micro.count)
            )
            if not stage.is_last:
                for tensor in output:
                    peer = stage._resolve_peer_global_rank(stage.stage_index + 1)
                    dist.send(tensor.contiguous(), peer, group=self._group)
        mine = json.dumps(measure(output)) if self._stages[-1].is_last else ""
        return json.loads(broadcast_text(mine, self._last_rank, self._group))

    def _loss(self, output: Any, micro: MicroBatch) -> Tensor:
        assert self._step is not None
        options, divisor = self._step
        with options.autocast():
            total, count = loss_of(output, micro, options)
        self._sums.append(total.detach().double())
        self._counts.append(count)
        return total / divisor

    def _passed(self, micro_batches: Sequence[MicroBatch]) -> Passed:
        """The last stage's numbers; the other ranks have none, nor are they asked (Wrapped.data)."""
        values = torch.stack(self._sums).tolist() if self._sums else []
        pairs = zip(micro_batches, values, strict=False)
        bad = next((micro for micro, value in pairs if not math.isfinite(value)), None)
        loss_sum = math.nan if bad is not None else math.fsum(values)
        return Passed(loss_sum=loss_sum, count=math.fsum(self._counts), bad=bad)

    def _schedule_of(self, num_micro_batches: int) -> Any:
        if num_micro_batches not in self._made:
            make: Mapping[ScheduleName, Any] = {
                "gpipe": lambda: ScheduleGPipe(self._stages[0], num_micro_batches, self._loss, scale_grads=False),
                "1f1b": lambda: Schedule1F1B(self._stages[0], num_micro_batches, self._loss, scale_grads=False),
                "interleaved": lambda: ScheduleInterleaved1F1B(
                    cast("list[_PipelineStageBase]", self._stages), num_micro_batches, self._loss, scale_grads=False
                ),
            }
            self._made[num_micro_batches] = make[self._schedule]()
        return self._made[num_micro_batches]

    def _shapes_of(self, micro: MicroBatch, forward: Forward, autocast: Callable[[], Any]) -> Shapes:
        """Worked out once for each kind of micro-batch, alike on every rank of the pipeline."""
        leaves, structure = tree_flatten(micro.batch)
        kinds = tuple((t.shape, t.dtype) if isinstance(t, Tensor) else repr(t) for t in leaves)
        key = (str(structure), kinds, torch.is_grad_enabled(), self._staged.model.training)
        if key not in self._shapes:
            with autocast():
                self._shapes[key] = self._skeleton.shapes(
                    lambda model: forward(model, micro.batch, micro.count), self._staged.cut.firsts, self._staged.model
                )
        return self._shapes[key]


def _seed(base: int, chunk: int, stage: int) -> int:
    """Of a stage's random numbers in one micro-batch; stage 0's before the model is entered, so that what all stages
    compute alike is alike. A step's numbers depend on its seed alone, whatever the schedule."""
    digest = hashlib.blake2b(f"{base} {chunk} {stage}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
