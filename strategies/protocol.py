"""What every strategy promises, and the few types through which the trainer talks to it. Torch-free at import.

A strategy is one file with one object that keeps `Strategy`. Parallelism is functions on a plain module over a mesh;
nothing inherits. What differs after materialize() is how gradients meet (`GradientSync`); the step itself, clipping
and the canonical state are common code that looks at the tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from dtrain.strategies.caps import Caps
from dtrain.strategies.config import StrategyConfig
from dtrain.strategies.lossscale import LossScale

if TYPE_CHECKING:
    import torch
    from torch import nn


@dataclass(frozen=True, slots=True, kw_only=True)
class Topology:
    """The ranks of the job, as one of them sees it."""

    global_rank: int
    world_size: int
    nodes: int
    device_type: str  # "cpu" or "cuda"


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """Bytes a rank that the training states take, by class (ZeRO, arXiv 1910.02054, section 3)."""

    parameters: int
    gradients: int
    optimizer: int
    transient: int  # parameters gathered for a moment

    @property
    def total(self) -> int:
        return self.parameters + self.gradients + self.optimizer + self.transient


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec:
    """Sizes of a model, in bytes of its stored dtypes."""

    num_parameters: int
    parameter_bytes: int
    largest_unit_bytes: int  # the largest module that is gathered at once
    optimizer_slots: int = 2  # tensors of parameter size that the optimizer keeps (Adam: 2)


def whole_model(model: ModelSpec) -> Prediction:
    """What a rank holds that holds everything."""
    return Prediction(
        parameters=model.parameter_bytes,
        gradients=model.parameter_bytes,
        optimizer=model.optimizer_slots * model.parameter_bytes,
        transient=0,
    )


class GradientSync(Protocol):
    """How the gradients of the ranks meet. `begin` before each micro-batch's forward, `finish` after the last one's
    backward: from then on every `.grad` is the sum over all ranks (a rank's own part of it, where sharded)."""

    def begin(self, *, last: bool) -> None: ...

    def finish(self) -> bool:
        """Whether this rank has to ask the others which parameters took part; `drop_unused` where any rank has to."""

    def drop_unused(self) -> None:
        """A parameter that took part on no rank keeps no gradient, as in one process. Collective."""

    def zero(self) -> None: ...

    def settle(self) -> None:
        """After forwards that had no backward (an evaluation): parameters lie as they do between steps again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Wrapped:
    """A model made ready for its ranks. `module` is what forward calls; its parameter names are the user's own."""

    module: nn.Module
    optimizer: torch.optim.Optimizer
    sync: GradientSync
    loss_scale: LossScale | None = None  # with fp16


class MakeOptimizer(Protocol):
    def __call__(self, model: nn.Module) -> torch.optim.Optimizer: ...


class Strategy(Protocol):
    name: str
    caps: Caps

    def check(self, config: StrategyConfig, topology: Topology) -> Sequence[str]:
        """Everything that speaks against it, in words; empty where it can start."""

    def predict(self, model: ModelSpec, config: StrategyConfig, topology: Topology) -> Prediction: ...

    def materialize(
        self,
        model: nn.Module,
        make_optimizer: MakeOptimizer,
        config: StrategyConfig,
        topology: Topology,
        device: torch.device,
    ) -> Wrapped:
        """`model` is on CPU with its initial weights, equal on every rank. Collective."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MicroBatch:
    """What one forward sees. `weight` 0: this rank had no samples left and joins with a borrowed one that must not
    count; `count` is what the loss is a mean over (0 then)."""

    batch: Any
    count: float
    weight: int
    indices: tuple[int, ...]  # data set indices of the samples, in order


@dataclass(frozen=True, slots=True, kw_only=True)
class StepResult:
    loss: float  # mean over the global batch, before the update
    grad_norm: float | None  # global norm, before clipping; None for a skipped step
    count: float  # over all ranks
    loss_scale: float | None = None  # that this step was computed with

    @property
    def skipped(self) -> bool:
        """fp16 overflowed: no update was applied."""
        return self.grad_norm is None


@dataclass(frozen=True, slots=True, kw_only=True)
class StepOptions:
    """How a step computes. `total_count` is the sum of `count` over all ranks and micro-batches of this step."""

    total_count: float
    clip_grad_norm: float | None
    autocast: Callable[[], Any]
    forward: Callable[[nn.Module, Any, float], Any]  # (module, batch, count) -> output
    loss: Callable[[Any, Any, float], tuple[torch.Tensor, float]]  # (output, batch, count) -> sum, its true count
    all_reduce: Callable[[list[float]], list[float]]  # sums small vectors over all ranks, in float64
    on_phase: Callable[[str], None] = field(default=lambda phase: None)
