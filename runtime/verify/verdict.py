"""What a comparison comes to: the first difference with its cause, or none. Words only; torch-free."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from enum import Enum
from typing import Any


class Cause(Enum):
    ORDER = "order of data"
    CONTENTS = "contents of the data"
    START = "initial weights"
    LOSS = "loss normalization"
    STATISTICS = "batch statistics"
    SCALE = "gradient scale"
    SUM = "gradients not summed"
    NORM = "partial norm"
    DTYPE = "dtype of master weights"
    BUFFER = "buffer not synchronized"
    FORWARD = "the forward computes something else"
    GRADIENT = "the backward computes something else"
    UPDATE = "the update computes something else"


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """The first difference. `tensor`: "" where it is none's; `evidence`: numbers, a line each; `advice`: where to
    look."""

    cause: Cause
    step: int  # 0: before the first
    quantity: str  # "loss", "gradient", ...
    tensor: str
    evidence: tuple[str, ...]
    advice: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Largest:
    """The largest difference that counts as rounding."""

    relative: float
    tensor: str
    step: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    steps: int
    finding: Finding | None
    largest: dict[str, Largest] = field(default_factory=dict)  # by quantity
    indifferent: tuple[str, ...] = ()  # parameters to which the loss does not react
    notes: tuple[str, ...] = ()

    @property
    def equal(self) -> bool:
        return self.finding is None

    def to_json(self) -> dict[str, Any]:
        finding = None if self.finding is None else {**asdict(self.finding), "cause": self.finding.cause.value}
        return {"equal": self.equal, **asdict(self), "finding": finding}
