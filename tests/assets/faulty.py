"""Models that go wrong on purpose."""

from __future__ import annotations

import torch.distributed as dist
from parity import Transformer
from torch import Tensor


class FailsOnRank2(Transformer):
    """Raises in the fifth forward of global rank 2, counted over restarts: the buffer is in the checkpoints."""

    def forward(self, tokens: Tensor) -> Tensor:
        self.calls += 1
        if self.calls == 5 and dist.get_rank() == 2:
            raise ZeroDivisionError("planted")
        return super().forward(tokens)
