"""The files that `dtrain init` writes: a config and a module that train as they are, to be changed piece by piece."""

from __future__ import annotations

CONFIG = """\
# What is trained, and how. Every key: docs/config.md of dtrain, or `dtrain config {file}`.
#   dtrain launch {file}

# Your code, by dotted name: {module}.py beside this file. The other keys of a target are passed to it.
model: {{_target_: {module}.Model, width: 64}}
loss: {module}.loss                       # callable(output, batch) -> a mean, or (sum, count)
data:
  train: {{_target_: {module}.Points, split: train}}
  eval: {{_target_: {module}.Points, split: eval}}
  batch_size: 64                        # samples a step over the whole job, whatever the number of ranks
optimizer: {{_target_: torch.optim.AdamW, lr: 3.0e-3, weight_decay: 0.01}}
schedule: {{name: cosine, warmup: 20}}    # or constant, linear, wsd

train:
  steps: 300
  eval_every: 100
  precision: fp32                       # bf16 on GPUs that have it

checkpoint: {{every: 100, keep: 3}}       # steps, or a time: 10min. url: s3://bucket/prefix for object storage

cluster: {{nodes: 2}}                     # `dtrain launch --nodes N` wins over this
# strategy: fsdp                        # left out: chosen, and said why
"""

SCRIPT = """\
# A script that torchrun runs, as it is. What it may expect, and how it becomes resumable: docs/scripts.md of dtrain.
#   dtrain launch {file}
script: {script}

cluster: {{nodes: 2}}                     # `dtrain launch --nodes N` wins over this; procs_per_node: one a GPU
"""

MODULE = '''\
"""The parts that {file} names: plain PyTorch, nothing of dtrain. Put your own in their place."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset


class Model(nn.Module):
    def __init__(self, width: int = 64):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(2, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU())
        self.head = nn.Linear(width, 2)

    def forward(self, points: Tensor) -> Tensor:  # (batch, 2) -> logits (batch, 2)
        return self.head(self.layers(points))


def loss(output: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(output, batch[1])


class Points(Dataset[tuple[Tensor, Tensor]]):
    """Two spirals wound around each other. A data set has a length and gives a sample for an index; leave shuffling,
    dealing out to ranks and resuming to dtrain."""

    def __init__(self, split: str = "train", size: int = 4096):
        random = torch.Generator().manual_seed(0 if split == "train" else 1)
        self.label = torch.arange(size) % 2
        angle = 8 * torch.rand(size, generator=random).sqrt()
        phase = angle + torch.pi * self.label
        self.point = torch.stack([angle * phase.cos(), angle * phase.sin()], dim=1) / 4
        self.point += 0.02 * torch.randn(size, 2, generator=random)

    def __len__(self) -> int:
        return len(self.label)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.point[index], self.label[index]
'''
