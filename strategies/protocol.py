"""What every strategy promises, and the few types through which the trainer talks to it. Torch-free at import.

A strategy is one file with one object that keeps `Strategy`. Parallelism is functions on a plain module over a mesh;
nothing inherits. What differs after materialize() are four small parts: how gradients meet (`GradientSync`), how
micro-batches go through the model (`Passes`), what the update looks at (`Update`), and where the state lies (`State`).
Each has a common implementation that looks at the tensors; the order of a step, step.run_step(), is one for all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from dtrain.strategies.boxes import Box, TensorSpec
from dtrain.strategies.caps import Caps
from dtrain.strategies.config import StrategyConfig
from dtrain.strategies.degrees import DataRank, Degrees
from dtrain.strategies.exacttree import LogicalShards
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
    transient: int  # for a moment: gathered parameters, temporaries of an update

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


def cut_over(prediction: Prediction, ranks: int) -> Prediction:
    """Of a model whose layers are cut over `ranks`; what stays whole (norms) is too small to count."""
    return Prediction(**{field.name: -(-getattr(prediction, field.name) // ranks) for field in fields(prediction)})


Measured = TypeVar("Measured")
Forward = Callable[["nn.Module", Any, float], Any]  # (module, batch, count) -> output
AllReduce = Callable[[list[float]], list[float]]  # sums small vectors over all ranks, in float64
Local = dict[str, "list[tuple[Box, torch.Tensor]]"]
Saved = Mapping[str, tuple[str, tuple[int, ...]]]  # name -> (dtype, global shape)
# A tensor: its name, its global shape, and what this rank holds of it
Lying = tuple[str, tuple[int, ...], "list[tuple[Box, torch.Tensor]]"]
# (what all ranks hold, what this rank is to fill): whether ranks talk is its affair
Reader = Callable[["Sequence[TensorSpec]", "Iterable[tuple[str, Box, torch.Tensor]]"], None]


class GradientSync(Protocol):
    """How the gradients of the ranks meet. `begin` before each micro-batch's forward, `finish` after the last one's
    backward: from then on every `.grad` is the sum over all ranks (a rank's own part of it, where sharded)."""

    def begin(self, *, last: bool) -> None: ...

    def backward(self, loss: torch.Tensor) -> None: ...

    def finish(self) -> bool:
        """Whether this rank has to ask the others which parameters took part; `drop_unused` where any rank has to."""

    def drop_unused(self) -> None:
        """A parameter that took part on no rank keeps no gradient, as in one process. Collective."""

    def zero(self) -> None: ...

    def settle(self) -> None:
        """After forwards that had no backward (an evaluation): parameters lie as they do between steps again."""


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
    forward: Forward
    loss: Callable[[Any, Any, float], tuple[torch.Tensor, float]]  # (output, batch, count) -> sum, its true count
    all_reduce: AllReduce
    on_phase: Callable[[str], None] = field(default=lambda phase: None)
    seed: Callable[[int], None] = field(default=lambda shard: None)  # random numbers of a logical shard of this step


@dataclass(frozen=True, slots=True, kw_only=True)
class Passed:
    """What this rank's micro-batches gave, where it knows; see Wrapped.data for whose numbers count."""

    loss_sum: float
    count: float  # the true one, which the loss may say itself
    bad: MicroBatch | None = None  # the first whose loss was not finite


class Passes(Protocol):
    """How micro-batches go through the model. Raises what the user's code raised."""

    def train(
        self, wrapped: Wrapped, micro_batches: Sequence[MicroBatch], options: StepOptions, divisor: float
    ) -> Passed:
        """Forward and backward of each: gradients of the losses' sum / `divisor` wait for sync.finish()."""

    def evaluate(
        self, module: nn.Module, micro: MicroBatch, forward: Forward, measure: Callable[[Any], Measured]
    ) -> Measured:
        """measure(output) of one forward without gradients, the same on all ranks that work on the same samples."""


class Update(Protocol):
    """What happens to the summed gradients of a step."""

    def norm(self, all_reduce: AllReduce) -> float:
        """Their 2-norm over all axes; a replicated or tied one counts once. Asked before drop_unused(), also of
        gradients that are not finite. Collective; `all_reduce` is called as often on every rank."""

    def gradients(self, module: nn.Module) -> Iterable[Lying]:
        """Where they lie, by the names of `module`'s parameters, for who looks at them between sync.finish() and
        apply(). No communication."""

    def apply(self, factor: float) -> None:
        """Multiplies them and does the optimizer's step."""


class State(Protocol):
    """Model and optimizer as boxes of globally named tensors; see state.py for names and rules."""

    def canonical(self) -> tuple[list[TensorSpec], Local, dict[str, dict[str, Any]]]:
        """(specs, equal on every rank; this rank's boxes, as views of the live tensors; optimizer values that are no
        tensors, by parameter name and key, equal on every rank)."""

    def load(self, saved: Saved, values: Mapping[str, Mapping[str, Any]], read: Reader) -> None:
        """Fills everything from a checkpoint's tensors, whatever layout they were saved in. Raises CheckpointError."""

    def written(self) -> None:
        """Somebody has written into what canonical() gave: the model that computes is made the same. Collective."""


def _nothing() -> None:
    pass


@dataclass(frozen=True, slots=True, kw_only=True)
class Wrapped:
    """A model made ready for its ranks. `module` is what forward calls; its parameter names are the user's own."""

    module: nn.Module
    optimizer: torch.optim.Optimizer
    sync: GradientSync
    passes: Passes
    update: Update
    state: State
    degrees: Degrees
    data: DataRank
    shards: LogicalShards | None = None  # with train.exact
    loss_scale: LossScale | None = None  # with fp16
    notes: tuple[str, ...] = ()  # what was done to the model, for a person
    close: Callable[[], None] = _nothing  # leaves what it has joined; after the last step, on every rank
