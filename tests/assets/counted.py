"""A tiny training that can be checked sample by sample: the loss writes down which samples it was given, in which step,
and steps take as long as COUNTED_STEP_S says. `training` makes its config."""

from __future__ import annotations

import json
import os
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch

ASSETS = str(Path(__file__).parent)
BATCH = 6


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


def training(steps: int, **more: Any) -> dict[str, Any]:
    """A config, of which every sample is used once."""
    return {
        "model": {"_target_": "counted.Model"},
        "loss": "counted.loss",
        "data": {"train": {"_target_": "counted.Data", "size": steps * BATCH}, "batch_size": BATCH, "workers": 0},
        "optimizer": {"_target_": "torch.optim.AdamW", "lr": 0.01},
        "train": {"steps": steps, "seed": 3},
        "checkpoint": {"keep": 2},
        **more,
    }


def samples(run_dir: Path) -> Counter[int]:
    """How often each sample was trained on, in all starts of the run together."""
    return Counter(
        number
        for path in run_dir.glob("samples-*.jsonl")
        for line in path.read_text().splitlines()
        for number in json.loads(line)
    )
