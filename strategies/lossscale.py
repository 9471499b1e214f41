"""Dynamic loss scaling for fp16, whose gradients vanish below 2**-24: the loss is multiplied before backward, the
gradients divided by the same after it. Pure arithmetic; the same on every rank, because all of them see the same norm.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

# As torch.amp.GradScaler has them.
INITIAL = 2.0**16
GROWTH_FACTOR = 2.0
BACKOFF_FACTOR = 0.5
GROWTH_INTERVAL_STEPS = 2000

SMALLEST = 2.0**-14  # below it even losses of 1e4 would not overflow: it is not the scale's fault any more


@dataclass(slots=True, kw_only=True)
class LossScale:
    """A power of two: dividing by it changes no bit of a gradient."""

    value: float = INITIAL
    good_steps: int = 0  # in a row, at this value

    def update(self, *, finite: bool) -> None:
        """After a step. Not finite: the step was skipped, the next one tries half of the scale."""
        if not finite:
            self.value, self.good_steps = self.value * BACKOFF_FACTOR, 0
        elif self.good_steps + 1 < GROWTH_INTERVAL_STEPS:
            self.good_steps += 1
        else:
            self.value, self.good_steps = self.value * GROWTH_FACTOR, 0

    @property
    def hopeless(self) -> bool:
        return self.value < SMALLEST

    def state(self) -> dict[str, Any]:
        return {"scale": self.value, "good_steps": self.good_steps}

    def load(self, state: dict[str, Any]) -> None:
        self.value, self.good_steps = float(state["scale"]), int(state["good_steps"])
