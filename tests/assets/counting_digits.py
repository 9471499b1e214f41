"""The example's network for handwritten digits with two buffers: its forward changes one, and only reads the other."""

from __future__ import annotations

import digits
import torch
from torch import Tensor


class Net(digits.Net):
    def __init__(self) -> None:
        super().__init__(width=16)
        self.forwards: Tensor
        self.brightness: Tensor
        self.register_buffer("forwards", torch.zeros((), dtype=torch.int64))
        self.register_buffer("brightness", torch.full((1, 8, 8), 0.3))

    def forward(self, image: Tensor) -> Tensor:
        if self.training:
            self.forwards.add_(1)
        return super().forward(image - self.brightness)
