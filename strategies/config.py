"""The `strategy:` section."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

StrategyName = Literal["auto", "single", "ddp", "fsdp"]


@dataclass(frozen=True, slots=True, kw_only=True)
class StrategyConfig:
    """How the model is spread over the ranks. `strategy: ddp` is short for `strategy: {name: ddp}`."""

    SHORT: ClassVar[str] = "name"

    name: StrategyName = field(
        default="auto",
        metadata={"doc": "auto: ddp if parameters, gradients and optimizer state fit the device's memory, else fsdp"},
    )
    replicate: int | Literal["auto"] = field(
        default="auto",
        metadata={
            "doc": "copies of the model: with ddp one a rank; with fsdp each is cut over `shard` neighbouring ranks, "
            "inside a node where they fit; auto: all ranks (ddp), what `shard` leaves (fsdp)",
            "min": 1,
        },
    )
    shard: int | Literal["auto"] = field(
        default="auto",
        metadata={
            "doc": "fsdp: ranks over which a copy of the model is cut; auto: all of them, or what `replicate` leaves",
            "min": 1,
        },
    )
    wrap: tuple[str, ...] = field(
        default=(),
        metadata={
            "doc": "patterns of the modules that are gathered (fsdp), computed again "
            "(train.activation_checkpointing) or compiled (train.compile) as one unit, like `blocks.*`; "
            "left out: every item of every outermost ModuleList or Sequential"
        },
    )
