"""Torch's random numbers from one key, on every kind of device that is in use."""

from __future__ import annotations

import torch


def seed_torch(key: int) -> None:
    """`key`: below 2**63. As torch.manual_seed does it, but that looks at every kind of device each time: 0.2 ms, and
    this runs for every sample, and every micro-batch of a pipeline."""
    torch.default_generator.manual_seed(key)
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.manual_seed_all(key)
