"""Pipeline parallelism: consecutive parts of a model, its stages, lie on different ranks, and micro-batches go through
them. Within a stage the ranks of the other axes share the work as ddp, fsdp and the tensor axis do it.

Puts together what pipelinetrace, pipelinesplit, pipelinecut, pipelinestage and pipelinestate do.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule

from dtrain.cluster.errors import UsageError
from dtrain.strategies.absent import AbsentFirst, is_absent
from dtrain.strategies.config import StrategyConfig
from dtrain.strategies.deferred import place
from dtrain.strategies.degrees import Degrees
from dtrain.strategies.fsdp import shard
from dtrain.strategies.layout import degrees_of
from dtrain.strategies.localstep import step_of
from dtrain.strategies.mesh import group_of, make_mesh
from dtrain.strategies.pipelinecut import Border, Cut, StagedModel, make_cut
from dtrain.strategies.pipelinesplit import balance, idle_share, imbalance, stages_a_rank
from dtrain.strategies.pipelinestage import Pipelined
from dtrain.strategies.pipelinestate import StageGradients, StageState
from dtrain.strategies.pipelinesync import (
    ReplicatedStages,
    ShardedStages,
    SharedGradients,
    StageSync,
    pipeline_group,
)
from dtrain.strategies.pipelinetrace import Run, Skeleton, Trace
from dtrain.strategies.protocol import MakeOptimizer, Topology, Wrapped
from dtrain.strategies.tensor import spread_over_tensor
from dtrain.strategies.tensorcuts import into_stage, out_of_stage
from dtrain.strategies.units import units
from dtrain.strategies.update import OwnGradients
from dtrain.strategies.wrapping import wrap


def materialize(
    model: nn.Module,
    make_optimizer: MakeOptimizer,
    config: StrategyConfig,
    topology: Topology,
    device: torch.device,
    example: Run,
    num_micro_batches: int,
) -> Wrapped:
    """`model` is on CPU with its initial weights, equal on every rank; `example`: a forward on a micro-batch.
    Collective. Raises UsageError for a model that can't be cut so."""
    rank, degrees = topology.global_rank, degrees_of(config, topology.world_size)
    num_stages = degrees.pipeline * stages_a_rank(config.pipeline_schedule, config.pipeline_stages)
    names = _outermost([name for name, _ in units(model, config.wrap)])
    skeleton = Skeleton(model, names, device)
    trace = skeleton.trace(example)
    cuts = _given_cuts(trace, config.pipeline_split) or _balanced_cuts(trace, num_stages)
    cut = make_cut(model, trace, cuts)
    mesh = make_mesh(degrees, device.type, ("pipeline", "shard" if config.name == "fsdp" else "replicate"))
    group = pipeline_group(degrees, rank)
    at = degrees.coordinate(rank)
    mine = range(at["pipeline"], num_stages, degrees.pipeline)
    staged = StagedModel(model, cut, mine, device, _border(config, mesh))
    notes = spread_over_tensor(model, config, mesh, device)
    shared = SharedGradients(staged, degrees, rank)
    sharded = _shard(staged, mesh, degrees, config) if config.name == "fsdp" else None
    place(model, device)
    optimizer = make_optimizer(model)
    sync: StageSync
    if sharded is not None:
        sync = ShardedStages(sharded, optimizer, shared)
    else:
        alone = degrees.replicate == degrees.tensor == 1
        sync = ReplicatedStages(staged, optimizer, None if alone else group_of(mesh, "replicate"), shared)
    return wrap(
        model,
        optimizer,
        sync,
        degrees,
        global_rank=rank,
        notes=(_describe(config, trace, cuts, cut, num_micro_batches), *notes),
        passes=Pipelined(staged, skeleton, config.pipeline_schedule, group, device, sync.begin_backward),
        update=StageGradients(
            own=OwnGradients(optimizer=optimizer, step=step_of(optimizer)),
            counted=[p for name, p in model.named_parameters() if name not in shared.copies and p.requires_grad],
            first=at["replicate"] == at["shard"] == at["tensor"] == 0,
        ),
        state=StageState(staged=staged, optimizer=optimizer, degrees=degrees, global_rank=rank, group=group),
    )


def _border(config: StrategyConfig, mesh: DeviceMesh) -> Border:
    """Between stages tensors are whole; each tensor rank talks to the one at its own place in the next stage."""
    if config.tensor == 1:
        return Border()
    return Border(
        into=partial(into_stage, mesh=mesh["tensor"], sequence=config.sequence_parallel),
        out=out_of_stage,
        around=AbsentFirst,
    )


def _shard(staged: StagedModel, mesh: DeviceMesh, degrees: Degrees, config: StrategyConfig) -> FSDPModule:
    """This rank's stages, each unit of them gathered by itself."""
    axes = ("replicate", "shard") if degrees.replicate > 1 else ("shard",)
    absent = {parameter for parameter in staged.model.parameters() if is_absent(parameter)}
    own = [(name, unit) for name, unit in units(staged.model, config.wrap) if not set(unit.parameters()) <= absent]
    return shard(staged.model, own, mesh[axes], ignored=absent)


def _outermost(names: Sequence[str]) -> list[str]:
    return [name for name in names if not any(name.startswith(f"{other}.") for other in names)]


def _given_cuts(trace: Trace, split: Sequence[str]) -> tuple[int, ...]:
    """Raises UsageError where the model can't be cut there."""
    cuts = []
    for name in split:
        if name not in trace.units:
            some = ", ".join(trace.units[:20]) or "none: no item of a ModuleList or Sequential is called"
            raise UsageError(f"strategy.pipeline_split: {name} is no unit of the model. Its units: {some}")
        number = trace.units.index(name) + 1
        if number not in trace.cuttable:
            raise UsageError(f"strategy.pipeline_split: the model can't be cut before {name}. {_why_not(trace)}")
        cuts.append(number)
    if cuts != sorted(set(cuts)):
        raise UsageError("strategy.pipeline_split: name the units in the order in which the forward comes to them")
    return tuple(cuts)


def _balanced_cuts(trace: Trace, num_stages: int) -> tuple[int, ...]:
    """Raises UsageError where there are too few places."""
    cuttable = sorted(trace.cuttable - {1})  # before the very first unit there is little to compute
    cuts = balance(trace.costs, cuttable, num_stages) or balance(trace.costs, sorted(trace.cuttable), num_stages)
    if cuts is None:
        raise UsageError(
            f"strategy.pipeline: {num_stages} stages need {num_stages - 1} places to cut the model, and it has "
            f"{len(trace.cuttable)}. {_why_not(trace)}"
        )
    return cuts


def _why_not(trace: Trace) -> str:
    places = ", ".join(trace.units[number - 1] for number in sorted(trace.cuttable)) or "none"
    return (
        "It can be cut before a unit (an item of a ModuleList or Sequential, or what strategy.wrap names) that is "
        "called once and with everything that is needed later of what was computed before. Such places: " + places
    )


def _describe(config: StrategyConfig, trace: Trace, cuts: Sequence[int], cut: Cut, num_micro_batches: int) -> str:
    idle = idle_share(config.pipeline, cut.num_stages // config.pipeline, num_micro_batches)
    more = imbalance(trace.costs, cuts) - 1
    uneven = f"; the dearest stage computes {more:.0%} more than the mean" if more > 0.005 else ""
    return (
        f"{cut.num_stages} stages ({config.pipeline_schedule}), cut before {', '.join(cut.firsts)}; with "
        f"{num_micro_batches} {'micro-batch' if num_micro_batches == 1 else 'micro-batches'} a rank is idle for "
        f"{idle:.0%} of a step{uneven}"
    )
