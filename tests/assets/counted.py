"""A tiny training that can be checked sample by sample: the loss writes down which samples it was given, in which step,
and steps take as long as COUNTED_STEP_S says, until a test has seen enough; a test may hold the data back, and say how
far the run may go, so that none depends on how quick a machine is. `training` makes its config."""

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
MADE = "a model was made"  # printed by each worker that begins
HURRY = "hurry"  # a file in the run directory: from now on steps take no time, and nothing waits for `allow`
ALLOWED = "allowed"  # another: the step that `allow` named last
AHEAD = 10  # steps beyond the one that a test waits for, in which what it does next falls


class Data(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    def __init__(self, size: int) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        _hold(type(self).__name__)
        if type(self) is Data:
            _wait_until_allowed()
        x = torch.randn(8, generator=torch.Generator().manual_seed(index))
        return {"x": x + 0.1 * torch.randn(8), "number": torch.tensor(index)}


class Held(Data):
    """For evaluations: held back by a file of its own."""


def _hold(what: str) -> None:
    """Waits while the run directory has `hold-<what>`; `held-<what>` tells that somebody does."""
    hold = Path(os.environ.get("DTRAIN_RUN_DIR", "")) / f"hold-{what}"
    while hold.exists():
        hold.with_name(f"held-{what}").touch()
        time.sleep(0.05)


def allow(run_dir: Path, step: int) -> None:
    """The run gets as far as `step`, or the few steps further that are read ahead; a stop is heard there too."""
    new = run_dir / f"{ALLOWED}.new"
    new.write_text(str(step))
    new.rename(run_dir / ALLOWED)


def _wait_until_allowed() -> None:
    run_dir = Path(os.environ.get("DTRAIN_RUN_DIR", ""))
    allowed = run_dir / ALLOWED
    while allowed.exists() and not (run_dir / HURRY).exists() and _step(run_dir) >= int(allowed.read_text()):
        time.sleep(0.05)


def _step(run_dir: Path) -> int:
    """The last one written down."""
    try:
        *_, last, _ = (run_dir / "metrics.jsonl").read_text().split("\n")
    except (OSError, ValueError):
        return 0
    return int(json.loads(last)["step"])


class Model(torch.nn.Module):
    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        print(MADE, flush=True)
        _hold("Model")
        self.net = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.Tanh(), torch.nn.Linear(32, 1))
        self.dropout = torch.nn.Dropout(dropout)

    def forward(self, x: torch.Tensor, number: torch.Tensor) -> torch.Tensor:
        return self.net(self.dropout(x)).squeeze(-1)  # type: ignore[no-any-return]


def loss(output: torch.Tensor, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    if torch.is_grad_enabled():  # not in an evaluation
        run_dir = Path(os.environ["DTRAIN_RUN_DIR"])
        if not (run_dir / HURRY).exists():
            time.sleep(float(os.environ.get("COUNTED_STEP_S", "0")))
        with open(run_dir / f"samples-{os.environ['RANK']}.jsonl", "a") as file:
            file.write(json.dumps(batch["number"].tolist()) + "\n")
    if disk := os.environ.get("COUNTED_DISK"):  # of this node; /dev/full is a broken one
        Path(disk).write_text("scratch")
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
