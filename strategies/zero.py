"""ZeRO (arXiv 1910.02054) through DeepSpeed itself: the optimizer's state is cut over the ranks (stage 1), gradients as
well (2), parameters as well (3). With `offload: cpu` master weights and optimizer state lie in the nodes' memory.

zero_engine.py starts it, zero_partitions.py finds what it has cut, zero_check.py tries that out, zero_gradients.py and
zero_state.py are the parts of a Wrapped.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext

import torch
from torch import nn

from dtrain.cluster.errors import UsageError
from dtrain.strategies.caps import CAPS
from dtrain.strategies.config import StrategyConfig
from dtrain.strategies.elementwise import differs_on_parts, is_elementwise
from dtrain.strategies.layout import check_layout, degrees_of
from dtrain.strategies.protocol import MakeOptimizer, ModelSpec, Prediction, Topology, Wrapped
from dtrain.strategies.wrapping import wrap
from dtrain.strategies.zero_check import check_partitions
from dtrain.strategies.zero_engine import BUCKET_ELEMENTS, Carrier, start_engine, unknown
from dtrain.strategies.zero_gradients import ZeroGradients, ZeroUpdate
from dtrain.strategies.zero_joined import UPDATE_TEMPORARIES
from dtrain.strategies.zero_partitions import Slice, find_slices, gathered, publisher, take_slices
from dtrain.strategies.zero_state import ZeroState


class Zero:
    def __init__(self, stage: int) -> None:
        self.name = f"zero{stage}"
        self.caps = CAPS[self.name]
        self._stage = stage

    def check(self, config: StrategyConfig, topology: Topology) -> Sequence[str]:
        return [message for _, message in check_layout(config, topology.nodes, topology.world_size // topology.nodes)]

    def predict(self, model: ModelSpec, config: StrategyConfig, topology: Topology) -> Prediction:
        """The master copy of the weights counts to the optimizer, as the paper has it."""
        whole, part = model.parameter_bytes, -(-model.parameter_bytes // topology.world_size)
        bucket = min(4 * BUCKET_ELEMENTS, whole)
        backward = bucket + (3 * model.largest_unit_bytes if self._stage == 3 else 0)
        update = 0 if config.offload == "cpu" else UPDATE_TEMPORARIES * part
        return Prediction(
            parameters=part if self._stage == 3 else whole,
            gradients=whole if self._stage == 1 else part,
            optimizer=0 if config.offload == "cpu" else (1 + model.optimizer_slots) * part,
            transient=max(backward, update),
        )

    def materialize(
        self,
        model: nn.Module,
        make_optimizer: MakeOptimizer,
        config: StrategyConfig,
        topology: Topology,
        device: torch.device,
    ) -> Wrapped:
        stage, offload = self._stage, config.offload == "cpu"
        _check_parameters(model, self.name, every=stage == 3)
        model.to(device)
        optimizer = make_optimizer(model)  # on whole parameters, which their factory may look at
        _check_optimizer(optimizer, self.name)
        carrier = Carrier(optimizer.param_groups)
        engine = start_engine(model, carrier, stage, offload=offload, device=device)
        slices = _find_slices(model, engine.optimizer, stage, topology)
        publish = publisher(engine.optimizer, stage)
        check_partitions(slices, publish, gathered if stage == 3 else lambda parameter: nullcontext())
        take_slices(optimizer, slices)
        gradients = ZeroGradients(engine, stage, slices)
        return wrap(
            model,
            optimizer,
            gradients,
            degrees_of(config, topology.world_size),
            global_rank=topology.global_rank,
            update=ZeroUpdate(engine, stage, carrier, optimizer, slices, gradients, offload=offload),
            state=ZeroState(model, optimizer, slices, topology.world_size, publish),
        )


def _find_slices(model: nn.Module, zero: object, stage: int, topology: Topology) -> list[Slice]:
    try:
        return find_slices(model, zero, stage, topology.global_rank, topology.world_size)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UsageError(unknown(f"its partitions are not where they are looked for ({error})")) from error


def _check_optimizer(optimizer: torch.optim.Optimizer, name: str) -> None:
    """Raises UsageError."""
    kind = type(optimizer)
    if is_elementwise(kind) is None and differs_on_parts(optimizer):
        raise UsageError(
            f"strategy: {name} cuts parameters into flat pieces, and {kind.__module__}.{kind.__qualname__} is not "
            "elementwise: tried on a small tensor, its update of pieces is another one. Take ddp, or fsdp, which gives "
            "it norms of whole tensors; or say `elementwise = True` in the class where that does not matter"
        )


def _check_parameters(model: nn.Module, name: str, *, every: bool) -> None:
    """What DeepSpeed would fail at later and in other words, or cast. `every`: not only what is trained. Raises
    UsageError."""
    for fqn, parameter in model.named_parameters():
        if parameter.dtype != torch.float32 and (every or parameter.requires_grad):
            found = str(parameter.dtype).removeprefix("torch.")
            raise UsageError(
                f"strategy: {name} keeps {'every parameter' if every else 'what is trained'} in float32, and {fqn} is "
                f"{found}. Build the model in float32 (train.precision says in what it computes), or take ddp or fsdp"
            )
        if parameter.ndim == 0:
            raise UsageError(f"strategy: {name}: {fqn} has no dimension. Give it the shape (1,), or take ddp")
        if not parameter.is_contiguous():
            raise UsageError(
                f"strategy: {name} lays out contiguous parameters only, and {fqn} has the strides "
                f"{parameter.stride()} for the shape {tuple(parameter.shape)}. Leave the memory format as it is, or "
                "take ddp"
            )


zero1, zero2, zero3 = Zero(1), Zero(2), Zero(3)
