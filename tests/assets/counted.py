"""A tiny training that can be checked sample by sample: the loss writes down which samples it was given, in which step,
and steps take as long as COUNTED_STEP_S says."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import torch


class Data(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    def __init__(self, size: int) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(index)
        return {"x": torch.randn(8, generator=generator), "number": torch.tensor(index)}


class Model(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.Tanh(), torch.nn.Linear(32, 1))

    def forward(self, x: torch.Tensor, number: torch.Tensor) -> torch.Tensor:
        return self.net(x).squeeze(-1)  # type: ignore[no-any-return]


def loss(output: torch.Tensor, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    time.sleep(float(os.environ.get("COUNTED_STEP_S", "0")))
    with open(Path(os.environ["DTRAIN_RUN_DIR"]) / f"samples-{os.environ['RANK']}.jsonl", "a") as file:
        file.write(json.dumps(batch["number"].tolist()) + "\n")
    return ((output - batch["x"].sum(-1)) ** 2).mean()
