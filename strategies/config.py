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
        default="auto", metadata={"doc": "ranks that each hold the whole model (ddp); auto: all of them", "min": 1}
    )
    shard: int | Literal["auto"] = field(
        default="auto", metadata={"doc": "ranks over which the model is cut (fsdp); auto: all of them", "min": 1}
    )
    wrap: tuple[str, ...] = field(
        default=(),
        metadata={
            "doc": "fsdp: patterns of the modules that are gathered as one unit, like `blocks.*`; "
            "left out: every item of every outermost ModuleList or Sequential"
        },
    )
