"""The user's part of a step: how a batch goes through the model, and what the loss is a mean over."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dtrain.cluster.errors import UsageError
from dtrain.runtime import targets
from dtrain.runtime.config import Target

Loss = Callable[[Any, Any, float], tuple[Tensor, float]]


def forward(model: nn.Module, batch: Any) -> Any:
    """Always a call of the module: model(**mapping), model(*tuple[:-1]) with the last as target, model(tensor)."""
    if isinstance(batch, Mapping):
        return model(**batch)
    if isinstance(batch, tuple | list):
        return model(*batch[:-1]) if len(batch) > 1 else model(batch[0])
    return model(batch)


def make_loss(target: Target | None, device: torch.device) -> Loss:
    """(output, batch, count) -> (sum over the batch, what it is a sum over).

    The user's callable returns a scalar mean over `count`, or (sum, count). Raises UsageError for one with parameters.
    """
    function = targets.as_callable(target) if target else None
    if isinstance(function, nn.Module):
        if any(parameter.requires_grad for parameter in function.parameters()):
            raise UsageError(
                f"loss: a {type(function).__name__} has parameters, but only the model's are trained. "
                "Compute this loss in the model"
            )
        function.to(device)  # class weights and the like

    def loss(output: Any, batch: Any, count: float) -> tuple[Tensor, float]:
        value = function(output, batch) if function else _own_loss(output)
        if isinstance(value, tuple) and len(value) == 2:
            total, counted = value
            return _scalar(total), float(counted)
        return _scalar(value) * count, count

    return loss


def _scalar(value: Any) -> Tensor:
    """Of shape (), and precise enough to be multiplied by a count. Raises UsageError."""
    if not isinstance(value, Tensor) or value.numel() != 1:
        found = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise UsageError(f"loss: returned {found}. Return a scalar mean, or (sum, count)")
    scalar = value.reshape(())
    return scalar.float() if scalar.dtype in (torch.bfloat16, torch.float16) else scalar


def _own_loss(output: Any) -> Any:
    value = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    if value is None:
        raise UsageError(
            f"loss: the model returned {type(output).__name__} without a `loss`. "
            "Set `loss: {_target_: ...}`, a callable(output, batch)"
        )
    return value


def autocast(precision: str, device: torch.device, *, cache: bool) -> Callable[[], Any]:
    """A context maker for the forward. fp32 computes as the tensors are."""
    enabled = precision == "bf16"
    return lambda: torch.autocast(device.type, dtype=torch.bfloat16, enabled=enabled, cache_enabled=cache)
