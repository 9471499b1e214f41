"""Forwards, closures and metrics of a user's own, over the parity model and its data."""

from __future__ import annotations

from typing import Any

import parity
import torch.distributed as dist
from torch import Tensor, nn


def by_keyword(model: nn.Module, batch: Any) -> Tensor:
    output: Tensor = model(tokens=batch[0])
    return output


def closure(model: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
    return parity.token_loss(model(batch[0]), batch)


def counted(output: Tensor, batch: Any) -> dict[str, Any]:
    """A plain mean over samples, and a pair whose counts differ between samples."""
    counts = batch[-1] != -100
    right = (output.argmax(-1) == batch[-1]) & counts
    return {"accuracy": (right.sum(), counts.sum()), "first": batch[0][:, 0].float().mean()}


def names_by_rank(output: Tensor, batch: Any) -> dict[str, float]:
    return {f"of rank {dist.get_rank()}": 1.0}


def fails(output: Tensor, batch: Any) -> dict[str, float]:
    if len(batch[0]) and dist.get_rank() == 1:
        raise LookupError("planted")  # metrics
    return {}


def valley(output: Tensor, batch: Any) -> dict[str, float]:
    """Lowest at step 6 of a run whose model counts its training forwards, one a step."""
    return {"height": abs(float(batch[0].shape[0] > 0) * (_steps[0] - 6))}


_steps = [0]


class Counts(parity.Transformer):
    """Knows how many steps it has been trained, also after a restart: the buffer is in the checkpoints."""

    def forward(self, tokens: Tensor) -> Tensor:
        if self.training:
            self.calls += 1
        _steps[0] = int(self.calls)
        return super().forward(tokens)
