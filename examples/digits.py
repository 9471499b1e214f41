"""Handwritten digits, 8 x 8 pixels, and a small convolutional network that reads them. Needs scikit-learn.

GroupNorm and not BatchNorm: it looks at one sample at a time, so the curve is the same on any number of ranks.
"""

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import Dataset


class Net(nn.Module):
    def __init__(self, width: int = 32):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(1, width, 3, padding=1),
            nn.GroupNorm(8, width),
            nn.ReLU(),
            nn.Conv2d(width, 2 * width, 3, stride=2, padding=1),
            nn.GroupNorm(8, 2 * width),
            nn.ReLU(),
            nn.Conv2d(2 * width, 2 * width, 3, stride=2, padding=1),
            nn.GroupNorm(8, 2 * width),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(2 * width * 2 * 2, 10),
        )

    def forward(self, image: Tensor) -> Tensor:  # (batch, 1, 8, 8) -> logits (batch, 10)
        logits: Tensor = self.layers(image)
        return logits


class Digits(Dataset[tuple[Tensor, Tensor]]):
    """1,797 images; every fifth one is of the test split."""

    def __init__(self, split: str = "train"):
        data = load_digits()
        images, labels = torch.tensor(data.images, dtype=torch.float32) / 16, torch.tensor(data.target)
        held_out = torch.arange(len(images)) % 5 == 0
        chosen = ~held_out if split == "train" else held_out
        self.images, self.labels = images[chosen, None], labels[chosen]  # (n, 1, 8, 8), (n)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.images[index], self.labels[index]


def loss(output: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(output, batch[1])


def metrics(output: Tensor, batch: tuple[Tensor, Tensor]) -> dict[str, tuple[Tensor, int]]:
    """Over the whole test split: exact, whatever the batches."""
    return {"accuracy": ((output.argmax(1) == batch[1]).sum(), len(output))}
