"""Outputs of forwards that torch's pytree does not open."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from dtrain.strategies.outputs import map_tensors
from dtrain.strategies.passes import loss_of
from dtrain.strategies.protocol import MicroBatch, StepOptions


@dataclass(frozen=True, slots=True)
class Answer:
    logits: Tensor
    note: str = "as it was"


class Scores(dict[str, Any]):
    pass


MAKERS: list[Callable[[Tensor], Any]] = [
    lambda x: x,
    lambda x: (x, None),
    lambda x: Answer(logits=x),
    lambda x: [SimpleNamespace(logits=x)],
    lambda x: Scores(logits=Answer(logits=x)),
]


@pytest.mark.parametrize("make", MAKERS)
def test_a_micro_batch_that_does_not_count_brings_zeros_whatever_the_output_is(make: Callable[[Tensor], Any]) -> None:
    weight = torch.ones(3, requires_grad=True)
    x = weight * 0
    nothing = (x[:0].sum() / 0) + x.log().sum()  # a mean over nothing, and a loss whose gradient is not finite
    options = StepOptions(
        total_count=1,
        clip_grad_norm=None,
        autocast=lambda: None,
        forward=lambda module, batch, count: None,
        loss=lambda output, batch, count: (nothing, 0.0),
        all_reduce=lambda values: values,
    )
    total, count = loss_of(make(x), MicroBatch(batch=None, count=0, weight=0, indices=()), options)
    total.backward()  # type: ignore[no-untyped-call]
    assert (float(total.detach()), count) == (0.0, 0.0)
    assert weight.grad is not None
    assert weight.grad.tolist() == [0.0, 0.0, 0.0]


def test_what_is_changed_is_a_copy() -> None:
    answer = Scores(inner=Answer(logits=torch.ones(2)), plain=SimpleNamespace(x=torch.ones(2), y=3))
    changed = map_tensors(lambda tensor: tensor * 2, answer)
    assert (answer["inner"].logits.tolist(), answer["plain"].x.tolist()) == ([1, 1], [1, 1])
    assert (changed["inner"].logits.tolist(), changed["plain"].x.tolist()) == ([2, 2], [2, 2])
    assert (type(changed), changed["inner"].note, changed["plain"].y) == (Scores, "as it was", 3)
