"""How gradients meet in a pipeline: inside each stage over the ranks that hold it, and over the stages for parameters
that several of them use.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from typing import Protocol, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard

from dtrain.strategies.ddp import BucketedAllReduce
from dtrain.strategies.degrees import Degrees
from dtrain.strategies.fsdp import ShardedGradients
from dtrain.strategies.pipelinecut import StagedModel
from dtrain.strategies.placement import local_part
from dtrain.strategies.protocol import GradientSync


class StageSync(GradientSync, Protocol):
    def begin_backward(self, stage: int, last: bool) -> None:
        """Before a backward of a stage; `last`: its last one of this step."""


class ReplicatedStages:
    """Each stage's gradients are summed over the ranks that hold copies of it, while its last backward goes on; before
    that over the tensor ranks, where each of these has a summand."""

    def __init__(
        self,
        staged: StagedModel,
        optimizer: torch.optim.Optimizer,
        group: dist.ProcessGroup | None,
        shared: SharedGradients,
    ) -> None:
        """`group`: this rank's copies, itself alone maybe; None where there is nothing to sum."""
        self._optimizer = optimizer
        self._shared = shared
        self._stages = (
            {}
            if group is None
            else {stage: BucketedAllReduce(parameters, group) for stage, parameters in _by_stage(staged).items()}
        )

    def zero(self) -> None:
        self._optimizer.zero_grad(set_to_none=True)
        for buckets in self._stages.values():
            buckets.zero()
            buckets.begin(last=False)

    def begin(self, *, last: bool) -> None:
        pass

    def begin_backward(self, stage: int, last: bool) -> None:
        if stage in self._stages:
            self._stages[stage].begin(last=last)

    def backward(self, loss: Tensor) -> None:
        loss.backward()  # type: ignore[no-untyped-call]

    def finish(self) -> bool:
        for buckets in self._stages.values():
            buckets.finish()
        return self._shared.sum()

    def drop_unused(self) -> None:
        self._shared.drop_unused()

    def settle(self) -> None:
        pass


_SEVERAL = -1


def _by_stage(staged: StagedModel) -> dict[int, list[nn.Parameter]]:
    """This rank's parameters by the stage that uses them. Those of several of its stages are a part of their own, which
    no backward completes."""
    found: dict[int, list[nn.Parameter]] = {stage: [] for stage in (_SEVERAL, *staged.stages)}
    for name, parameter in staged.model.named_parameters():
        users = [stage for stage in staged.cut.parameters[name] if stage in staged.stages]
        if users:
            found[users[0] if len(users) == 1 else _SEVERAL].append(parameter)
    return found


class ShardedStages:
    """Gradients stay unsharded until all backwards are done: several micro-batches are on their way at any time."""

    def __init__(self, root: FSDPModule, optimizer: torch.optim.Optimizer, shared: SharedGradients) -> None:
        self._root = root
        self._state = fully_shard.state(cast(nn.Module, root))  # type: ignore[attr-defined]
        self._state._lazy_init()  # the first forward would see the units of one stage only
        self._own = ShardedGradients(root, optimizer)
        self._shared = shared

    def zero(self) -> None:
        self._own.zero()
        self._own.begin(last=False)
        # A forward that ends at a border never ends for the root: what it gathers it would not gather again.
        self._root.set_reshard_after_backward(False, recurse=False)

    def begin(self, *, last: bool) -> None:
        pass

    def begin_backward(self, stage: int, last: bool) -> None:
        pass

    def backward(self, loss: Tensor) -> None:
        loss.backward()  # type: ignore[no-untyped-call]

    def finish(self) -> bool:
        """As torch 2.13's pipeline stages do it: no backward of a stage is the root's last one by itself."""
        self._own.begin(last=True)
        self._root.set_reshard_after_backward(True, recurse=False)
        for each in self._state._state_ctx.all_states:
            for group in each._fsdp_param_groups:
                group.post_backward()
        self._state._root_post_backward_final_callback()
        missing = self._shared.sum()
        return self._own.finish() or missing

    def drop_unused(self) -> None:
        self._own.drop_unused()
        self._shared.drop_unused()

    def settle(self) -> None:
        self._own.settle()


