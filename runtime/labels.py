"""What a model's own loss is a mean over, where it computes one from `labels` as Hugging Face's models do.

Looks at the model's attributes only: transformers is not imported. Source: transformers 5, trainer.py and
loss/loss_utils.py.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from dtrain.runtime.data import Count, count_samples

IGNORED = -100


def count_labels(model: nn.Module) -> Count:
    """The default of `count` without a `loss`: the labels that are not ignored, where a batch has whole numbers under
    `labels`; else samples. A causal language model shifts them: the first one of each sequence is never predicted."""
    shifted = _shifts_labels(model)

    def count(batch: Any) -> float:
        labels = batch.get("shift_labels", batch.get("labels")) if isinstance(batch, Mapping) else None
        if not isinstance(labels, Tensor) or labels.ndim == 0 or labels.is_floating_point() or labels.is_complex():
            return count_samples(batch)
        if shifted and labels.ndim > 1 and "shift_labels" not in batch:
            labels = labels[..., 1:]
        return float((labels != IGNORED).sum())

    return count


def takes_num_items(model: nn.Module) -> bool:
    """Whether the forward divides by `num_items_in_batch` if it is passed: it has that keyword, or hands any further
    ones to a loss function of Hugging Face's."""
    parameters = inspect.signature(model.forward).parameters
    if "num_items_in_batch" in parameters:
        return True
    accepts = getattr(model, "accepts_loss_kwargs", hasattr(model, "loss_type"))
    return bool(accepts) and any(p.kind is p.VAR_KEYWORD for p in parameters.values())


def _shifts_labels(model: nn.Module) -> bool:
    if not hasattr(model, "loss_type") or getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return False
    # Without a known loss_type the loss function is that of causal models, though only these use it.
    known = model.loss_type is not None or "LMHead" in type(model).__name__
    return known and getattr(getattr(model, "loss_function", None), "__name__", "") == "ForCausalLMLoss"
