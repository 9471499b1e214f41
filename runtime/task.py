"""The user's part of a step: how a batch goes through the model, what the loss is, and what it is a mean over.

Chooses between the config's callables and what holds without them. What Hugging Face's models expect is labels.py's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dtrain.cluster.errors import UsageError
from dtrain.runtime import targets
from dtrain.runtime.config import RunConfig, Target
from dtrain.runtime.data import Count, count_samples
from dtrain.runtime.labels import count_labels, takes_num_items

Forward = Callable[[nn.Module, Any, float], Any]
Loss = Callable[[Any, Any, float], tuple[Tensor, float]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """forward(model, batch, count) -> output; loss(output, batch, count) -> (sum, its true count). `count` is what
    count(batch) has found before the batch went to the device: 0 where this rank only joins in."""

    forward: Forward
    loss: Loss
    count: Count


def make_task(config: RunConfig, model: nn.Module, device: torch.device) -> Task:
    """Raises UsageError for a loss with parameters."""
    closure, own_forward = config.loss_closure, config.data.forward
    count = targets.as_callable(config.count) if config.count else None
    if closure:
        return Task(
            forward=_ThroughModel(_callable("loss_closure", closure, device), "loss_closure"),
            loss=lambda output, batch, count: _sum_and_count("loss_closure", output, count),
            count=count or count_samples,
        )
    if own_forward:
        through: Forward = _ThroughModel(targets.as_callable(own_forward), "data.forward")
    else:
        through = forward_with_num_items if config.loss is None and takes_num_items(model) else forward
    return Task(
        forward=through,
        loss=make_loss(config.loss, device),
        count=count or (count_labels(model) if config.loss is None else count_samples),
    )


def forward(model: nn.Module, batch: Any, count: float) -> Any:
    """Always a call of the module: model(**mapping), model(*tuple[:-1]) with the last as target, model(tensor)."""
    try:
        if isinstance(batch, Mapping):
            return model(**batch)
        if isinstance(batch, tuple | list):
            return model(*batch[:-1]) if len(batch) > 1 else model(batch[0])
        return model(batch)
    except TypeError as error:
        own = getattr(model, "module", model)  # what DistributedDataParallel is put around
        name = getattr(own.forward, "__qualname__", "forward")
        if f"{name}() " in str(error):  # Python's words for arguments that do not fit
            error.add_note(f"a batch that is {_call_of(batch)}. Where that does not fit, set data.forward")
        raise


def _call_of(batch: Any) -> str:
    if isinstance(batch, Mapping):
        return f"a mapping is passed as model(**batch), here with {', '.join(map(str, batch))}"
    if isinstance(batch, tuple | list):
        return f"a tuple is passed as model(*batch[:-1]), here {len(batch)} entries, the last one the target"
    return f"neither mapping nor tuple is passed as model(batch), here a {type(batch).__name__}"


def forward_with_num_items(model: nn.Module, batch: Any, count: float) -> Any:
    """As forward, for models that divide their sum of losses by `num_items_in_batch`: so the product with the count is
    that sum, whatever the model would have counted itself."""
    if isinstance(batch, Mapping) and "labels" in batch and "num_items_in_batch" not in batch:
        # A tensor, because a compiled model would be compiled again for each new number.
        number = torch.tensor(max(count, 1.0), device=_device_of(batch))
        return model(**batch, num_items_in_batch=number)
    return forward(model, batch, count)


def _device_of(batch: Mapping[str, Any]) -> torch.device | None:
    labels = batch["labels"]
    return labels.device if isinstance(labels, Tensor) else None


class _ThroughModel:
    """The user's callable(model, batch) in the place of the forward. Its first call must call the model itself: that is
    where sharded parameters are gathered, and a strategy that does not need it would only hide the mistake."""

    def __init__(self, function: Callable[[nn.Module, Any], Any], key: str) -> None:
        self._function = function
        self._key = key
        self._seen = False

    def __call__(self, model: nn.Module, batch: Any, count: float) -> Any:
        if self._seen:
            return self._function(model, batch)
        called: list[bool] = []
        hook = model.register_forward_pre_hook(lambda *_: called.append(True))
        try:
            output = self._function(model, batch)
        except Exception as error:
            if not called:
                error.add_note(f"{self._key}: {_NOT_CALLED}")
            raise
        finally:
            hook.remove()
        if not called:
            raise UsageError(f"{self._key}: {_NOT_CALLED}")
        self._seen = True
        return output


_NOT_CALLED = (
    "the model itself was not called. Call it as model(...), not one of its methods or parts: sharded parameters are "
    "gathered there. Move what a method does into the model's forward"
)


def make_loss(target: Target | None, device: torch.device) -> Loss:
    """(output, batch, count) -> (sum over the batch, what it is a sum over).

    The user's callable returns a scalar mean over `count`, or (sum, count). Raises UsageError for one with parameters.
    """
    function = _callable("loss", target, device) if target else None

    def loss(output: Any, batch: Any, count: float) -> tuple[Tensor, float]:
        return _sum_and_count("loss", function(output, batch) if function else _own_loss(output), count)

    return loss


def _callable(key: str, target: Target, device: torch.device) -> Callable[..., Any]:
    function = targets.as_callable(target)
    if isinstance(function, nn.Module):
        if any(parameter.requires_grad for parameter in function.parameters()):
            raise UsageError(
                f"{key}: a {type(function).__name__} has parameters, but only the model's are trained. "
                "Compute this loss in the model"
            )
        function.to(device)  # class weights and the like
    return function


def _sum_and_count(key: str, value: Any, count: float) -> tuple[Tensor, float]:
    if isinstance(value, tuple) and len(value) == 2:
        total, counted = value
        return _scalar(key, total), float(counted)
    return _scalar(key, value) * count, count


def _scalar(key: str, value: Any) -> Tensor:
    """Of shape (), and precise enough to be multiplied by a count. Raises UsageError."""
    if not isinstance(value, Tensor) or value.numel() != 1:
        found = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise UsageError(f"{key}: returned {found}. Return a tensor with one number, the mean, or (sum, count)")
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


_AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


def autocast(precision: str, device: torch.device, *, cache: bool) -> Callable[[], Any]:
    """A context maker for the forward. fp32 computes as the tensors are."""
    if precision not in _AUTOCAST:
        return nullcontext
    return lambda: torch.autocast(device.type, dtype=_AUTOCAST[precision], cache_enabled=cache)
