"""The sections that the runtime owns: model, data, optimizer, schedule, train, checkpoint, recovery.

A Target stands for a callable of the user's: `_target_` names it, the other keys are passed to it as keywords.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """`{_target_: package.module.name, key: value, ...}`"""

    target: str
    kwargs: dict[str, Any]
    where: str = ""  # file:line, for messages


@dataclass(frozen=True, slots=True, kw_only=True)
class ParamGroup:
    """One of `optimizer.groups`: the parameters that match get these settings; the first match wins."""

    match: str = field(metadata={"doc": "a pattern over fully qualified parameter names, like `*.bias`"})
    settings: dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimizerConfig:
    target: Target = field(metadata={"doc": "called with the parameters first, like `torch.optim.AdamW`"})
    groups: tuple[ParamGroup, ...] = field(
        default=(), metadata={"doc": "`[{match: PATTERN, weight_decay: 0, ...}]`: other settings for some parameters"}
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class ScheduleConfig:
    """Built-in schedules are pure functions of the step. `schedule: cosine` is short for `{name: cosine}`."""

    name: Literal["constant", "linear", "cosine", "wsd"] = field(
        default="constant", metadata={"doc": "how the learning rate goes after the warm-up; wsd: warm-up, stable, decay"}
    )
    warmup: int = field(default=0, metadata={"doc": "steps of linear rise from 0", "min": 0})
    decay: int = field(default=0, metadata={"doc": "wsd: the last steps, in which the rate falls", "min": 0})
    min_ratio: float = field(
        default=0.0, metadata={"doc": "the rate at the end over the peak rate", "min": 0.0, "max": 1.0}
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class DataConfig:
    train: Target = field(metadata={"doc": "callable -> map-style Dataset (`__len__`, `__getitem__`)"})
    batch_size: int = field(
        metadata={"doc": "samples an optimizer step, over the whole job: the same at any world size", "min": 1}
    )
    eval: Target | None = field(default=None, metadata={"doc": "callable -> Dataset; see train.eval_every"})
    collate: Target | None = field(
        default=None, metadata={"doc": "callable(list of samples) -> batch; left out: torch's default_collate"}
    )
    workers: int = field(
        default=0, metadata={"doc": "loader processes a rank; 0: samples are read between steps", "min": 0}
    )
    shuffle: bool = field(default=True, metadata={"doc": "a new order every epoch, a pure function of seed and epoch"})


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainConfig:
    steps: int = field(metadata={"doc": "optimizer steps of the whole run", "min": 1})
    seed: int = field(default=0, metadata={"doc": "initial weights, sample order and random numbers follow from it"})
    precision: Literal["fp32", "bf16"] = field(
        default="fp32", metadata={"doc": "bf16: autocast for the forward, parameters and optimizer state stay fp32"}
    )
    clip_grad_norm: float | None = field(
        default=None, metadata={"doc": "the global gradient norm is clipped to this", "min": 0.0}
    )
    micro_batch: int | None = field(
        default=None,
        metadata={"doc": "samples that one forward sees at most; the accumulation follows; left out: all at once", "min": 1},
    )
    eval_every: int | None = field(
        default=None, metadata={"doc": "steps between evaluations over data.eval; left out: at the end only", "min": 1}
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointConfig:
    url: str = field(default="${run_dir}/checkpoints", metadata={"doc": "where checkpoints go: a path or file:// URL"})
    every: int | str | None = field(
        default=None, metadata={"doc": "steps (`100`) or time (`30s`, `10min`, `2h`) between saves; left out: end only"}
    )
    keep: int | None = field(
        default=3, metadata={"doc": "newest checkpoints to keep; null: all of them", "min": 1}
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class RecoveryConfig:
    max_restarts_without_progress: int = field(
        default=3, metadata={"doc": "restarts in a row with no new step, after which the run fails", "min": 0}
    )
    workers: Literal["warm", "exec"] = field(
        default="warm", metadata={"doc": "warm: forked from a process that has imported torch; exec: started plainly"}
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class RunConfig:
    """All that a worker needs to train: what crosses to the nodes as config.yaml."""

    name: str
    model: Target
    data: DataConfig
    optimizer: OptimizerConfig
    train: TrainConfig
    loss: Target | None = None
    count: Target | None = None
    schedule: ScheduleConfig | Target = field(default_factory=ScheduleConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    recovery: RecoveryConfig = field(default_factory=RecoveryConfig)
    on_end: Target | None = None