class SharedGradients:
    """Sums the gradients of a parameter over the stages that use it, so that its copies stay equal."""

    def __init__(self, staged: StagedModel, degrees: Degrees, global_rank: int) -> None:
        """Collective over all ranks: makes a group for each set of stages that share something."""
        self._model = staged.model
        self._shared: list[tuple[dist.ProcessGroup, list[str]]] = []
        self._parameters: list[list[nn.Parameter]] = []
        self._missing: set[nn.Parameter] = set()  # without a gradient from this rank's stages in this step
        self.copies: frozenset[str] = frozenset()  # parameters that an earlier rank of the pipeline counts
        place = degrees.coordinate(global_rank)["pipeline"]
        for holders, names in _shared_names(staged, degrees.pipeline).items():
            for line in _lines(degrees):
                ranks = [line[holder] for holder in holders]
                group = dist.new_group(ranks)
                if global_rank in ranks:
                    self._shared.append((group, names))
                    if place != holders[0]:
                        self.copies |= frozenset(names)

    def sum(self) -> bool:
        """Whether a parameter had no gradient here; it has zeros, and what other stages have found. Collective."""
        if not self._parameters:  # now that all is spread; earlier they were others
            named = dict(self._model.named_parameters())
            self._parameters = [[named[name] for name in names] for _, names in self._shared]
        self._missing = {
            parameter for parameters in self._parameters for parameter in parameters if parameter.grad is None
        }
        for (group, _), parameters in zip(self._shared, self._parameters, strict=True):
            sums = [_gradient(parameter) for parameter in parameters]
            totals = [gradient.contiguous() for gradient in sums]
            # All on their way at once: to wait for one after the other would take as many times as long.
            for work in [dist.all_reduce(tensor, group=group, async_op=True) for tensor in totals]:
                work.wait()
            for gradient, total in zip(sums, totals, strict=True):
                if total.data_ptr() != gradient.data_ptr():
                    gradient.copy_(total)
        return bool(self._missing)

    def drop_unused(self) -> None:
        """A parameter that took part on no rank keeps no gradient. Collective."""
        for (group, _), parameters in zip(self._shared, self._parameters, strict=True):
            produced = torch.tensor([parameter not in self._missing for parameter in parameters], dtype=torch.int32)
            dist.all_reduce(produced, group=group)
            for parameter, stages in zip(parameters, produced.tolist(), strict=True):
                if not stages:
                    parameter.grad = None


def _gradient(parameter: nn.Parameter) -> Tensor:
    """What this rank holds of it: zeros, where its stages did not use the parameter."""
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    return local_part(parameter.grad).detach()


def _shared_names(staged: StagedModel, pipeline: int) -> dict[tuple[int, ...], list[str]]:
    """Parameters that several ranks of a pipeline hold, by where those stand in it."""
    found: dict[tuple[int, ...], list[str]] = defaultdict(list)
    for name, parameter in staged.model.named_parameters():
        holders = tuple(sorted({stage % pipeline for stage in staged.cut.parameters[name]}))
        if len(holders) > 1 and parameter.requires_grad:
            found[holders].append(name)
    return found


def pipeline_group(degrees: Degrees, global_rank: int) -> dist.ProcessGroup:
    """The ranks of this rank's pipeline. Not the mesh's, which may have no way for CPU tensors. Collective."""
    groups: dict[tuple[int, ...], dist.ProcessGroup] = {ranks: dist.new_group(list(ranks)) for ranks in _lines(degrees)}
    return groups[degrees.peers(global_rank, ("pipeline",))]


def _lines(degrees: Degrees) -> Iterator[tuple[int, ...]]:
    """The global ranks of each pipeline."""
    for rank in range(degrees.world_size):
        peers = degrees.peers(rank, ("pipeline",))
        if peers[0] == rank:
            yield peers
