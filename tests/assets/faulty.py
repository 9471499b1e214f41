"""Models, data sets and losses that go wrong on purpose."""

from __future__ import annotations

import os
from typing import Any

import torch
import torch.distributed as dist
from parity import Tokens, Transformer
from torch import Tensor, nn


class FailsOnRank2(Transformer):
    """Raises in the fifth forward of global rank 2, counted over restarts: the buffer is in the checkpoints."""

    def forward(self, tokens: Tensor) -> Tensor:
        self.calls += 1
        if self.calls == 5 and dist.get_rank() == 2:
            raise ZeroDivisionError("planted")
        return super().forward(tokens)


class Data(Tokens):
    """Raises where `at` says: "new", or as soon as sample 5 is read ("item"), in a way that looks like a lost peer."""

    def __init__(self, at: str = "") -> None:
        super().__init__()
        self.at = at
        if at == "new":
            raise FileNotFoundError("planted")  # new

    def __getitem__(self, index: int) -> Any:
        if self.at == "item" and index == 5:
            raise ConnectionResetError("Connection reset by peer")  # item
        return super().__getitem__(index)


def collate(samples: list[Any]) -> Any:
    raise KeyError("planted")  # collate


def loss(output: Tensor, batch: Any) -> Tensor:
    return torch.take(output, torch.tensor(-(10**9)))  # loss


class Unbuilt(Transformer):
    def __init__(self) -> None:
        super().__init__(wdith=3)  # type: ignore[call-arg]  # model


def nan_for_nothing(output: Tensor, batch: Any) -> Tensor:
    """A mean over targets that count: NaN, with a gradient of NaN, where there are none."""
    targets = batch[-1].flatten()
    chosen = (targets != -100).float()
    each = torch.nn.functional.cross_entropy(output.flatten(0, 1), targets.clamp(min=0), reduction="none")
    mean: Tensor = (each * chosen).sum() / chosen.sum()
    return mean


class FewTargets(Tokens):
    """Two samples of three have no target at all."""

    def __getitem__(self, index: int) -> Any:
        inputs, targets = super().__getitem__(index)
        return inputs, targets if index % 3 == 0 else torch.full_like(targets, -100)


def say_end(model: nn.Module) -> str:
    return f"the end of {sum(1 for _ in model.parameters())} tensors"


class LeavesOnRank1(Transformer):
    """Ends its process in the fifth forward of global rank 1, with nothing but an exit code of 0."""

    def forward(self, tokens: Tensor) -> Tensor:
        self.calls += 1
        if self.calls == 5 and dist.get_rank() == 1:
            os._exit(0)
        return super().forward(tokens)
