"""One forward of a model on a micro-batch of the run's own data, for strategies that look at what a forward does before
they spread the model. The data set is built for it and let go.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils.data import default_collate

from dtrain.runtime import targets
from dtrain.runtime.config import RunConfig
from dtrain.runtime.data import explain, to_device
from dtrain.runtime.sources import first_sample
from dtrain.runtime.task import make_task


def example_forward(
    config: RunConfig, model: nn.Module, num_samples: int, device: torch.device
) -> Callable[[nn.Module], Any]:
    """(model) -> what its forward returns for `num_samples` times the first sample of data.train; the same on every
    rank. `model`: as it was built, for how it wants to be called. Raises UsageError, DataError."""
    task = make_task(config, model, device)
    collate = targets.as_callable(config.data.collate) if config.data.collate else default_collate
    sample = first_sample(config)
    try:
        batch = collate([sample] * num_samples)
    except Exception as error:
        raise explain(f"collate of {num_samples} samples", error) from error
    count = float(task.count(batch))
    batch = to_device(batch, device)
    return lambda each: task.forward(each, batch, count)
